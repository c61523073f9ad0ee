"""Which torch is installed, read off its files: importing it is what must not happen."""

from __future__ import annotations

import pathlib

import pytest
import torch

from hwcore import torch_build


def install(site, version_file=None, metadata=None):
    (site / "torch").mkdir(parents=True)
    (site / "torch/__init__.py").write_text("raise RuntimeError('imported')")
    if version_file is not None:
        (site / "torch/version.py").write_text(version_file)
    if metadata is not None:
        (site / "torch-1.dist-info").mkdir()
        (site / "torch-1.dist-info/METADATA").write_text(metadata)
    return [str(site)]


def test_the_torch_of_this_process_is_found():
    found = torch_build.installed()
    assert found.version == torch.__version__
    assert found.local == torch.__version__.partition("+")[2]
    assert found.toolkits["git_version"] == torch.version.git_version
    assert found.folder == pathlib.Path(torch.__file__).parent


def test_only_texts_are_toolkits(tmp_path):
    lines = (
        "import os\n__version__ = '2.9.0+x1'\na: Optional[str] = '7'\nb: str = None\nc = d = '8'\n"
    )
    found = torch_build.installed(install(tmp_path, lines + "e: str\nf = 1\ng[0] = 'no name'\n"))
    assert found.toolkits == {"__version__": "2.9.0+x1", "a": "7", "c": "8", "d": "8"}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("Name: torch\nVersion: 2.9.0\n", "2.9.0+x1"),  # an index may leave the local part out
        ("Name: torch\nVersion: 2.9.0+x2\n", "2.9.0+x2"),
        ("Name: torch\n", "2.9.0+x1"),
        (None, "2.9.0+x1"),
    ],
)
def test_the_version_has_its_local_part_wherever_it_is_said(tmp_path, metadata, expected):
    found = torch_build.installed(install(tmp_path, "__version__ = '2.9.0+x1'\n", metadata))
    assert found.version == expected


@pytest.mark.parametrize("version_file", [None, "this is no Python", "\0"])
def test_a_version_file_that_cannot_be_read_says_nothing(tmp_path, version_file):
    metadata = "Name: torch\nVersion: 2.9.0+x1\n"
    found = torch_build.installed(install(tmp_path, version_file, metadata))
    assert (found.toolkits, found.version, found.local) == (None, "2.9.0+x1", "x1")


def test_the_first_on_the_path_counts_as_it_does_for_python(tmp_path):
    first = install(tmp_path / "a", "__version__ = '1.0+a'\n")
    second = install(tmp_path / "b", "__version__ = '1.0+b'\n", "Name: torch\nVersion: 1.0+b\n")
    assert torch_build.installed(first + second).version == "1.0+a"


def test_where_there_is_no_torch_there_is_none(tmp_path):
    assert torch_build.installed([str(tmp_path), "", "/no/such/folder"]) is None
