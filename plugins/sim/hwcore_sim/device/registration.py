"""Make the simulated device a device of this process's torch, once, under one name."""

from __future__ import annotations

import os
import re
import threading
from typing import Any

import torch
from torch.utils import backend_registration

from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CapabilityError,
    CaptureError,
    ForkError,
    describe,
)
from hwcore_sim.device import build

__all__ = ["Settings", "device_type", "is_initialized", "native", "start", "stream_key"]

UNNAMED = "privateuseone"
"""What torch calls the slot for devices from outside as long as nobody has taken it."""

# torch keeps these for devices of its own tree; a device of such a name would be taken for it.
IN_TREE = {"cpu", "cuda", "fpga", "hip", "hpu", "ideep", "ipu", "lazy", "maia", "meta", "metal"}
IN_TREE |= {"mkldnn", "mps", "mtia", "opencl", "opengl", "ve", "vulkan", "xla", "xpu", UNNAMED}
ERROR_CLASSES = (ArgumentValueError, CapabilityError, CaptureError, ForkError)
"""In the order of ``ErrorKind`` in csrc/common.h."""

_lock = threading.Lock()
_name: str | None = None
_native: Any = None
_module: Any = None
_drain = "lazy"


class Settings:
    """What the environment says; all of it is checked before anything is registered."""

    def __init__(self, name: str | None) -> None:
        self.name = _checked_name(name)
        self.devices = _number("HWCORE_SIM_DEVICES", 2, 1, 64)
        self.memory_bytes = _number("HWCORE_SIM_MEMORY", 4 << 30, 1 << 20, 1 << 50)
        self.capture_streams = _number("HWCORE_SIM_CAPTURE_STREAMS", 2048, 1, 1 << 30)
        self.drain = os.environ.get("HWCORE_SIM_DRAIN") or "lazy"
        parse_policy(self.drain, "HWCORE_SIM_DRAIN")


def start(name: str | None = None) -> Any:
    """Build or load the device and register it with torch; once per process.

    Parameters
    ----------
    name : str, optional
        The device type, as in ``name:0``. Default: ``HWCORE_SIM_NAME``, or ``sim``.

    Returns
    -------
    module
        ``torch.<name>``.

    Raises
    ------
    ArgumentValueError
        If the name is one that torch keeps for itself, is not a device name, or is not the one
        that the device has in this process; if an environment variable makes no sense.
    CapabilityError
        If the device cannot be built, or torch's slot for such devices is taken.
    """
    global _name, _native, _module, _drain
    with _lock:
        settings = Settings(name if name is not None or _name is None else _name)
        if _name is not None:
            if settings.name != _name:
                expected = f"{_name!r}, the device's name in this process"
                fix = "Use one process per name"
                raise ArgumentValueError(describe("start", "`name`", settings.name, expected, fix))
            return _module
        taken = torch._C._get_privateuse1_backend_name()
        if taken != UNNAMED:
            message = (
                f"start: torch's slot for devices from outside is taken by `{taken}`; expected it "
                f"to be free. Use the simulated device in a process of its own, with "
                f"TORCH_DEVICE_BACKEND_AUTOLOAD=0."
            )
            raise CapabilityError(message)
        built = build.ensure()
        backend_registration.rename_privateuse1_backend(settings.name)
        _native = build.load(built)
        _configure(settings)
        from hwcore_sim.device import module

        _module = module.make(settings.name, _native)
        torch._register_device_module(settings.name, _module)  # type: ignore[no-untyped-call]
        backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
        _name, _drain = settings.name, settings.drain
        return _module


def _configure(settings: Settings) -> None:
    for kind, error in enumerate(ERROR_CLASSES):
        _native.set_error_class(kind, error)
    _native.set_device_count(settings.devices)
    for index in range(settings.devices):
        _native.set_capacity(index, settings.memory_bytes)
    _native.set_capture_stream_limit(settings.capture_streams)
    _native.set_policy(*parse_policy(settings.drain, "HWCORE_SIM_DRAIN"))


def is_initialized() -> bool:
    """Say whether this process has used the device: a fork of it cannot."""
    return _native is not None and bool(_native.is_live())


