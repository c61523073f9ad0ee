"""The module ``torch.<name>``: what torch, and programs written for torch, expect of a device."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

from hwcore.errors import ArgumentTypeError, CapabilityError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["make"]


def make(name: str, native: Any) -> types.ModuleType:
    """Return the module for the device type ``name``."""
    module = types.ModuleType(f"torch.{name}", f"The simulated device `{name}` of hwcore.")
    for part in (_devices, _streams, _random, _memory):
        public = part(name, native)
        for attribute, value in public.items():
            if isinstance(value, types.FunctionType | type):
                value.__module__ = module.__name__
                value.__qualname__ = attribute
        vars(module).update(public)
    return module


def _index(name: str, native: Any, device: Any) -> int:
    """Return the index of the device that an argument of torch's functions means."""
    index, count = _parsed(name, native, device), native.device_count()
    if index == -1:  # torch's way to say: the current one
        return int(native.current_device())
    if not 0 <= index < count:
        expected = f"0 to {count - 1}, for there are {count} simulated devices"
        fix = "Name one of them, or set HWCORE_SIM_DEVICES before the process starts"
        raise CapabilityError(describe(f"torch.{name}", "`device`", device, expected, fix))
    return index


def _parsed(name: str, native: Any, device: Any) -> int:
    if device is None:
        return int(native.current_device())
    if isinstance(device, int) and not isinstance(device, bool):
        return device
    if isinstance(device, str):
        device = torch.device(device)
    if not isinstance(device, torch.device) or device.type != name:
        expected = f"an index, or a device of type {name!r}"
        fix = "Pass one of them, or None for the current device"
        raise ArgumentTypeError(describe(f"torch.{name}", "`device`", device, expected, fix))
    return int(native.current_device()) if device.index is None else device.index


def _devices(name: str, native: Any) -> dict[str, Any]:
    def set_device(device: Any) -> None:
        """Make a device the calling thread's current one."""
        native.set_device(_index(name, native, device))

    class device:
        """A context in which a device is current; None and negative indices change nothing."""

        def __init__(self, device: Any) -> None:
            self.index = -1 if device is None else _parsed(name, native, device)
            self.before = -1

        def __enter__(self) -> None:
            self.before = native.current_device()
            if self.index >= 0:
                native.set_device(self.index)

        def __exit__(self, *exception: object) -> None:
            native.set_device(self.before)

    class device_of(device):
        """A context in which a tensor's device is current."""

        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor.device if tensor.device.type == name else None)

    def get_device_name(device: Any = None) -> str:
        """Return a name for people to read."""
        return f"simulated {name}:{_index(name, native, device)}"

    def get_device_properties(device: Any = None) -> types.SimpleNamespace:
        """Return name and memory size."""
        index = _index(name, native, device)
        total = native.memory_info(index)[1]
        return types.SimpleNamespace(name=get_device_name(index), total_memory=total)

    return {
        "current_device": lambda: native.current_device(),
        "device": device,
        "device_count": lambda: native.device_count(),
        "device_of": device_of,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "get_device_name": get_device_name,
        "get_device_properties": get_device_properties,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda: True,
        "is_initialized": lambda: bool(native.is_live()),
        "_is_in_bad_fork": lambda: bool(native.in_bad_fork()),
        "_lazy_init": lambda: None,
        "set_device": set_device,
    }


