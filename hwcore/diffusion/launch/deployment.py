"""What is to run: roles, how many of each, and the router between them."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

import msgspec

from hwcore._checks import check_instance, check_size
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.router.config import RouterConfig
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Deployment", "RoleSpec"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """One role of a pipeline, and how many processes have it.

    Attributes
    ----------
    role : RoleType
    factory : str
        ``"package.module:function"``, importable in the role's process. Called there with
        ``options`` as keywords, it loads the model and returns the scheduler: a
        :class:`~hwcore.diffusion.serving.scheduler.SchedulerDisaggMixin`.
    options : dict
        Of what JSON can hold.
    count : int
    backend : str
        Sets ``HWCORE_BACKEND`` in the process; empty: as it is where the launcher runs.
    environment : dict of str to str
        More variables for the process.
    worker : dict
        Of :class:`~hwcore.diffusion.serving.config.WorkerConfig`, but ``role``, ``router`` and
        ``name``.
    cpus, gpus : float
        What a cluster sets aside for each process.
    """

    role: RoleType
    factory: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    count: int = 1
    backend: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    worker: dict[str, Any] = dataclasses.field(default_factory=dict)
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        """Check every value."""
        where = "RoleSpec"
        check_instance(where, "role", self.role, RoleType, "hwcore.diffusion.RoleType")
        check_size(where, "count", self.count, 1, "Pass how many processes have this role")
        fix = "Pass where the process finds what loads its model"
        if not isinstance(self.factory, str):
            raise ArgumentTypeError(describe(where, "factory", self.factory, "a str", fix))
        module, _, name = self.factory.partition(":")
        if not module or not name.isidentifier():
            expected = "`package.module:function`"
            raise ArgumentValueError(describe(where, "factory", self.factory, expected, fix))
        for what in ("options", "worker"):
            try:
                msgspec.json.encode(getattr(self, what))
            except (TypeError, ValueError) as error:
                got, fix = f"{getattr(self, what)!r}: {error}", "Pass what JSON can hold"
                raise ArgumentTypeError(
                    describe(where, what, got, "a dict for another process", fix)
                ) from error
        taken = {"role", "router", "name"} & self.worker.keys()
        if taken:
            fix = "Leave it to the launcher"
            expected = "settings of a worker but for role, router and name"
            raise ArgumentValueError(describe(where, "worker", sorted(taken), expected, fix))

    def load(self) -> Callable[..., Any]:
        """Return the factory, imported.

        Raises
        ------
        ArgumentValueError
            If there is none of that name.
        """
        module, _, name = self.factory.partition(":")
        try:
            factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            expected, fix = "a function that can be imported", "Put its package on PYTHONPATH"
            got = f"{self.factory}: {error}"
            raise ArgumentValueError(describe("RoleSpec", "factory", got, expected, fix)) from error
        return factory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """A router and the workers of every role.

    Attributes
    ----------
    roles : tuple of RoleSpec
    router : RouterConfig
    restarts : int
        How often a process that died is started again. Each.
    ready_timeout_s : float
        How long all of them may take to load their models and to register.
    """

    roles: tuple[RoleSpec, ...]
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    restarts: int = 3
    ready_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        """Check that every role of the pipeline is there."""
        where = "Deployment"
        check_instance(where, "router", self.router, RouterConfig, "RouterConfig()")
        check_size(where, "restarts", self.restarts, 0, "Pass how often a process may be restarted")
        for spec in self.roles:
            check_instance(where, "roles", spec, RoleSpec, "RoleSpec()")
        roles = [spec.role for spec in self.roles]
        wrong = {*roles} ^ {*self.router.pipeline}
        if wrong or len(roles) != len({*roles}):
            expected = f"one RoleSpec for each of {', '.join(self.router.pipeline)}"
            fix = "Add what is missing, or name the roles in RouterConfig.pipeline"
            got = ", ".join(roles) or None
            raise ArgumentValueError(describe(where, "roles", got, expected, fix))

    def processes(self) -> Iterator[tuple[str, RoleSpec]]:
        """Yield the name of each role's process, such as ``denoiser-0``, and its role."""
        for spec in self.roles:
            for number in range(spec.count):
                yield f"{spec.role}-{number}", spec
