"""Graphs: each replay updates host lengths, in order; a capture that fails leaves nothing."""

import contextlib
import gc

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hwcore.errors import ArgumentValueError, CaptureError
from hwcore.graphs import BATCH, GraphRunner, Slot
from hwcore.types import ReplayBatch

ops = torch.ops.npu


def paged(out, lengths):
    ops._npu_paged_attention(out, 1, 2, 3, 4, 5, 6, lengths)


def latent(out, lengths):
    ops.npu_multi_head_latent_attention(out, 1, 2, 3, 4, lengths)


def fused(out, lengths):
    ops.npu_fused_infer_attention_score(out, actual_seq_lengths_kv=lengths.tolist())


def fused_v2(out, lengths):
    ops.npu_fused_infer_attention_score_v2(out, actual_seq_kvlen=lengths.tolist())


def attention(operator, lengths):
    """Return what an operator makes of lengths: the lengths."""
    out = torch.zeros(len(lengths), dtype=torch.int64, device="npu")
    operator(out, lengths)
    return out


def captured(hw, *operators, size=2):
    graph = hw.create_graph()
    lengths = torch.zeros(size, dtype=torch.int64)
    out = hw.graph_capture(
        graph, lambda: torch.stack([attention(each, lengths) for each in operators])
    )
    return graph, out


def batch(*lens, size=2, tokens=1, attention=""):
    return ReplayBatch((size, tokens), lens, lens + (1,) * (size - len(lens)), attention)


@pytest.fixture(params=["lazy", "eager", "random:1", "random:2", "random:3"])
def in_any_order(request, hw):
    from hwcore_sim import device

    with device.drain_policy(request.param):
        yield


@pytest.fixture
def late(hw):
    from hwcore_sim import device

    with device.drain_policy("lazy"):
        yield


# --- Lengths --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order")
@pytest.mark.parametrize("operator", [paged, latent, fused, fused_v2])
def test_each_operator_gets_its_lengths_by_its_own_key(hw, operator):
    graph, out = captured(hw, operator)
    for lens in ((5, 7), (50, 70)):
        hw.graph_replay(graph, {}, batch(*lens))
        assert out.tolist() == [[lens[0] + 1, lens[1] + 1]]


def test_padding_has_lengths_and_the_steps_own_tokens_count(hw):
    graph, out = captured(hw, fused, size=4)
    hw.graph_replay(graph, {}, batch(5, 7, size=4, tokens=3))
    assert out.tolist() == [[8, 10, 4, 4]]


def test_a_graph_of_several_layers_and_operators_is_updated_at_each(hw):
    graph, out = captured(hw, paged, fused, paged, fused_v2)
    hw.graph_replay(graph, {}, batch(5, 7))
    assert out.tolist() == [[6, 8]] * 4


@pytest.mark.parametrize("kind", ["mla", "mha", "decode", ""])
def test_fused_attention_is_for_any_kind(hw, kind):
    graph, out = captured(hw, fused)
    hw.graph_replay(graph, {}, batch(5, 7, attention=kind))
    assert out.tolist() == [[6, 8]]


@pytest.mark.usefixtures("in_any_order")
def test_replays_that_queue_up_keep_their_own_lengths(hw):
    graph, out = captured(hw, paged)
    seen = []
    for number in range(3):
        hw.graph_replay(graph, {}, batch(number, 10 * number))
        seen.append(out.clone())
    assert [each.tolist()[0] for each in seen] == [[1, 1], [2, 11], [3, 21]]


@pytest.mark.usefixtures("in_any_order")
def test_replays_on_two_streams_keep_their_own_lengths(hw):
    graph, out = captured(hw, paged)
    first, second = hw.create_stream(), hw.create_stream()
    seen = []
    for stream, lens in ((first, (1, 2)), (second, (3, 4))):
        hw.wait_stream(stream, first)
        with hw.stream_context(stream):
            hw.graph_replay(graph, {}, batch(*lens))
            seen.append(out.clone())
    hw.synchronize()
    assert [each.tolist()[0] for each in seen] == [[2, 3], [4, 5]]


