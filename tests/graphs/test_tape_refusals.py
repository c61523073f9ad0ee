"""What a tape refuses while capturing, with the line at fault, and what it lets pass."""

import copy
import linecache
import logging
import math
import operator
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hwcore.errors import CaptureError
from hwcore.graphs.tape import Tape, is_capturing

from ._tapes import assert_replays_like_eager, captured

# --- Refusals -------------------------------------------------------------------------------

X = torch.tensor([1.0, 2.0, 3.0])
MASK = torch.tensor([True, False, True])
ONE = torch.tensor(1)
YES = torch.tensor(True)
RECORD = logging.LogRecord("", logging.INFO, "", 0, "%s", (X,), None)
READS = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "tolist of a scalar": lambda: ONE.tolist(),
    "numpy": lambda: X.numpy(),
    "numpy, forced": lambda: X.numpy(force=True),
    "np.array": lambda: np.array(X),
    "np.asarray": lambda: np.asarray(X),
    "numpy ufunc": lambda: np.add(X, 1),
    "np.from_dlpack": lambda: np.from_dlpack(X),
    "__dlpack__": lambda: X.__dlpack__(),
    "torch.from_dlpack": lambda: torch.from_dlpack(X),
    "bool": lambda: bool(YES),
    "if": lambda: 1 if YES else 0,
    "and": lambda: YES and 1,
    "assert": lambda: operator.not_(YES),
    "int": lambda: int(ONE),
    "float": lambda: float(ONE),
    "complex": lambda: complex(ONE),
    "math": lambda: math.sqrt(ONE),
    "index": lambda: operator.index(ONE),
    "range": lambda: range(ONE),
    "list index": lambda: [1, 2][ONE],
    "slice": lambda: X[:ONE],
    "select": lambda: X[ONE],
    "size": lambda: torch.zeros(ONE),
    "full": lambda: torch.full((2,), ONE),
    "repeat": lambda: X.repeat(ONE),
    "repr": lambda: repr(X),
    "str": lambda: str(X),
    "format": lambda: f"{X}",
    "format of a scalar": lambda: f"{ONE:d}",
    "logging": lambda: logging.Formatter().format(RECORD),
    "in": lambda: 1 in X,
    "max over items": lambda: max(X),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "is_nonzero": lambda: ONE.is_nonzero(),
    "torch.is_nonzero": lambda: torch.is_nonzero(ONE),
    "nonzero": lambda: MASK.nonzero(),
    "where of a condition": lambda: torch.where(MASK),
    "argwhere": lambda: torch.argwhere(MASK),
    "bool mask": lambda: X[MASK],
    "uint8 mask": lambda: torch.ops.aten.index.Tensor(X, [MASK.to(torch.uint8)]),
    "list mask": lambda: X[[True, False, True]],
    "write to a bool mask": lambda: operator.setitem(X, MASK, torch.tensor([1.0, 3.0])),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: torch.unique(X),
    "unique_consecutive": lambda: torch.unique_consecutive(X),
    "bincount": lambda: torch.bincount(torch.tensor([1])),
    "repeat_interleave": lambda: X.repeat_interleave(torch.tensor([1, 2, 3])),
    "tensor of tensors": lambda: torch.tensor([ONE, ONE]),
    "as_tensor of tensors": lambda: torch.as_tensor([[ONE], [ONE]]),
    "new_tensor of tensors": lambda: X.new_tensor([ONE]),
    "asarray of tensors": lambda: torch.asarray([ONE]),
    "new of tensors": lambda: X.new([ONE]),
    "Tensor of tensors": lambda: torch.Tensor([ONE]),
    "tensor_split": lambda: torch.tensor_split(X, torch.tensor([1])),
    "pack_padded_sequence": lambda: nn.utils.rnn.pack_padded_sequence(
        torch.zeros(2, 2), torch.tensor([2, 1])
    ),
    "linalg.inv": lambda: torch.linalg.inv(torch.eye(2)),
    "choose_qparams": lambda: torch._choose_qparams_per_tensor(X),
    "apply_": lambda: X.apply_(abs),
    "map_": lambda: X.map_(X, lambda a, b: a),
    "map2_": lambda: X.map2_(X, X, lambda a, b, c: a),
    "storage list": lambda: X.untyped_storage().tolist(),
    "storage item": lambda: X.untyped_storage()[0],
    "one_hot": lambda: F.one_hot(ONE),
}


# Which of its protocols numpy deprecates is no matter here.
numpy_may_deprecate = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def line_of(code):
    number = code.co_firstlineno
    return f"{__file__}:{number}: `{linecache.getline(__file__, number).strip()}`"


