"""Static buffers: shapes by bucket, one memory for all, padding that stays clean."""

from __future__ import annotations

import itertools

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.graphs import BATCH, TOKENS, TOKENS_PER_REQUEST, GraphBuffers, Slot

from ._steps import SLOTS, inputs, lens, runner_of


@pytest.fixture
def buffers(hw):
    return GraphBuffers(SLOTS, [(2, 1), (8, 1), (4, 3)], hw)


def write(buffers, bucket, batch_size, seed=0):
    given = inputs(batch_size, bucket[1], buffers.device, seed)
    rows = buffers.rows(bucket, batch_size)
    buffers.write(rows, buffers.check(rows, given))
    return given


def test_a_slot_has_the_shape_of_its_bucket(buffers):
    shapes = {name: tuple(view.shape) for name, view in buffers.views((4, 3)).items()}
    assert shapes == {
        "input_ids": (12,),
        "rows": (4,),
        "mrope_positions": (3, 12),
        "scores": (4, 3),
    }
    assert all(view.is_contiguous() for view in buffers.views((2, 1)).values())
    assert {name: view.dtype for name, view in buffers.views((2, 1)).items()} == {
        name: slot.dtype for name, slot in SLOTS.items()
    }


def test_all_buckets_share_the_memory_of_the_largest(buffers, hw):
    for name in SLOTS:
        starts = {buffers.views(bucket)[name].data_ptr() for bucket in buffers.buckets}
        assert len(starts) == 1
    alone = GraphBuffers(SLOTS, [(4, 3)], hw)
    assert buffers.memory.numel() == alone.memory.numel()


def test_buckets_are_ordered_largest_first(buffers):
    assert buffers.buckets == ((4, 3), (8, 1), (2, 1))


def test_slots_do_not_overlap_and_are_aligned(buffers):
    views = buffers.views((4, 3)).values()
    spans = sorted((v.data_ptr(), v.data_ptr() + v.numel() * v.itemsize) for v in views)
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start
    assert all((start - buffers.memory.data_ptr()) % 256 == 0 for start, _ in spans)


def test_every_slot_begins_as_padding(buffers):
    for bucket in [(2, 1), (8, 1)]:
        fresh = GraphBuffers(SLOTS, [bucket], None, buffers.device)
        for name, view in fresh.views(bucket).items():
            assert (view.cpu() == SLOTS[name].fill).all()


@pytest.mark.parametrize("sizes", [(8, 5, 6, 3, 0, 8, 1), (0, 8, 7), (2, 2, 1)])
def test_padding_holds_its_fill_whatever_came_before(buffers, sizes):
    for seed, size in enumerate(sizes):
        # Between two batches of one bucket another bucket leaves its values in the same memory.
        for bucket in [(8, 1), (4, 3)][: 1 + seed % 2]:
            batch_size = min(size, bucket[0])
            given = write(buffers, bucket, batch_size, seed)
            for name, view in buffers.views(bucket).items():
                slot = SLOTS[name]
                count = slot.shape_for(batch_size, bucket[1])[slot.axis]
                real = view.cpu().narrow(slot.axis, 0, count)
                padded = view.cpu().narrow(slot.axis, count, view.shape[slot.axis] - count)
                assert torch.equal(real, given[name].cpu())
                assert (padded == slot.fill).all()


def test_padding_that_is_clean_is_not_written_again(buffers):
    write(buffers, (8, 1), 3)
    views = buffers.views((8, 1))
    for view in views.values():
        view.fill_(55)  # where it stays, nothing was written
    write(buffers, (8, 1), 4)
    assert views["rows"].tolist() == [1, 2, 3, 4, 55, 55, 55, 55]
    buffers.spoil()
    write(buffers, (8, 1), 4)
    assert views["rows"].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]


@pytest.mark.parametrize("left_out", list(SLOTS))
def test_a_slot_that_is_left_out_keeps_its_contents(buffers, left_out):
    before = write(buffers, (8, 1), 8, seed=1)[left_out].cpu()
    given = inputs(8, 1, buffers.device, seed=2)
    del given[left_out]
    rows = buffers.rows((8, 1), 8)
    buffers.write(rows, buffers.check(rows, given))
    for name, view in buffers.views((8, 1)).items():
        assert torch.equal(view.cpu(), before if name == left_out else given[name].cpu())


def test_a_slot_of_every_dtype_holds_what_it_is_given(hw):
    dtypes = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.bfloat16, torch.float64]
    slots = {f"x{n}": Slot(dtype, (BATCH,), fill=1) for n, dtype in enumerate(dtypes)}
    buffers = GraphBuffers(slots, [(4, 1)], hw)
    given = {
        f"x{n}": torch.tensor([0, 1, 0], device=hw.device()).to(dtype)
        for n, dtype in enumerate(dtypes)
    }
    rows = buffers.rows((4, 1), 3)
    buffers.write(rows, buffers.check(rows, given))
    for view in buffers.views((4, 1)).values():
        assert view.to(torch.int64).tolist() == [0, 1, 0, 1]