def test_a_graph_without_lengths_needs_no_batch(hw):
    x = torch.ones(2, device="npu")
    graph = hw.create_graph()
    out = hw.graph_capture(graph, lambda: x + 1)
    hw.graph_replay(graph)
    hw.graph_replay(graph, {}, batch(5, 7, attention="mla"))
    assert out.tolist() == [2.0, 2.0]


def test_lengths_on_the_device_are_the_engines_to_write_and_the_operator_still_gets_its_update(hw):
    """Without an update of nothing the device would wait: so does the faked graph insist."""
    lengths = torch.tensor([3, 4], device="npu")
    graph = hw.create_graph()
    out = hw.graph_capture(graph, lambda: attention(paged, lengths))
    lengths.fill_(9)
    hw.graph_replay(graph, {}, batch(5, 7))
    assert out.tolist() == [9, 9]


def test_graph_runner_updates_them_for_each_bucket(hw):
    def step(tokens):
        return {"seen": attention(paged, torch.zeros(len(tokens), dtype=torch.int64)) + tokens}

    runner = GraphRunner(
        step, {"tokens": Slot(torch.int64, (BATCH,))}, [(1, 1), (4, 1)], backend=hw
    )
    runner.capture()
    for lens in ((5,), (6, 7, 8), (9,)):
        tokens = torch.full((len(lens),), 100, device="npu")
        prepared = runner.prepare({"tokens": tokens}, lens)
        assert runner.replay(prepared)["seen"].tolist() == [length + 101 for length in lens]
    runner.close()


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_lengths_is_refused_and_both_are_named(hw, size):
    graph, out = captured(hw, paged)
    lens = tuple(range(5, 5 + size))
    with pytest.raises(ArgumentValueError) as caught:
        hw.graph_replay(graph, {}, batch(*lens, size=size))
    assert str(caught.value) == (
        f"npu: graph_replay: len(batch.padded_seq_lens) got {size} (int); expected 2 lengths, as "
        f"`_npu_paged_attention` was captured with. Replay the graph of the batch's bucket."
    )
    hw.graph_replay(graph, {}, batch(5, 7))
    assert out.tolist() == [[6, 8]]


@pytest.mark.parametrize(
    ("operator", "kind", "name"),
    [
        (paged, "mla", "_npu_paged_attention"),
        (latent, "mha", "npu_multi_head_latent_attention"),
        (latent, "gqa", "npu_multi_head_latent_attention"),
    ],
)
def test_a_batch_of_another_attention_kind_is_refused(hw, operator, kind, name):
    graph, _ = captured(hw, operator)
    with pytest.raises(ArgumentValueError, match=f"attention` got '{kind}'.*a kind of `{name}`"):
        hw.graph_replay(graph, {}, batch(5, 7, attention=kind))


def test_a_graph_with_lengths_is_not_replayed_without_a_batch(hw):
    graph, _ = captured(hw, paged)
    with pytest.raises(ArgumentValueError, match="`batch` got None"):
        hw.graph_replay(graph)


def test_an_operator_whose_lengths_nobody_knows_is_refused_at_capture(hw):
    graph = hw.create_graph()
    with pytest.raises(CaptureError, match=r"npu_fusion_attention_v3.*Leave it out of graphs"):
        hw.graph_capture(
            graph, lambda: ops.npu_fusion_attention_v3(torch.zeros(1), actual_seq_kvlen=[1])
        )
    assert hw.graph_capture(graph, lambda: "again") == "again", "and the graph is empty"


def test_what_was_recomputed_needs_its_buffer(hw):
    x = torch.ones(2, device="npu")
    graph = hw.create_graph()
    hw.graph_capture(graph, lambda: x + 1)
    again = ReplayBatch((1, 1), (5,), (5,), plan_stream_active=True, recomputed={"y": x})
    with pytest.raises(ArgumentValueError, match=r"`buffers` got \['x'\].*`y` among them"):
        hw.graph_replay(graph, {"x": x}, again)


