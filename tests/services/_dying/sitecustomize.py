"""Imported by every Python that finds it: a router, which has no factory, follows its plan too."""

import os
import pathlib

if "HWCORE_TEST_PLAN" in os.environ:
    import _points

    _points.follow(pathlib.Path(os.environ["HWCORE_TEST_PLAN"]), "router")
