"""``python -m hwcore.cli``: the command, where its script is not on the path."""

from hwcore.cli import main

main(prog_name="hwcore")