def test_buffers_made_in_inference_mode_are_written_outside_of_it(hw):
    with torch.inference_mode():
        buffers = GraphBuffers(SLOTS, [(2, 1)], hw)
        write(buffers, (2, 1), 1)
    given = write(buffers, (2, 1), 2)
    assert torch.equal(buffers.views((2, 1))["rows"].cpu(), given["rows"].cpu())


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "part"),
    [
        ({"dtype": "int64", "shape": (BATCH,)}, ArgumentTypeError, "`dtype` got 'int64'"),
        ({"dtype": torch.int64, "shape": BATCH}, ArgumentTypeError, "`shape` got BATCH"),
        ({"dtype": torch.int64, "shape": (3,)}, ArgumentValueError, "exactly one of them"),
        ({"dtype": torch.int64, "shape": (BATCH, TOKENS)}, ArgumentValueError, "exactly one"),
        ({"dtype": torch.int64, "shape": (TOKENS_PER_REQUEST,)}, ArgumentValueError, "BATCH"),
        ({"dtype": torch.int64, "shape": (BATCH, 0)}, ArgumentValueError, "sizes ≥ 1"),
        ({"dtype": torch.int64, "shape": (BATCH, True)}, ArgumentValueError, "sizes ≥ 1"),
        ({"dtype": torch.int64, "shape": (BATCH,), "fill": "0"}, ArgumentTypeError, "`fill`"),
        ({"dtype": torch.int8, "shape": (BATCH,), "fill": 300}, ArgumentValueError, "torch.int8"),
        ({"dtype": torch.int64, "shape": (BATCH,), "fill": 0.5}, ArgumentValueError, "int64"),
        ({"dtype": torch.int64, "shape": (BATCH,), "fill": 2**70}, ArgumentValueError, "int64"),
        ({"dtype": torch.bool, "shape": (BATCH,), "fill": 2}, ArgumentValueError, "torch.bool"),
    ],
)
def test_a_malformed_slot_is_refused(arguments, kind, part):
    with pytest.raises(kind, match=r"^Slot: ") as caught:
        Slot(**arguments)
    assert part in str(caught.value)


X = Slot(torch.int8, (BATCH,))


@pytest.mark.parametrize(
    ("slots", "buckets", "kind", "part"),
    [
        ({}, [(1, 1)], ArgumentValueError, "at least one Slot"),
        ([X], [(1, 1)], ArgumentTypeError, "`slots`"),
        ({"x": 3}, [(1, 1)], ArgumentTypeError, "`slots`"),
        ({"x y": X}, [(1, 1)], ArgumentValueError, "an identifier"),
        ({"x": X}, [], ArgumentValueError, "at least one bucket"),
        ({"x": X}, [(1, 1), (1, 1)], ArgumentValueError, "each once"),
        ({"x": X}, [(0, 1)], ArgumentValueError, "`buckets` got (0, 1)"),
        ({"x": X}, [4], ArgumentValueError, "`buckets` got 4"),
    ],
)
def test_malformed_slots_and_buckets_are_refused(hw, slots, buckets, kind, part):
    with pytest.raises(kind, match=r"^GraphBuffers: ") as caught:
        GraphBuffers(slots, buckets, hw)
    assert part in str(caught.value)


def test_an_unknown_bucket_and_a_batch_beyond_it_are_refused(buffers):
    with pytest.raises(ArgumentValueError, match=r"got \(3, 1\).*one of \(4, 3\), \(8, 1\)"):
        buffers.views((3, 1))
    for size in (9, -1):
        with pytest.raises(ArgumentValueError, match=rf"got {size} \(int\).*\[0, 8\]"):
            buffers.rows((8, 1), size)


def broken(given, device):
    """Inputs of 3 requests, each wrong in one way: change, error, words of its message."""
    other = torch.zeros(3, dtype=torch.int64, device="meta")
    return {
        "dtype": ({"rows": given["rows"].to(torch.int32)}, ArgumentTypeError, "torch.int64"),
        "shape": ({"rows": given["rows"][:2]}, ArgumentValueError, "[3] for this batch"),
        "padded": ({"rows": torch.zeros(8, dtype=torch.int64)}, ArgumentValueError, "[3]"),
        "dims": ({"scores": given["scores"].view(3)}, ArgumentValueError, "[3, 1]"),
        "device": ({"rows": other}, ArgumentTypeError, f"a tensor on {device} or on the host"),
        "no tensor": ({"rows": [1, 2, 3]}, ArgumentTypeError, "a tensor"),
        "none": ({"rows": None}, ArgumentTypeError, "a tensor"),
        "unknown": ({"row": given["rows"]}, ArgumentValueError, "input_ids"),
    }


@pytest.mark.parametrize("case", list(broken(inputs(3), "cpu")))
def test_a_drifted_input_is_refused_before_anything_is_written(buffers, case):
    write(buffers, (8, 1), 5, seed=1)
    before = buffers.memory.clone()
    given = inputs(3, 1, buffers.device)
    change, kind, part = broken(given, buffers.device)[case]
    with pytest.raises(kind) as caught:
        buffers.check(buffers.rows((8, 1), 3), given | change)
    assert f"GraphBuffers: input `{next(iter(change))}` got " in str(caught.value)
    assert part in str(caught.value)
    assert torch.equal(buffers.memory, before)


