"""All groups as one test class, for a vendor's own test file."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, ClassVar

import pytest

from hwcore.testing.conformance.groups.compilation import Compilation
from hwcore.testing.conformance.groups.cpu_fallback import CpuFallback
from hwcore.testing.conformance.groups.distributed import Distributed
from hwcore.testing.conformance.groups.graph_runner import GraphRunners
from hwcore.testing.conformance.groups.graphs import Graphs
from hwcore.testing.conformance.groups.host_memory import HostMemory
from hwcore.testing.conformance.groups.identity import Identity
from hwcore.testing.conformance.groups.kernels import Kernels
from hwcore.testing.conformance.groups.memory import Memory
from hwcore.testing.conformance.groups.ordering import Ordering
from hwcore.testing.conformance.groups.overlap import Overlap
from hwcore.testing.conformance.groups.processes import Processes
from hwcore.testing.conformance.groups.random_numbers import RandomNumbers
from hwcore.testing.conformance.groups.sampling import Sampling
from hwcore.testing.conformance.groups.streams import Streams
from hwcore.testing.conformance.groups.waiting import Waiting
from hwcore.testing.conformance.subject import open_kit

if TYPE_CHECKING:
    from hwcore.backend import Backend
    from hwcore.testing.conformance.kit import Kit
    from hwcore.testing.conformance.raw import RawAccess

__all__ = ["GROUPS", "ConformanceSuite", "group_of"]

GROUPS = (
    Identity,
    Memory,
    Streams,
    Waiting,
    Ordering,
    HostMemory,
    Graphs,
    GraphRunners,
    Compilation,
    CpuFallback,
    RandomNumbers,
    Distributed,
    Processes,
    Kernels,
    Sampling,
    Overlap,
)
"""Every group, in the order of reports. A new one is a module of ``groups/`` and a line here."""


class ConformanceSuite(*GROUPS):  # type: ignore[misc] # mypy reads no computed bases
    """Every conformance test. Derive ``TestSomething`` from it and name the backend.

    Attributes
    ----------
    backend : str or Backend
        The backend under test: its name, or the object.
    raw : RawAccess, optional
        Raw access to the device; default: what the plugin's distribution declares under the entry
        point group ``hwcore.conformance``, else torch alone.
    timeout_s : float
        Limit for each test.
    """

    backend: ClassVar[str | Backend]
    raw: ClassVar[RawAccess | None] = None
    timeout_s: ClassVar[float] = 30.0

    _resources: ClassVar[contextlib.ExitStack]
    _opened: ClassVar[Kit | None]
    _refused: ClassVar[bool]

    @classmethod
    def setup_class(cls) -> None:
        """Forget what another class opened."""
        cls._resources, cls._opened, cls._refused = contextlib.ExitStack(), None, False

    @classmethod
    def teardown_class(cls) -> None:
        """Close the kit."""
        cls._resources.close()

    @pytest.fixture
    def kit(self) -> Kit:
        """Open the backend under test, once for the class."""
        cls = type(self)
        if cls._refused:  # said once is enough
            pytest.skip("the backend could not be opened; the first test of the class says why")
        if cls._opened is None:
            cls._refused = True
            opening = open_kit(cls.backend, cls.raw, cls.timeout_s)
            cls._opened = cls._resources.enter_context(opening)
            cls._refused = False
        return cls._opened


def group_of(function: object) -> str:
    """Return the name of the group that a test function belongs to: that of its module."""
    module = inspect.getmodule(inspect.unwrap(function))  # type: ignore[arg-type]
    return "" if module is None else module.__name__.rpartition(".")[2]
