"""Fixtures for pytest: name this module in ``pytest_plugins``, or import from it in a conftest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hwcore.testing.sanitizer import Sanitizer
from hwcore.testing.sanitizer.reports import summary

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["race_sanitizer"]


@pytest.fixture
def race_sanitizer() -> Iterator[Sanitizer]:
    """Watch the test with a sanitizer of the process's backend.

    The test fails when it ends if a race was found. A test that expects races takes them:
    ``races = race_sanitizer.take()``.
    """
    with Sanitizer(on_race="collect") as sanitizer:
        yield sanitizer
    if sanitizer.races:
        pytest.fail(summary(sanitizer.races), pytrace=False)