@pytest.mark.parametrize("inputs", [None, 3, [torch.zeros(1)]])
def test_inputs_that_are_no_mapping_are_refused(buffers, inputs):
    with pytest.raises(ArgumentTypeError, match=r"`inputs` got .* a mapping"):
        buffers.check(buffers.rows((8, 1), 1), inputs)


@pytest.mark.parametrize(
    "view",
    [
        lambda b: b.views((8, 1))["rows"][1:4],
        lambda b: b.views((8, 1))["input_ids"][:3],
        lambda b: b.views((8, 1))["rows"].as_strided((3,), (2,)),
        lambda b: b.memory[-24:].view(torch.int64),
    ],
    ids=["shifted", "another slot", "other strides", "the end"],
)
def test_an_input_that_overlaps_the_buffers_is_refused(buffers, view):
    given = inputs(3, 1, buffers.device) | {"rows": view(buffers)}
    with pytest.raises(ArgumentValueError, match=r"`rows` got 'a view of the static buffers'"):
        buffers.check(buffers.rows((8, 1), 3), given)


def test_an_input_that_is_the_slot_itself_is_in_place(buffers):
    rows = buffers.rows((8, 1), 3)
    given = inputs(3, 1, buffers.device) | {"rows": rows.real["rows"]}
    rows.real["rows"].copy_(torch.tensor([4, 5, 6], device=buffers.device))
    buffers.write(rows, buffers.check(rows, given))
    assert buffers.views((8, 1))["rows"].tolist() == [4, 5, 6, 0, 0, 0, 0, 0]
    assert torch.equal(buffers.rows((8, 1), 3).real["scores"].cpu(), given["scores"].cpu())


# --- Ways an input may come -----------------------------------------------------------------------


def strided(tensor):
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1] = tensor
    return wide[..., 1]


FORMS = {
    "on the device": lambda hw, t: t,
    "on the host": lambda hw, t: t.cpu(),
    "pinned": lambda hw, t: hw.pin_memory(t.cpu()),
    "strided": lambda hw, t: strided(t),
    "strided on the host": lambda hw, t: strided(t.cpu()),
    "expanded": lambda hw, t: t.flatten()[0].expand(t.shape),
    "of inference mode": lambda hw, t: cloned_in_inference_mode(t),
}


def cloned_in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("which", ["rows", "mrope_positions", "all"])
def test_an_input_may_come_in_any_form(hw, buffers, form, which):
    given = inputs(5, 1, buffers.device)
    for name in given:
        if which in (name, "all"):
            given[name] = form(hw, given[name])
    rows = buffers.rows((8, 1), 5)
    buffers.write(rows, buffers.check(rows, given))
    for name, real in rows.real.items():
        assert torch.equal(real.cpu(), given[name].cpu())


def test_an_input_that_autograd_tracks_leaves_no_trace_in_the_buffers(buffers):
    scores = torch.ones(3, 1, device=buffers.device, requires_grad=True)
    given = inputs(3, 1, buffers.device) | {"scores": scores}
    rows = buffers.rows((8, 1), 3)
    buffers.write(rows, buffers.check(rows, given))
    assert not rows.real["scores"].requires_grad
    assert rows.real["scores"].tolist() == [[1], [1], [1]]


def test_what_is_written_in_place_is_not_trusted_to_be_padding_later(hw):
    slots = {"x": Slot(torch.float32, (BATCH,), fill=100.0)}
    seen = torch.zeros(8, device=hw.device())
    with runner_of(hw, lambda x: seen.copy_(x) * 1, slots, [(8, 1)]) as runner:
        runner.run({"x": torch.ones(3, device=hw.device())}, lens(3))
        runner.buffers.real((8, 1), 6)["x"].fill_(55.0)
        runner.run({"x": torch.ones(4, device=hw.device())}, lens(4))  # two were aborted meanwhile
        assert seen.tolist() == [1] * 4 + [100] * 4


def test_what_is_written_in_place_is_not_copied(hw):
    slots = {"x": Slot(torch.float32, (BATCH,), fill=100.0)}
    with runner_of(hw, lambda x: x * 2, slots, [(8, 1)]) as runner:
        real = runner.buffers.real((8, 1), 3)
        real["x"].fill_(4.0)
        assert runner.run(real, lens(3)).tolist() == [8] * 3


def test_a_sparse_input_is_refused(hw):
    if hw.info.device_type != "cpu":
        pytest.skip("the device has no sparse tensors")
    slots = {"x": Slot(torch.float32, (BATCH,), fill=100.0)}
    with runner_of(hw, lambda x: x * 2, slots, [(8, 1)]) as runner:
        with pytest.raises(ArgumentTypeError, match=r"input `x` got torch.sparse_coo"):
            runner.run({"x": torch.ones(3).to_sparse()}, lens(3))
        assert runner.run({"x": torch.ones(3)}, lens(3)).tolist() == [2] * 3
