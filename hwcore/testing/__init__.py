"""Testing without the hardware: race sanitizer, conformance kit, pytest fixtures.

Import what you need from its module, :mod:`hwcore.testing.sanitizer` for one; this package itself
imports nothing, so that naming it costs nothing.
"""
