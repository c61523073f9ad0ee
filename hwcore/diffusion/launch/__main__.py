"""A process of a deployment; see :mod:`hwcore.diffusion.launch.process`."""

import sys

from hwcore.diffusion.launch.process import main

main(int(sys.argv[1]))