@numpy_may_deprecate
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_host_read_is_refused_with_its_line(read, mode):
    before = X.clone()
    with pytest.raises(CaptureError) as caught:
        captured(read, mode)
    message = str(caught.value)
    assert line_of(read.__code__) in message
    assert message.startswith("Tape.capture: fn made the host read ")
    assert "torch.where" in message
    assert "nonzero_static" in message
    assert torch.equal(X, before)


@numpy_may_deprecate
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_same_read_is_free_outside_a_capture(read):
    before = X.clone()
    read()
    X.copy_(before)


@pytest.mark.parametrize(
    ("read", "op"),
    [
        ("item", "torch.Tensor.item"),
        ("numpy", "torch.Tensor.numpy"),
        ("if", "torch.Tensor.__bool__"),
        ("int", "torch.Tensor.__int__"),
        ("complex", "torch.Tensor.__complex__"),
        ("list index", "torch.Tensor.__index__"),
        ("is_nonzero", "torch.Tensor.is_nonzero"),
        ("slice", "aten._local_scalar_dense.default"),
        ("nonzero", "aten.nonzero.default"),
        ("bool mask", "aten.index.Tensor"),
        ("write to a bool mask", "aten.index_put_.default"),
        ("tensor of tensors", "torch.tensor"),
    ],
)
def test_a_refusal_names_the_op(read, op):
    with pytest.raises(CaptureError, match=rf"the host read {op} at "):
        captured(READS[read])


def test_a_refusal_leaves_the_tape_reusable():
    tape = Tape()
    with pytest.raises(CaptureError):
        tape.capture(READS["item"])
    assert not is_capturing()
    assert tape.capture(lambda: X + 1).tolist() == [2, 3, 4]


def test_a_refusal_names_the_caller_of_a_library_function():
    fn = lambda: copy.deepcopy(X)  # noqa: E731 - its line is what the test looks for
    with pytest.raises(CaptureError) as caught:
        captured(fn)
    assert line_of(fn.__code__) in str(caught.value)


TO_HOST = {
    "cpu": lambda m, x: m.cpu(),
    "to": lambda m, x: m.to("cpu", torch.float64),
    "copy_": lambda m, x: x.copy_(m),
    "setitem": lambda m, x: operator.setitem(x, slice(None), m),
    "foreach": lambda m, x: torch._foreach_copy_([x], [m]),
}


@pytest.mark.parametrize("move", TO_HOST.values(), ids=TO_HOST)
def test_a_copy_from_a_device_to_host_memory_is_refused(move, mode):
    device, host = torch.empty(3, device="meta"), torch.zeros(3)
    with pytest.raises(CaptureError, match=r"fn made aten\.\w+\.\w+ from a device to host memory"):
        captured(lambda: move(device, host), mode)


def test_copies_within_a_device_or_towards_it_are_not_refused():
    device, host = torch.empty(3, device="meta"), torch.zeros(3)
    captured(lambda: (device.copy_(host), host.to("meta"), host.to("cpu", torch.float64)))
    captured(lambda: (device.to(torch.float64), torch.zeros_like(device, device="cpu")))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.resize_(8),
        lambda x: x.resize_as_(torch.zeros(8)),
        lambda x: x.set_(torch.zeros(8)),
        lambda x: x.set_(torch.zeros(8).untyped_storage()),
    ],
)
def test_a_change_of_storage_is_refused(change):
    x = torch.zeros(4)
    with pytest.raises(CaptureError, match=r"changes a tensor's storage.*Allocate the tensor"):
        captured(lambda: change(x))
    assert x.shape == (4,)


def test_a_fresh_empty_tensor_may_be_resized():
    x = torch.randn(4)

    def fn():
        out = torch.empty(0).resize_(4)
        return out.copy_(x)

    assert_replays_like_eager(fn, x.normal_)


def test_a_storage_may_be_written_as_torch_does_it():
    x, y = torch.zeros(3), torch.ones(3)
    tape, _ = captured(lambda: x.untyped_storage().copy_(y.untyped_storage()))
    y.fill_(5)
    tape.replay()
    assert x.tolist() == [5, 5, 5]


def test_sparse_tensors_are_refused():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CaptureError, match=r"torch\.sparse_coo.*to_dense\(\)"):
        captured(lambda: sparse @ torch.ones(3, 1))


def test_pickling_goes_unseen_as_documented():
    captured(lambda: pickle.dumps(X))
