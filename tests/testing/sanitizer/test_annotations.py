"""What the program tells the sanitizer: rows of indexed ops, what kernels touch, names."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.testing import sanitizer as san


@pytest.fixture
def pool(zeros):
    return zeros(8, 4)


def index(hw, *rows):
    numbers = torch.tensor(rows, device=hw.device())
    hw.synchronize()
    return numbers


@pytest.mark.parametrize(
    ("ours", "theirs", "race"),
    [
        ([0, 3], [1, 2], False),
        ([0, 3], [3, 4], True),
        (slice(0, 4), slice(4, None), False),
        (range(0, 8, 2), [-1], False),
        (np.array([0, 3]), np.int64(3), True),
        (-8, 0, True),
        (torch.tensor([1, 1]), 2, False),
        ([], [0], False),
    ],
)
def test_rows_narrow_indexed_writes(hw, sanitizer, streams, pool, ours, theirs, race):
    _, side = streams
    numbers, values = index(hw, 0, 1), torch.ones(2, 4, device=hw.device())
    hw.synchronize()
    with san.rows(pool, ours):
        pool.index_put_((numbers,), values)
    with hw.stream_context(side), san.rows(pool, theirs):
        pool.index_copy_(0, numbers, values)
    assert bool(sanitizer.take()) is race
    hw.synchronize()


def test_without_rows_an_indexed_write_counts_for_the_whole_tensor(hw, sanitizer, streams, pool):
    _, side = streams
    numbers, values = index(hw, 0, 1), torch.ones(2, 4, device=hw.device())
    hw.synchronize()
    with san.rows(pool, [0, 1]):
        pool.index_put_((numbers,), values)
    with hw.stream_context(side):
        pool.index_copy_(0, numbers, values)
    assert sanitizer.take()
    hw.synchronize()


def test_rows_narrow_reads_and_views_of_the_tensor(hw, sanitizer, streams, pool):
    _, side = streams
    numbers = index(hw, 5)
    with san.rows(pool, 5):
        read = pool[:, 1:].index_select(0, numbers)
    with hw.stream_context(side):
        pool[:5].fill_(1)
        assert sanitizer.take() == []
        pool[5].fill_(1)
    assert [race.kind for race in sanitizer.take()] == ["write after read"]
    hw.synchronize()
    del read


def test_rows_do_not_narrow_other_ops(hw, sanitizer, streams, pool):
    _, side = streams
    with san.rows(pool, 0):
        pool.fill_(1)
    with hw.stream_context(side):
        pool[7].fill_(1)
    assert sanitizer.take()
    hw.synchronize()


def test_rows_do_not_narrow_other_tensors(hw, sanitizer, streams, pool, zeros):
    _, side = streams
    other, numbers = zeros(8, 4), index(hw, 7)
    values = zeros(1, 4)
    with san.rows(pool, 0):
        other.index_put_((numbers,), values)
    with hw.stream_context(side):
        other[7].fill_(1)
    assert sanitizer.take()
    hw.synchronize()


def test_rows_end_with_their_block(hw, sanitizer, pool):
    with pytest.raises(KeyError), san.rows(pool, 0), san.rows(pool, 1):
        raise KeyError
    assert sanitizer._tracker.thread.rows == ()


@pytest.mark.parametrize(
    ("rows", "error", "part"),
    [
        (8, ArgumentValueError, "rows: `rows` got 8 (int); expected a row in [-8, 8)"),
        ([-9], ArgumentValueError, "expected a row in [-8, 8)"),
        (1.5, ArgumentTypeError, "expected an int, a slice, or ints"),
        (None, ArgumentTypeError, "expected an int, a slice, or ints"),
        ("ab", ArgumentTypeError, "expected an int, a slice, or ints"),
        ([1.5], ArgumentTypeError, "expected an int, a slice, or ints"),
        (torch.zeros(2), ArgumentTypeError, "expected an integer tensor"),
        (torch.zeros(2, 2, dtype=torch.int32), ArgumentTypeError, "at most one dimension"),
        (torch.zeros(8, dtype=torch.bool), ArgumentTypeError, "expected an integer tensor"),
    ],
)
def test_rows_that_make_no_sense(sanitizer, pool, rows, error, part):
    with pytest.raises(error) as caught, san.rows(pool, rows):
        pass
    assert part in str(caught.value)


def test_rows_of_what_is_no_tensor(sanitizer):
    with pytest.raises(ArgumentTypeError, match=r"rows: `tensor` got 5 \(int\)"), san.rows(5, [1]):
        pass


@pytest.mark.parametrize("value", [[None], [np.zeros(3)], torch.zeros(3), 5])
@pytest.mark.parametrize("parameter", ["reads", "writes"])
def test_a_kernel_of_what_is_no_tensor(sanitizer, parameter, value):
    with pytest.raises(ArgumentTypeError, match=f"kernel: `{parameter}` got"):
        san.kernel("k", **{parameter: value})


def test_without_a_sanitizer_annotations_do_nothing(hw):
    pool = torch.zeros(2, 2)

    @san.annotate(reads=["x"])
    def launch(x):
        return x

    with san.rows(pool, 17), san.attach_thread():
        san.kernel("k", reads=[pool])
        san.name(hw.current_stream(), "main")
    assert launch(3) == 3


def test_a_kernel_in_words(hw, sanitizer, streams, pool):
    _, side = streams
    san.kernel("gather_rows", reads=[pool[:4]])
    with hw.stream_context(side):
        san.kernel("scatter_rows", writes=[pool[3:]])
    (race,) = sanitizer.take()
    assert race.kind == "write after read"
    assert (race.current.op, race.previous.op) == ("scatter_rows", "gather_rows")
    hw.synchronize()


def test_rows_narrow_a_kernel(hw, sanitizer, streams, pool):
    _, side = streams
    with san.rows(pool, [0, 1]):
        san.kernel("gather_rows", reads=[pool])
    with hw.stream_context(side), san.rows(pool, 2):
        san.kernel("scatter_rows", writes=[pool])
    assert sanitizer.take() == []
    hw.synchronize()


def test_an_annotated_launcher(hw, sanitizer, streams, pool, zeros):
    @san.annotate(reads=("sources", "mask"), writes=("out",))
    def fused(sources, out, mask=None, scale=1.0):
        """Launch."""
        return scale

    _, side = streams
    sources = [zeros(4), zeros(4)]
    assert fused(sources, pool, scale=2.0) == 2.0
    assert (fused.__name__, fused.__doc__) == ("fused", "Launch.")
    with hw.stream_context(side):
        sources[1].fill_(1)
        pool.sum()
    found = sanitizer.take()
    assert [race.kind for race in found] == ["write after read", "read after write"]
    assert {race.previous.op for race in found} == {"fused"}
    hw.synchronize()


def test_an_annotated_parameters_default_counts(hw, sanitizer, streams, pool):
    @san.annotate(writes=["out"])
    def fill(out=pool): ...

    fill()
    with hw.stream_context(streams[1]):
        pool.fill_(1)
    assert [race.previous.op for race in sanitizer.take()] == ["fill"]
    hw.synchronize()


def test_a_partial_may_be_annotated(hw, sanitizer, streams, pool):
    def scaled(out, scale): ...

    launch = san.annotate(writes=["out"])(functools.partial(scaled, scale=2.0))
    launch(pool)
    with hw.stream_context(streams[1]):
        pool.fill_(1)
    assert [race.previous.op for race in sanitizer.take()] == ["scaled"]
    hw.synchronize()


def test_an_annotation_that_names_no_parameter():
    with pytest.raises(ArgumentValueError) as caught:

        @san.annotate(writes=["output"])
        def fused(out): ...

    assert "annotate(fused): `reads` or `writes` got 'output' (str)" in str(caught.value)
    assert "a parameter of the function (out)" in str(caught.value)


def test_the_host_through_an_array(hw, sanitizer, pool):
    block = hw.pin_memory(torch.zeros(8, 4))
    array = block.numpy()
    pool.copy_(block, non_blocking=True)
    array[:] = 1
    san.kernel("fill the array", writes=[block], host=True)
    (race,) = sanitizer.take()
    assert (race.kind, race.current.op) == ("host write before copy", "fill the array")
    hw.synchronize()
