"""torch's own operator database, every float32 entry, against the CPU."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

# What does not work, and why. An entry that starts to work must leave the table.
CUDA_ONLY = "compiles CUDA source: nothing to compare with on the CPU"
ROW_MAJOR = "the solution comes out row by row, the CPU's column by column"
EXPECTED = {
    "as_strided.partial_views": "the sample reads memory around its view, which a copy lacks",
    "jiterator_2inputs_2outputs": CUDA_ONLY,
    "jiterator_4inputs_with_extra_args": CUDA_ONLY,
    "jiterator_binary": CUDA_ONLY,
    "jiterator_binary_return_by_ref": CUDA_ONLY,
    "jiterator_unary": CUDA_ONLY,
    "linalg.lstsq": ROW_MAJOR,
    "linalg.lstsq.grad_oriented": ROW_MAJOR,
    "sparse.mm.reduce": "the device has no sparse tensors, and says so",
    "sparse.sampled_addmm": "the device has no sparse tensors, and says so",
    "tensor_split": "torch wants the split points on the CPU, whatever the device",
    "to_sparse": "the device has no sparse tensors, and says so",
}


@pytest.mark.slow
@pytest.mark.usefixtures("_started")
@pytest.mark.parametrize("policy", ["eager", "lazy"])
def test_every_operator_but_a_few_gives_what_the_cpu_gives(policy):
    runner = pathlib.Path(__file__).parent / "opinfo.py"
    done = subprocess.run(
        [sys.executable, str(runner), policy],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    found = json.loads(done.stdout)
    ran = found.pop("")
    assert found.keys() == EXPECTED.keys(), found
    assert not [name for name, problem in found.items() if problem.startswith(("crash", "hang"))]
    assert ran - len(EXPECTED) >= 650