def test_an_empty_graph_is_not_replayed_and_a_captured_one_not_captured(hw):
    graph = hw.create_graph()
    with pytest.raises(CaptureError, match="Call capture"):
        hw.graph_replay(graph)
    hw.graph_capture(graph, lambda: None)
    with pytest.raises(CaptureError, match="Make a new Graph"):
        hw.graph_capture(graph, lambda: None)


# --- Captures that fail ---------------------------------------------------------------------------


def fail():
    torch.ones(2, device="npu").add_(1)
    raise KeyError


def read_on_the_host():
    return torch.ones(2, device="npu").sum().item()


@contextlib.contextmanager
def cannot(method, monkeypatch):
    """A device on which a capture cannot begin, or end."""
    import fake_torch_npu

    def refuse(self, *args, **kwargs):
        if method == "capture_end":
            real(self)
        raise RuntimeError

    real = getattr(fake_torch_npu.NPUGraph, method)
    with monkeypatch.context() as patch:
        patch.setattr(fake_torch_npu.NPUGraph, method, refuse)
        yield


@pytest.mark.parametrize("on_side", [False, True], ids=["main", "side"])
@pytest.mark.parametrize(
    ("broken", "fn", "error"),
    [
        (None, fail, KeyError),
        (None, read_on_the_host, Exception),
        ("capture_begin", fail, RuntimeError),
        ("capture_end", lambda: None, RuntimeError),
        ("capture_end", fail, KeyError),  # the first of the two
    ],
)
def test_after_a_capture_that_fails_all_is_as_before(hw, monkeypatch, broken, fn, error, on_side):
    from hwcore_sim import device

    gc.collect()  # of graphs of earlier tests, which hold streams
    graph, stream = hw.create_graph(), hw.create_stream()
    with hw.stream_context(hw.create_stream()) if on_side else contextlib.nullcontext():
        before, left = hw.current_stream(), device.streams_left()
        device_at_fault = cannot(broken, monkeypatch) if broken else contextlib.nullcontext()
        with device_at_fault, pytest.raises(error) as caught:
            hw.graph_capture(graph, fn, None, stream)
        assert hw.current_stream() == before
        assert not hw.is_capturing()
        assert _get_current_dispatch_mode_stack() == []
        assert caught.traceback  # which holds the graph; and the graph holds nothing:
        assert device.streams_left() == left
        x = torch.ones(2, device="npu")
        out = hw.graph_capture(graph, lambda: x + 1, None, stream)
        hw.graph_replay(graph)
        assert out.tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("late")
def test_a_runner_names_the_bucket_and_can_capture_again(hw):
    wrong = [True]

    def step(tokens):
        if hw.is_capturing() and wrong and len(tokens) == 1:
            wrong.pop()
            raise KeyError
        return tokens + 1

    runner = GraphRunner(
        step, {"tokens": Slot(torch.int64, (BATCH,))}, [(1, 1), (4, 1)], backend=hw
    )
    with pytest.raises(CaptureError, match=r"bucket \(1, 1\) got KeyError"):
        runner.capture()
    runner.capture()
    tokens = torch.tensor([1, 2, 3], device="npu")
    assert runner.run({"tokens": tokens}, (1, 1, 1)).tolist() == [2, 3, 4]
    runner.close()


def test_more_graphs_than_there_are_capture_streams_are_refused_before_the_first(hw, monkeypatch):
    monkeypatch.delenv("HWCORE_CAPTURE_BUDGET", raising=False)
    buckets = [(size, 1) for size in range(1, 1900)]
    slots = {"tokens": Slot(torch.int64, (BATCH,))}
    runner = GraphRunner(lambda tokens: tokens + 1, slots, buckets, backend=hw)
    with pytest.raises(CaptureError, match="at most 1800"):
        runner.capture()
    runner.close()
