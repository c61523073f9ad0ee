"""DiffusionRequest: what travels from role to role, and what each role builds anew."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import torch

from hwcore._checks import check_instance
from hwcore.errors import ArgumentValueError, PeerError, describe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hwcore.backend import Backend

__all__ = ["DiffusionRequest", "schedule_for"]


@dataclasses.dataclass
class DiffusionRequest:
    """A request on its way through the roles.

    Attributes
    ----------
    request_id : str
    fields : dict of str to tree
        What the roles hand on: tensors, lists with None in them, enums, numbers; see
        :func:`hwcore.diffusion.tree.flatten`.
    seeds : list of int
        One for each generator.
    noise_on_device : bool
        Whether the generators are the device's. By default the host's: the same noise everywhere.
    num_inference_steps, timesteps, sigmas, mu : int, Tensor or list, Tensor or list, float
        What the noise schedule is made of; None: not given.
    extra : dict of str to tree
        What an engine adds.
    generators : list of torch.Generator
        Not sent; :meth:`restore_generators` makes them where the role before left them.
    scheduler : object
        The request's own noise schedule: two requests share none. Not sent.
    """

    request_id: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: list[int] = dataclasses.field(default_factory=list)
    noise_on_device: bool = False
    num_inference_steps: int | None = None
    timesteps: Any = None
    sigmas: Any = None
    mu: float | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    generators: list[torch.Generator] = dataclasses.field(default_factory=list, repr=False)
    scheduler: Any = dataclasses.field(default=None, repr=False)
    _states: list[Any] = dataclasses.field(default_factory=list, repr=False)

    def to_tree(self) -> dict[str, Any]:
        """Return what is sent.

        A generator travels as its seed; with its state besides if noise was drawn from it.

        Raises
        ------
        ArgumentValueError
            If it has generators, but not one for each seed.
        """
        if self.generators and len(self.generators) != len(self.seeds):
            what, got = "generators", f"{len(self.generators)} of them"
            expected = f"one for each of {len(self.seeds)} seeds, or none"
            fix = "Set seeds and generators together"
            raise ArgumentValueError(describe("DiffusionRequest", what, got, expected, fix))
        tree = {name: getattr(self, name) for name in _SENT}
        tree["states"] = self._states or [
            _state(generator, seed)
            for generator, seed in zip(self.generators, self.seeds, strict=False)
        ]
        return tree

    @classmethod
    def from_tree(cls, request_id: str, tree: object) -> DiffusionRequest:
        """Return the request that :meth:`to_tree` made, without its generators.

        No tensor's values are looked at: they may not have come yet.

        Raises
        ------
        PeerError
            If it is no such tree.
        """
        where = "DiffusionRequest.from_tree"
        if not isinstance(tree, dict) or tree.keys() != {*_SENT, "states"}:
            expected = f"a dict of {', '.join(_SENT)} and states"
            raise _unlike(where, "the tree", tree, expected)
        request = cls(request_id, **{name: tree[name] for name in _SENT})
        _check_types(where, request, tree["states"])
        request._states = tree["states"]
        return request

    def restore_generators(self, backend: Backend | None = None) -> None:
        """Make one generator for each seed, at the point where its state was taken.

        Parameters
        ----------
        backend : Backend, optional
            For generators on the device; by default the process's own.

        Raises
        ------
        PeerError
            If a state is none of such a generator.

        Notes
        -----
        Host sync: a state that came to a device is read.
        """
        where, generators = "restore_generators", []
        states, self._states = self._states, []
        for seed, state in zip(self.seeds, states or [None] * len(self.seeds), strict=True):
            generator = _generator(self.noise_on_device, backend)
            generators.append(generator.manual_seed(seed))
            if state is not None:
                try:
                    # In memory of its own: of a view, torch reads the storage from its beginning.
                    generator.set_state(state.cpu().clone())
                except (RuntimeError, TypeError) as error:
                    got = f"{list(state.shape)} of {state.dtype}"
                    expected = f"the state of a generator of {generator.device.type}"
                    raise _unlike(where, "a state", got, expected) from error
        self.generators = generators


_SENT = (
    *("fields", "seeds", "noise_on_device", "num_inference_steps", "timesteps", "sigmas", "mu"),
    "extra",
)


def schedule_for(template: object, request: DiffusionRequest, device: torch.device) -> object:
    """Return a noise schedule of the request's own, from a pipeline's.

    Parameters
    ----------
    template : object
        Has ``set_timesteps`` and, afterwards, ``timesteps``, as those of diffusers. It is copied:
        requests that are served at the same time leave it as it is.
    request : DiffusionRequest
        Its sigmas count first, then its timesteps, then its number of steps: the first of them
        that ``set_timesteps`` takes. ``request.timesteps`` becomes the schedule's.

    Raises
    ------
    ArgumentValueError
        If the request says something that the schedule cannot be set to.
    """
    schedule: Any = copy.deepcopy(template)
    accepted: Mapping[str, Any] = inspect.signature(schedule.set_timesteps).parameters
    options: dict[str, Any] = {} if request.mu is None else {"mu": request.mu}
    given = {"sigmas": request.sigmas, "timesteps": request.timesteps}
    named = [name for name, value in given.items() if value is not None]
    chosen = next((name for name in named if name in accepted), None)
    if chosen is not None:
        value = given[chosen]
        options[chosen] = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    elif request.num_inference_steps is not None:
        options["num_inference_steps"] = request.num_inference_steps
    elif not named:
        return schedule  # nothing to be set
    unset = [name for name in options if name not in accepted]
    unset += named if not options.keys() - {"mu"} else []
    if unset:
        what, got = f"`{unset[0]}` of the request", getattr(request, unset[0])
        expected = f"what {type(schedule).__name__}.set_timesteps takes: {', '.join(accepted)}"
        fix = "Leave it out of the request, or serve it with a schedule that knows it"
        raise ArgumentValueError(describe("schedule_for", what, got, expected, fix))
    schedule.set_timesteps(device=device, **options)
    request.timesteps = schedule.timesteps
    return schedule


def _generator(on_device: bool, backend: Backend | None) -> torch.Generator:
    if not on_device:
        return torch.Generator()
    if backend is None:
        from hwcore.activation import current_backend

        backend = current_backend()
    return backend.generator()


def _state(generator: torch.Generator, seed: int) -> torch.Tensor | None:
    """Return a generator's state, or None where its seed says all."""
    check_instance("DiffusionRequest", "a generator", generator, torch.Generator, "its seeds")
    state: torch.Tensor = generator.get_state()
    fresh = torch.Generator(generator.device).manual_seed(seed).get_state()
    return None if torch.equal(state, fresh) else state


def _check_types(where: str, request: DiffusionRequest, states: object) -> None:
    for name, kinds in _KINDS.items():
        value = getattr(request, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise _unlike(where, f"`{name}`", value, expected)
    if not all(type(seed) is int and 0 <= seed < 2**64 for seed in request.seeds):
        raise _unlike(where, "`seeds`", request.seeds, "ints in [0, 2**64)")
    found = states if isinstance(states, list) else [states]
    right = len(found) in (0, len(request.seeds)) and isinstance(states, list)
    if not right or not all(it is None or isinstance(it, torch.Tensor) for it in found):
        expected = f"none, or {len(request.seeds)} Tensors or None"
        raise _unlike(where, "`states`", states, expected)


_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "fields": (dict,),
    "seeds": (list,),
    "noise_on_device": (bool,),
    "num_inference_steps": (int, _NONE),
    "timesteps": (torch.Tensor, list, _NONE),
    "sigmas": (torch.Tensor, list, _NONE),
    "mu": (float, int, _NONE),
    "extra": (dict,),
}


def _unlike(where: str, what: str, got: object, expected: str) -> PeerError:
    fix = "Send what DiffusionRequest.to_tree() returns, with the same hwcore at both ends"
    return PeerError(describe(where, what, got, expected, fix))
