"""Run torch's own operator database on the simulated device: ``python opinfo.py lazy``.

Prints one JSON object: operator to what went wrong with it, for those where something did, and
under ``""`` how many ran. Operators run in forked children, so that a crash or a hang is that
operator's alone.
"""

import contextlib
import io
import itertools
import json
import os
import select
import signal
import sys
import time
import warnings

import torch
from torch.utils._pytree import tree_leaves, tree_map

SAMPLES = 3
BATCH = 25  # operators in one child; one that crashes costs the others nothing
TIMEOUT_S = 60

# What these return is uninitialised: there is no value to compare, only shape and dtype.
UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}


def main(mode, only=()):
    """Return what is wrong with each operator, and under "" how many ran."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # a forked child has no worker threads
    from torch.testing._internal.common_methods_invocations import op_db

    from hwcore_sim import device

    # The parent only registers the device: once used, it could not be forked.
    device.start()
    device.set_drain_policy(mode)
    ops = [op for op in op_db if torch.float32 in op.dtypes and (not only or op.name in only)]
    found = {"": len(ops)}
    while ops:
        outcomes = in_child(ops[:BATCH])
        for op, outcome in zip(ops, outcomes, strict=False):
            if outcome != "ok":
                found[f"{op.name}.{op.variant_test_name}".rstrip(".")] = outcome
        ops = ops[len(outcomes) :]
    return found


def in_child(ops):
    """Return the outcomes of the operators up to the first that ends the child, that included."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash may be talkative
        for op in ops:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    outcome = compare(op) or "ok"
            except BaseException as error:  # noqa: BLE001
                outcome = explain(error)
            os.write(writing, outcome.replace("\n", " ").encode() + b"\n")
        os._exit(0)
    os.close(writing)
    outcomes, ended = [], ""
    with open(reading, "rb", buffering=0) as pipe:
        received = b""
        while len(outcomes) < len(ops):
            if not select.select([pipe], [], [], TIMEOUT_S)[0]:
                os.kill(pid, signal.SIGKILL)
                ended = "hang"
            elif chunk := pipe.read(65_536):
                received += chunk
                outcomes = received.decode(errors="replace").split("\n")[:-1]
                continue
            break
    status = os.waitpid(pid, 0)[1]
    if len(outcomes) < len(ops):
        outcomes.append(ended or f"crash, status {status}")
    return outcomes


def explain(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def compare(op):
    """Return how the device's results differ from the CPU's, "" if they do not."""
    compared = 0
    try:
        samples = list(itertools.islice(op.sample_inputs("cpu", torch.float32), SAMPLES))
    except Exception:  # noqa: BLE001 - torch's own sample makers fail for some on this build
        samples = []
    for sample in samples:
        of_cpu = (sample.input, sample.args, sample.kwargs)
        input_, args, kwargs = tree_map(to_sim, of_cpu)
        try:
            torch.manual_seed(0)
            expected = op(sample.input, *sample.args, **sample.kwargs)
        except Exception:  # noqa: BLE001 - nothing to compare with
            continue
        torch.manual_seed(0)
        try:
            got = op(input_, *args, **kwargs)
            torch.accelerator.synchronize()
        except Exception as error:  # noqa: BLE001
            return explain(error)
        if problem := different(op, expected, got):
            return problem
        compared += 1
    return "" if compared else "nothing to compare"


def to_sim(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("sim").requires_grad_(value.requires_grad)
    is_cpu = isinstance(value, str | torch.device) and str(value) == "cpu"
    return "sim" if is_cpu else value


def strides(tensor):
    """Return the strides of the dimensions that have any elements to step over."""
    return [by for size, by in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def different(op, expected, got):
    for one, other in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        if not isinstance(one, torch.Tensor):
            if one != other and not isinstance(one, torch.device) and one == one:
                return f"value: {one!r} is {other!r}"[:160]
            continue
        if not isinstance(other, torch.Tensor) or other.device.type != "sim":
            return f"device: {getattr(other, 'device', type(other))}"
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"metadata: {one.shape} {one.dtype} is {other.shape} {other.dtype}"
        if op.name in UNINITIALISED:
            continue
        if one.numel() > 0 and strides(one) != strides(other):
            return f"strides: {one.stride()} is {other.stride()} of {one.shape}"
        if not torch.allclose(
            one.detach(), other.detach().cpu(), rtol=1e-3, atol=1e-4, equal_nan=True
        ):
            return "value"
    return ""


if __name__ == "__main__":
    start = time.monotonic()
    print(json.dumps(main(sys.argv[1], sys.argv[2:]), indent=1, sort_keys=True))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
