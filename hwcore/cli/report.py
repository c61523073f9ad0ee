"""What ``hwcore doctor`` finds out, as data. ``--json`` prints it; docs/doctor.md explains it."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["SCHEMA_VERSION", "Activation", "Plugin", "Report", "Selection", "TorchExtension"]

SCHEMA_VERSION = 1
"""Raised when a field is removed or changes its meaning; new fields do not raise it."""


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """One installed backend."""

    name: str
    distribution: str
    version: str
    entry_point: str
    location: str
    file: str | None = None
    state: Literal["available", "unavailable", "broken", "disabled"]
    api: Literal["compatible", "incompatible", "unknown"] = "unknown"
    api_version: str | None = None
    priority: int | None = None
    automatic: bool | None = None
    reason: str | None = None
    fix: str | None = None
    error: str | None = None
    hooks: list[str] = []


class TorchExtension(msgspec.Struct, frozen=True, kw_only=True):
    """A device extension that ``import torch`` loads by itself."""

    name: str
    entry_point: str
    distribution: str
    version: str


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What ``hwcore.current_backend()`` would take in a new process."""

    requested: str | None = None
    backend: str | None = None
    why: str | None = None
    warning: str | None = None
    error: str | None = None


class TorchImport(msgspec.Struct, frozen=True, kw_only=True):
    """Whether ``import torch`` works in a new process, tried in a child."""

    ok: bool
    error: str | None = None
    fix: str | None = None


class Activation(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the selected backend when it was activated, in a child."""

    ok: bool
    error: str | None = None
    device_count: int | None = None
    compile_enabled: bool | None = None
    compile_reason: str | None = None
    hooks: dict[str, str] = {}
    on_cpu: list[str] | None = None
    on_cpu_error: str | None = None
    kernels: dict[str, Literal["plugin", "reference", "unknown"]] = {}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything; ``exit_code`` is that of the command."""

    schema_version: int = SCHEMA_VERSION
    python: str
    hwcore: str
    api_version: str
    torch: str | None
    variables: dict[str, str | None]
    plugins: list[Plugin]
    torch_extensions: list[TorchExtension]
    selection: Selection
    torch_import: TorchImport
    activation: Activation | None
    exit_code: Literal[0, 1, 2]
