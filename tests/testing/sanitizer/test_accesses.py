"""What torch calls read and write: each is run on another stream than an unordered write."""

from __future__ import annotations

import collections
import copy

import pytest
import torch

from hwcore.testing.sanitizer.history import Histories, History

# (call on x [6, 8] and on o, another tensor; what it does to x)
NOTHING, READS, WRITES = "nothing", "reads", "writes"
CALLS = {
    # metadata
    "view": (lambda x, o: x.view(-1)[2:4].t().unsqueeze(0).expand(2, 2), NOTHING),
    "detach": (lambda x, o: x.detach(), NOTHING),
    "shape": (lambda x, o: (x.shape, x.stride(), x.numel(), x.is_contiguous()), NOTHING),
    "split": (lambda x, o: x.split(2) + x.unbind(1) + x.chunk(2), NOTHING),
    "zeros_like": (lambda x, o: torch.zeros_like(x), NOTHING),
    "rand_like": (lambda x, o: torch.rand_like(x), NOTHING),
    "new_ones": (lambda x, o: x.new_ones(3), NOTHING),
    "empty_like": (lambda x, o: torch.empty_like(x), NOTHING),
    "in-place view": (lambda x, o: x.detach().t_().unsqueeze_(0), NOTHING),
    "set_": (lambda x, o: torch.empty(0, device=x.device).set_(x), NOTHING),
    "reshape of a view": (lambda x, o: x.reshape(-1).reshape(8, 6), NOTHING),
    "numel of nothing": (lambda x, o: x[:0] + 1, NOTHING),
    # reads
    "add": (lambda x, o: x + 1, READS),
    "clone": (lambda x, o: x.clone(), READS),
    "contiguous": (lambda x, o: x.t().contiguous(), READS),
    "reshape that copies": (lambda x, o: x.t().reshape(-1), READS),
    "to another dtype": (lambda x, o: x.to(torch.float64), READS),
    "cat": (lambda x, o: torch.cat([o, x]), READS),
    "sum of one element": (lambda x, o: x[5, 7:].sum(), READS),
    "matmul": (lambda x, o: o @ x.t(), READS),
    "linear": (lambda x, o: torch.nn.functional.linear(o, x), READS),
    "add_ of it": (lambda x, o: o.add_(x), READS),
    "copy_ from it": (lambda x, o: o.copy_(x), READS),
    "out= elsewhere": (lambda x, o: torch.add(x, 1, out=o), READS),
    "foreach of it": (lambda x, o: torch._foreach_add([o, x], 1), READS),
    "index": (lambda x, o: x[torch.zeros(2, dtype=torch.long, device=x.device)], READS),
    "gather": (lambda x, o: x.gather(0, torch.zeros_like(x, dtype=torch.long)), READS),
    "item": (lambda x, o: x[0, 0].item(), READS),
    "bool": (lambda x, o: bool(x[0, 0]), READS),
    "tolist": (lambda x, o: x.tolist(), READS),
    "cpu": (lambda x, o: x.cpu(), READS),
    "nonzero": (lambda x, o: x.nonzero(), READS),
    "equal": (lambda x, o: torch.equal(x, o), READS),
    "deepcopy": (lambda x, o: copy.deepcopy(x), READS),
    "topk": (lambda x, o: x.topk(2), READS),
    "keyword arguments": (lambda x, o: torch.add(input=o, other=x), READS),
    # writes
    "add_": (lambda x, o: x.add_(1), WRITES),
    "setitem": (lambda x, o: x.__setitem__((5, 7), 3), WRITES),
    "copy_": (lambda x, o: x.copy_(o), WRITES),
    "fill_ of a view": (lambda x, o: x[5:].fill_(1), WRITES),
    "out=": (lambda x, o: torch.add(o, 1, out=x), WRITES),
    "index_put_": (
        lambda x, o: x.index_put_((torch.zeros(1, dtype=torch.long, device=x.device),), o[:1]),
        WRITES,
    ),
    "scatter_": (lambda x, o: x.scatter_(0, torch.zeros_like(x, dtype=torch.long), o), WRITES),
    "foreach in place": (lambda x, o: torch._foreach_add_([o, x], 1), WRITES),
    "batch_norm's statistics": (
        lambda x, o: torch.nn.functional.batch_norm(o, x[0], o[1], training=True),
        WRITES,
    ),
    "random_": (lambda x, o: x.random_(), WRITES),
    "resize_ that moves": (lambda x, o: x.resize_(100, 100), WRITES),
    "resize_ that stays": (lambda x, o: x.resize_(8, 6), NOTHING),
}


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call(hw, sanitizer, streams, name, inference):
    _, side = streams
    call, does = CALLS[name]
    kept = []
    for first, expected in (
        ("reads", {NOTHING: [], READS: [], WRITES: ["write after read"]}),
        (
            "writes",
            {NOTHING: [], READS: ["read after write"], WRITES: ["write after write"]},
        ),
    ):
        x, o = (torch.zeros(6, 8, device=hw.device()) for _ in range(2))
        hw.synchronize()
        if first == "reads":
            kept.append(x * 2)
        else:
            x.mul_(2)
        with hw.stream_context(side), torch.inference_mode(inference):
            kept.append(call(x, o))
        assert [race.kind for race in sanitizer.take()] == expected[does], first
        hw.synchronize()


def test_an_op_that_failed_touched_nothing(hw, sanitizer, streams, zeros):
    _, side = streams
    x = zeros(8)
    x.add_(1)
    with hw.stream_context(side), pytest.raises(RuntimeError):
        x.add_(torch.zeros(3, device=hw.device()))
    assert sanitizer.take() == []
    hw.synchronize()


@pytest.mark.parametrize(
    ("ours", "theirs", "race"),
    [
        (lambda x: x[:, 0], lambda x: x[:, 1], False),
        (lambda x: x.view(-1)[::2], lambda x: x.view(-1)[1::2], False),
        (lambda x: x[:3], lambda x: x[3:], False),
        (lambda x: x[:3], lambda x: x[2:], True),
        (lambda x: x[:, 0], lambda x: x[3], True),
    ],
)
def test_what_lies_beside_is_no_race(hw, sanitizer, streams, zeros, ours, theirs, race):
    _, side = streams
    x = zeros(6, 8)
    ours(x).fill_(1)
    with hw.stream_context(side):
        theirs(x).fill_(2)
    assert bool(sanitizer.take()) is race
    hw.synchronize()


def test_a_new_tensor_was_written_by_what_made_it(hw, sanitizer, streams):
    _, side = streams
    made = torch.ones(8, device=hw.device())
    with hw.stream_context(side):
        y = made * 2
    (race,) = sanitizer.take()
    assert (race.previous.op, race.previous.write) == ("aten::ones", True)
    hw.synchronize()
    del y


def test_an_uninitialised_tensor_was_written_by_nobody(hw, sanitizer, streams):
    main, side = streams
    made = torch.empty(8, device=hw.device())
    with hw.stream_context(side):
        made.fill_(1)
    assert sanitizer.take() == []
    hw.wait_stream(main, side)
    del made


def test_an_address_that_is_used_again_brings_no_history_along():
    class Storage:
        _cdata = 1234

        def nbytes(self):
            return 8

    histories = Histories(collections.deque())
    old, new = Storage(), Storage()
    histories.enter(old, History(torch.zeros(2), None, "", ()))
    assert histories.find(old) is not None
    assert histories.find(new) is None
    mine = History(torch.zeros(2), None, "", ())
    histories.enter(new, mine)
    del old
    histories.remove(histories.freed.popleft())
    assert histories.find(new) is mine
