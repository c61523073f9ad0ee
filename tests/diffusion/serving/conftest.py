"""Fixtures for the tests of a role."""

from ._served import serve

__all__ = ["serve"]
