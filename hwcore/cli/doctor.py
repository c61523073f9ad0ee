"""``hwcore doctor``: what is installed, what would be selected, and what is wrong."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hwcore import _env
from hwcore._version import __version__
from hwcore.cli import examination
from hwcore.cli.report import Report
from hwcore.hookspecs import API_VERSION, HOOKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.cli.report import Activation, Plugin, Selection, TorchExtension, TorchImport

__all__ = ["doctor"]

_STATE_STYLES = {
    "available": "green",
    "unavailable": "yellow",
    "broken": "bold red",
    "disabled": "dim",
}
_KERNEL_TITLES = {
    "plugin": "kernels of the plugin",
    "reference": "portable references",
    "unknown": "[yellow]kernels that the core never calls[/]",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (docs/doctor.md).")
def doctor(as_json: bool) -> None:
    """Say what is installed, what would be selected and why, and what is wrong.

    Exit status: 0 all is well; 1 a plugin is broken; 2 selection would fail.
    """
    console = Console(quiet=as_json, highlight=False)
    view = _View(console)

    torch_version = examination.distribution_version("torch")
    variables = {name: os.environ.get(name) for name in _env.MEANINGS}
    view.versions(torch_version, variables)

    with console.status("Probing plugins"):
        results = examination.probe_all()
    plugins = [examination.describe_plugin(origin, result) for origin, result in results.items()]
    view.plugins(plugins)

    selection, failure = examination.select()
    view.selection(selection, plugins)

    extensions = examination.torch_extensions()
    with console.status("Importing torch and activating the backend in a child process"):
        torch_import, activation = examination.activate(selection.backend)
    view.torch(torch_import, extensions)
    view.activation(activation)

    code = examination.exit_code(plugins, selection, failure, torch_import, activation)
    view.verdict(code)
    if as_json:
        found = Report(
            python=platform.python_version(),
            hwcore=__version__,
            api_version=API_VERSION,
            torch=torch_version,
            variables=variables,
            plugins=plugins,
            torch_extensions=extensions,
            selection=selection,
            torch_import=torch_import,
            activation=activation,
            exit_code=code,
        )
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    raise SystemExit(code)


class _View:
    """The report for people, a section at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def versions(self, torch: str | None, variables: dict[str, str | None]) -> None:
        self._print(f"hwcore  {__version__}, hook contract {API_VERSION}")
        self._print(f"torch   {torch or '[bold red]not installed[/]'}")
        self._print(f"Python  {platform.python_version()}")
        for name, value in variables.items():
            if value is not None:
                self._print(f"{name}={escape(value)}  [dim]{_env.MEANINGS[name]}[/]")

    def plugins(self, plugins: Sequence[Plugin]) -> None:
        table = Table(title="Backends", title_justify="left", title_style="bold")
        for column in ("name", "distribution", "contract", "priority", "state"):
            table.add_column(column, overflow="fold")
        for plugin in plugins:
            contract = plugin.api_version or plugin.api
            rank = "" if plugin.priority is None else str(plugin.priority)
            table.add_row(
                plugin.name,
                f"{plugin.distribution} {plugin.version}",
                contract,
                f"{rank} by name only" if plugin.automatic is False else rank,
                f"[{_STATE_STYLES[plugin.state]}]{plugin.state}[/]",
            )
        self._console.print(table)
        for plugin in plugins:
            if plugin.error:
                self._print(f"[red]{plugin.name}[/]: {escape(plugin.error)}")
            elif plugin.reason:
                self._print(f"[yellow]{plugin.name}[/]: {escape(plugin.reason)}.")
                self._print(f"  fix: {escape(plugin.fix or '')}.")
            self._print(f"  [dim]{escape(plugin.entry_point)} in {escape(_place(plugin))}[/]")

    def selection(self, selection: Selection, plugins: Sequence[Plugin]) -> None:
        self._heading("Selection")
        if selection.error:
            self._print(f"[bold red]would fail[/]: {escape(selection.error)}")
            return
        self._print(f"[green]{selection.backend}[/], {escape(selection.why or '')}")
        if selection.warning:
            self._print(f"[yellow]warning[/]: {escape(selection.warning)}")
        own = next(plugin.hooks for plugin in plugins if plugin.name == selection.backend)
        default = [hook for hook in HOOKS if hook not in own]
        self._print(f"hooks of the plugin ({len(own)}): [dim]{', '.join(own)}[/]")
        self._print(f"defaults ({len(default)}): [dim]{', '.join(default)}[/]")

    def torch(self, found: TorchImport, extensions: Sequence[TorchExtension]) -> None:
        self._heading("import torch")
        for extension in extensions:
            self._print(
                f"loads the extension {escape(extension.name)} "
                f"({escape(extension.distribution)} {escape(extension.version)})"
            )
        if found.ok:
            self._print("[green]works[/]")
        else:
            self._print(f"[bold red]fails[/]: {escape(found.error or '')}")
            self._print(f"  fix: {escape(found.fix or '')}.")

    def activation(self, activation: Activation | None) -> None:
        if activation is None:
            return
        self._heading("Activation")
        if not activation.ok:
            self._print(f"[bold red]fails[/]: {escape(activation.error or '')}")
            return
        self._print(f"[green]works[/], devices: {activation.device_count}")
        state = "on" if activation.compile_enabled else "off"
        reason = f": {escape(activation.compile_reason)}" if activation.compile_reason else ""
        self._print(f"torch.compile is {state}{reason}")
        if activation.on_cpu_error:
            self._print(f"[yellow]operators[/]: {escape(activation.on_cpu_error)}")
        elif activation.on_cpu:
            names = ", ".join(activation.on_cpu)
            self._print(
                f"[yellow]on the CPU[/] ({len(activation.on_cpu)}), for the plugin says that the "
                f"device lacks them; the host waits each time: {names}"
            )
        for source, title in _KERNEL_TITLES.items():
            having = [name for name, found in activation.kernels.items() if found == source]
            if having:
                self._print(f"{title} ({len(having)}): [dim]{escape(', '.join(having))}[/]")

    def verdict(self, code: int) -> None:
        meanings = ("all is well", "a plugin is broken", "selection would fail")
        style = ("green", "red", "bold red")[code]
        self._print(f"\n[{style}]{meanings[code]}[/] (exit status {code})")

    def _heading(self, text: str) -> None:
        self._print(f"\n[bold]{text}[/]")

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=False)


def _place(plugin: Plugin) -> str:
    return plugin.file or plugin.location