def native() -> Any:
    """Return the loaded library, or say that there is none yet."""
    if _native is None:
        message = (
            "hwcore_sim.device: the simulated device is not there yet; expected it to be started. "
            'Call hwcore.load_backend("sim"), or hwcore_sim.device.start(), first.'
        )
        raise CapabilityError(message)
    return _native


def started_drain() -> str:
    """Return the drain policy that the device started with, whatever the environment says now."""
    native()
    return _drain


def device_type() -> str:
    """Return the device's name in this process."""
    native()
    assert _name is not None
    return _name


def stream_key(where: str, stream: object) -> tuple[int, int]:
    """Return device index and id of a stream of the simulated device."""
    if not isinstance(stream, torch.Stream) or stream.device.type != device_type():
        expected = f"a stream of the device `{device_type()}`"
        fix = f"Create it with torch.Stream({device_type()!r})"
        raise ArgumentTypeError(describe(where, "`stream`", stream, expected, fix))
    return stream.device_index, stream.stream_id


def device_index(where: str, index: int | None) -> int:
    """Return a valid device index; None is the current device."""
    if index is None:
        return int(native().current_device())
    count = native().device_count()
    if isinstance(index, bool) or not isinstance(index, int):
        expected = "an int, or None for the current device"
        raise ArgumentTypeError(describe(where, "`index`", index, expected, "Pass a device index"))
    if not 0 <= index < count:
        expected = f"0 to {count - 1}, for there are {count} simulated devices"
        fix = "Name one of them, or set HWCORE_SIM_DEVICES before the process starts"
        raise ArgumentValueError(describe(where, "`index`", index, expected, fix))
    return index


def parse_policy(policy: object, what: str = "`policy`") -> tuple[str, int]:
    """Return a drain policy's name and seed."""
    where, expected = "drain policy", '"lazy", "eager" or "random:SEED" with SEED an integer ≥ 0'
    fix = "Pass one of them"
    if not isinstance(policy, str):
        raise ArgumentTypeError(describe(where, what, policy, expected, fix))
    name, colon, seed = policy.partition(":")
    if policy in ("lazy", "eager"):
        return policy, 0
    if name == "random" and colon and seed.isascii() and seed.isdigit() and int(seed) < 1 << 64:
        return name, int(seed)
    raise ArgumentValueError(describe(where, what, policy, expected, fix))


def _checked_name(name: str | None) -> str:
    what = "HWCORE_SIM_NAME" if name is None else "`name`"
    if name is None:
        name = os.environ.get("HWCORE_SIM_NAME") or "sim"
    if not isinstance(name, str):
        fix = 'Pass one such as "sim"'
        raise ArgumentTypeError(describe("start", what, name, "a device type's name", fix))
    if name in IN_TREE:
        expected = "a name that torch does not keep for a device of its own"
        fix = 'Choose another, such as "sim" or "npu"'
        raise ArgumentValueError(describe("start", what, name, expected, fix))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        expected = "lower-case letters, digits and _, starting with a letter"
        fix = 'Choose another, such as "sim" or "npu"'
        raise ArgumentValueError(describe("start", what, name, expected, fix))
    if name != _name:
        for owner, attribute in ((torch, name), (torch.Tensor, name), (torch.Tensor, f"is_{name}")):
            if hasattr(owner, attribute):
                expected = f"a name that torch has no use for: there is a {owner.__name__}."
                expected += attribute
                fix = 'Choose another, such as "sim" or "npu"'
                raise ArgumentValueError(describe("start", what, name, expected, fix))
    return name


def _number(variable: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(variable)
    if not text:
        return default
    match = re.fullmatch(r"(\d+)([KMGT]?)", text, re.ASCII)
    number = int(match[1]) << 10 * " KMGT".index(match[2] or " ") if match else -1
    if not least <= number <= most:
        expected = f"a whole number from {least} to {most}; K, M, G and T count in powers of 1024"
        fix = f"Set {variable} to one, or unset it for {default}"
        raise ArgumentValueError(describe("start", variable, text, expected, fix))
    return number
