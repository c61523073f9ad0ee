"""The command ``hwcore``."""

from __future__ import annotations

import click

from hwcore._version import __version__
from hwcore.cli.bench import bench
from hwcore.cli.conformance import conformance
from hwcore.cli.doctor import doctor

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="hwcore")
def main() -> None:
    """Look at, measure and check the hardware backends that are installed."""


main.add_command(doctor)
main.add_command(bench)
main.add_command(conformance)