def _streams(name: str, native: Any) -> dict[str, Any]:
    accelerator = torch.accelerator

    def where(device: Any) -> torch.device:
        return torch.device(name, _index(name, native, device))

    class Stream(torch.Stream):
        """A queue of device work; lower priorities run first."""

        def __new__(cls, device: Any = None, priority: int = 0, **parts: int) -> Any:
            if parts:  # of an existing stream
                return super().__new__(cls, **parts)
            return super().__new__(cls, device=where(device), priority=priority)

    class Event(torch.Event):
        """A point in a stream."""

        def __new__(
            cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
        ) -> Any:
            device = torch.device(name)
            return super().__new__(
                cls,
                device=device,
                enable_timing=enable_timing,
                blocking=blocking,
                interprocess=interprocess,
            )

    class StreamContext:
        """A context in which a stream is current; None changes nothing."""

        def __init__(self, stream: torch.Stream | None) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            if self.stream is not None:
                self.stream.__enter__()

        def __exit__(self, *exception: Any) -> None:
            if self.stream is not None:
                self.stream.__exit__(*exception)

    def current_stream(device: Any = None) -> torch.Stream:
        """Return the calling thread's current stream."""
        return accelerator.current_stream(where(device))

    def default_stream(device: Any = None) -> torch.Stream:
        """Return the stream that is current where none was chosen."""
        at = where(device)
        return torch.Stream(stream_id=0, device_index=at.index, device_type=_type_number())

    def synchronize(device: Any = None) -> None:
        """Wait for all work of a device."""
        accelerator.synchronize(where(device))

    return {
        "Event": Event,
        "Stream": Stream,
        "StreamContext": StreamContext,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "is_current_stream_capturing": lambda: bool(native.is_capturing()),
        "set_stream": lambda stream: accelerator.set_stream(stream),
        "stream": lambda stream: StreamContext(stream),
        "synchronize": synchronize,
    }


def _type_number() -> int:
    """Return c10::DeviceType::PrivateUse1, as streams are made from it."""
    return 20


def _random(name: str, native: Any) -> dict[str, Any]:
    def generators() -> tuple[torch.Generator, ...]:
        return tuple(native.default_generator(i) for i in range(native.device_count()))

    def here(device: Any) -> torch.Generator:
        generator: torch.Generator = native.default_generator(_index(name, native, device))
        return generator

    def manual_seed_all(seed: int) -> None:
        """Seed the default generators of all devices."""
        for generator in generators():
            generator.manual_seed(seed)

    def seed_all() -> None:
        """Seed the default generators of all devices with one number nobody knows."""
        manual_seed_all(generators()[0].seed())

    def get_rng_state_all() -> list[torch.Tensor]:
        """Return the states of all default generators."""
        return [generator.get_state() for generator in generators()]

    def set_rng_state_all(states: list[torch.Tensor]) -> None:
        """Set the states of all default generators."""
        for generator, state in zip(generators(), states, strict=True):
            generator.set_state(state)

    public: dict[str, Callable[..., Any]] = {
        "get_rng_state": lambda device=None: here(device).get_state(),
        "get_rng_state_all": get_rng_state_all,
        "initial_seed": lambda: here(None).initial_seed(),
        "manual_seed": lambda seed: here(None).manual_seed(seed) and None,
        "manual_seed_all": manual_seed_all,
        "seed": lambda: here(None).seed() and None,
        "seed_all": seed_all,
        "set_rng_state": lambda state, device=None: here(device).set_state(state) and None,
        "set_rng_state_all": set_rng_state_all,
    }
    return {**public, "default_generators": generators()}


def _memory(name: str, native: Any) -> dict[str, Any]:
    def at(function: Callable[[int], Any]) -> Callable[..., Any]:
        def for_device(device: Any = None) -> Any:
            return function(_index(name, native, device))

        for_device.__doc__ = function.__doc__
        return for_device

    accelerator = torch.accelerator
    return {
        "empty_cache": lambda: accelerator.empty_cache(),
        "max_memory_allocated": at(accelerator.max_memory_allocated),
        "max_memory_reserved": at(accelerator.max_memory_reserved),
        "mem_get_info": at(native.memory_info),
        "memory_allocated": at(accelerator.memory_allocated),
        "memory_reserved": at(accelerator.memory_reserved),
        "memory_stats": at(accelerator.memory_stats),
        "reset_accumulated_memory_stats": at(accelerator.reset_accumulated_memory_stats),
        "reset_peak_memory_stats": at(accelerator.reset_peak_memory_stats),
    }
