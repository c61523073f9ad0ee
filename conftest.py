"""One process runs one backend, the plugins' own tests included: ``pytest --backend NAME``."""

from __future__ import annotations

import os


def pytest_addoption(parser):
    parser.addoption("--backend", default="cpu", help="the backend that this run is for")


def pytest_configure(config):
    # So that a test which selects automatically, itself or in the code it calls, gets this one.
    os.environ["HWCORE_BACKEND"] = config.getoption("backend")


def pytest_report_header(config):
    return f"hwcore backend: {config.getoption('backend')}"
