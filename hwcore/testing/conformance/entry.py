"""What pytest collects for ``hwcore conformance``; the kit comes from the session."""

from __future__ import annotations

import pytest

from hwcore.testing.conformance import ConformanceSuite
from hwcore.testing.conformance.session import KIT


class TestConformance(ConformanceSuite):
    """Every group, on the backend that the session opened."""

    @pytest.fixture
    def kit(self, request: pytest.FixtureRequest) -> object:
        """Return the session's kit."""
        return request.config.stash[KIT]
