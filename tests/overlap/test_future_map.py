"""What is stashed for a row is what the next step resolves there."""

import logging

import pytest
import torch

from hwcore.overlap import FutureMap, RelayPayload, RelaySpec

from ._payloads import expected, payload, values
from .conftest import SIZES

pytestmark = pytest.mark.usefixtures("in_any_order")


@pytest.fixture(params=[False, True], ids=["plain", "debug"])
def relay(request, relay_of):
    return relay_of(request.param, **SIZES)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_value_comes_back_at_its_row(relay, rows, dtype):
    relay.stash(rows(7, 3, 5, dtype=dtype), payload(relay.spec, [70, 30, 50], relay.device))
    got = relay.resolve(rows(3, 7, dtype=dtype))
    assert values(got) == expected(relay.spec, [30, 70])
    assert got.next_token.dtype == torch.int64
    assert got.hidden_states.dtype == torch.bfloat16


def test_a_map_without_speculation_holds_tokens_alone(relay_of, rows):
    relay = relay_of()
    relay.stash(rows(1, 2), RelayPayload(next_token=rows(10, 20)))
    got = relay.resolve(rows(2, 1))
    assert got.next_token.tolist() == [20, 10]
    assert got.topk_p is got.topk_index is got.hidden_states is got.draft_probs is None


def test_what_is_not_held_costs_no_memory(relay_of):
    tokens_alone, with_hidden = relay_of(), relay_of(hidden_size=512)
    lens = 13 + 3 + 12  # of the rows; and on their way to the host, with a note
    assert tokens_alone.nbytes == (13 + 2 * 12) * 16 + lens * 8  # rows of 16 bytes
    assert with_hidden.nbytes - tokens_alone.nbytes == (13 + 2 * 12) * 1024


def test_the_longest_batch_sizes_the_outputs(hw):
    spec = RelaySpec(pool_size=100, max_batch_size=4)
    with FutureMap(spec, backend=hw, debug=False) as relay:
        assert relay.nbytes == (101 + 2 * 4) * 16 + (101 + 3 + 4) * 8


def test_padding_reads_as_zeros_and_what_is_written_to_it_is_dropped(relay, rows):
    relay.stash(rows(4, 0, 0), payload(relay.spec, [40, -1, -7], relay.device))
    relay.publish(rows(4, 0, 0), rows(9, -1, -1))
    assert values(relay.resolve(rows(0, 4, 0))) == expected(relay.spec, [None, 40, None])
    assert relay.resolve_seq_lens(rows(0, 4, 0)).tolist() == [0, 9, 0]


@pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
def test_padding_may_be_longer_than_the_pool(hw, rows, debug):
    spec = RelaySpec(pool_size=2, max_batch_size=8)
    with FutureMap(spec, backend=hw, debug=debug) as relay:
        batch = rows(1, 0, 0, 0, 0, 0, 0, 0)
        relay.stash(batch, RelayPayload(batch * 5))
        relay.publish(batch, batch * 7)
        assert relay.resolve(batch).next_token.tolist() == [5, 0, 0, 0, 0, 0, 0, 0]
        assert relay.resolve_seq_lens(batch, to_cpu=True).tolist() == [7, 0, 0, 0, 0, 0, 0, 0]


def test_an_empty_batch_is_a_batch(relay, rows):
    relay.stash(rows(), payload(relay.spec, [], relay.device))
    relay.publish(rows(), rows())
    got = relay.resolve(rows())
    assert got.next_token.shape == (0,)
    assert got.hidden_states.shape == (0, 5)
    assert got.draft_probs.shape == (0, 2, 3)
    assert relay.resolve_seq_lens(rows()).shape == (0,)
    assert relay.resolve_seq_lens(rows(), to_cpu=True).shape == (0,)


def test_a_batch_may_be_the_whole_pool(relay, rows):
    whole = list(range(12))
    relay.stash(rows(*whole), payload(relay.spec, [10 * row for row in whole], relay.device))
    wanted = expected(relay.spec, [None, *(10 * row for row in whole[1:])])
    assert values(relay.resolve(rows(*whole))) == wanted


def test_payloads_need_not_be_contiguous(relay, rows):
    def spread(tensor):
        wide = tensor.unsqueeze(-1).repeat(*[1] * tensor.dim(), 2)
        return wide[..., 0] if tensor.dim() < 2 else tensor.mT.contiguous().mT

    given = payload(relay.spec, [70, 30], relay.device)
    fields = {name: spread(getattr(given, name)) for name in RelayPayload.__slots__}
    assert not any(value.is_contiguous() for value in fields.values())
    relay.stash(rows(7, 3), RelayPayload(**fields))
    assert values(relay.resolve(rows(7, 3))) == expected(relay.spec, [70, 30])


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool],
    ids=str,
)
def test_hidden_states_may_be_of_any_dtype(relay_of, rows, dtype):
    relay = relay_of(hidden_size=3, hidden_dtype=dtype)
    hidden = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype).to(relay.device)
    relay.stash(rows(1, 2), RelayPayload(rows(10, 20), hidden_states=hidden))
    got = relay.resolve(rows(2, 1)).hidden_states
    assert got.dtype == dtype
    assert got.cpu().float().tolist() == [[0, 1, 1], [1, 0, 1]]


def test_bits_are_kept_whatever_they_mean(relay_of, rows):
    relay = relay_of(hidden_size=4, hidden_dtype=torch.float32)
    bits = torch.tensor([[0x7FC00001, -0x80000000, 1, -4194303]], dtype=torch.int32)
    hidden = bits.view(torch.float32).to(relay.device)
    relay.stash(rows(1), RelayPayload(rows(10), hidden_states=hidden))
    got = relay.resolve(rows(1)).hidden_states
    assert torch.equal(got.cpu().view(torch.int32), bits)


def test_lengths_come_as_they_were_published_last(relay, rows):
    relay.publish(rows(3, 5), rows(30, 50))
    relay.publish(rows(5, 7), rows(51, 70, dtype=torch.int32))
    assert relay.resolve_seq_lens(rows(7, 5, 3)).tolist() == [70, 51, 30]
    on_host = relay.resolve_seq_lens(rows(3, 7, dtype=torch.int32), to_cpu=True)
    assert on_host.device.type == "cpu"
    assert on_host.dtype == torch.int64
    assert on_host.tolist() == [30, 70]


def test_lengths_on_the_host_are_the_callers_own(relay, rows):
    relay.publish(rows(3), rows(30))
    first = relay.resolve_seq_lens(rows(3), to_cpu=True)
    relay.publish(rows(3), rows(31))
    relay.resolve_seq_lens(rows(3), to_cpu=True)
    assert first.tolist() == [30]


def test_a_discarded_row_serves_another_request(relay, rows):
    relay.stash(rows(3, 4), payload(relay.spec, [30, 40], relay.device))
    relay.discard(rows(3, 0))
    relay.stash(rows(3), payload(relay.spec, [31], relay.device))
    assert values(relay.resolve(rows(3, 4))) == expected(relay.spec, [31, 40])
    if relay._watch is not None:
        relay.check()


# --- The memory that resolve returns --------------------------------------------------------------


def stash_and_resolve(relay, rows, number):
    relay.stash(rows(3), payload(relay.spec, [number], relay.device))
    return relay.resolve(rows(3))


def test_a_payload_is_whole_until_the_second_resolve_after_it(relay, rows):
    first = stash_and_resolve(relay, rows, 1)
    second = stash_and_resolve(relay, rows, 2)
    assert values(first) == expected(relay.spec, [1])
    assert values(second) == expected(relay.spec, [2])


def test_two_pieces_of_memory_are_all_that_a_loop_uses(relay, rows, caplog):
    seen = set()
    for number in range(6):
        got = stash_and_resolve(relay, rows, number)
        seen.add(got.next_token.data_ptr())
    assert len(seen) == 2
    assert not [text for text in caplog.messages if "still held" in text]


@pytest.mark.parametrize(
    "held",
    [
        lambda got: got,
        lambda got: got.next_token,
        lambda got: got.hidden_states[:, 1:3],
        lambda got: got.draft_probs.detach(),
    ],
    ids=["the payload", "a tensor", "a view of one", "an alias of one"],
)
def test_what_a_caller_still_holds_is_never_overwritten(relay, rows, held, caplog):
    caplog.set_level(logging.WARNING, "hwcore")
    kept = held(stash_and_resolve(relay, rows, 1))
    copied = kept.clone() if isinstance(kept, torch.Tensor) else None
    wanted = values(kept) if isinstance(kept, RelayPayload) else None
    for number in range(2, 8):
        assert values(stash_and_resolve(relay, rows, number)) == expected(relay.spec, [number])
    if copied is not None:
        assert torch.equal(kept, copied)
    if wanted is not None:
        assert wanted == expected(relay.spec, [1])
        assert values(kept) == wanted
    assert [text for text in caplog.messages if "still held" in text], "new memory is taken"


def test_that_new_memory_is_taken_is_said_once(relay, rows, caplog):
    kept = [stash_and_resolve(relay, rows, number) for number in range(6)]
    assert [values(one) for one in kept] == [expected(relay.spec, [n]) for n in range(6)]
    (told,) = [text for text in caplog.messages if "still held" in text]
    assert told.endswith("Drop payloads after their step, or copy.")


def test_what_was_dropped_is_used_again_whatever_its_size(relay, rows, caplog):
    caplog.set_level(logging.WARNING, "hwcore")
    for number in range(1, 8):
        count = 1 + number % 3
        numbers = [number * 10 + place for place in range(count)]
        batch = rows(*range(1, count + 1))
        relay.stash(batch, payload(relay.spec, numbers, relay.device))
        assert values(relay.resolve(batch)) == expected(relay.spec, numbers)
    assert not [text for text in caplog.messages if "still held" in text]


def test_inference_mode_makes_no_difference_to_those_who_are_not_in_it(hw, rows):
    with torch.inference_mode():
        relay = FutureMap(RelaySpec(12, topk=1), backend=hw, debug=True)
        held = []
        for number in range(4):
            relay.stash(rows(3), payload(relay.spec, [number], relay.device))
            held.append(relay.resolve(rows(3)))
    del held
    for number in range(4):
        relay.stash(rows(3), payload(relay.spec, [number], relay.device))
        got = relay.resolve(rows(3))
        assert values(got) == expected(relay.spec, [number])
        got.next_token.mul_(2)
        assert got.next_token.tolist() == [2 * number]
    relay.close()


def test_gradients_are_not_followed(relay_of, rows):
    relay = relay_of(hidden_size=2, hidden_dtype=torch.float32)
    hidden = torch.ones(1, 2, device=relay.device, requires_grad=True)
    relay.stash(rows(3), RelayPayload(rows(7), hidden_states=hidden * 3))
    got = relay.resolve(rows(3)).hidden_states
    assert not got.requires_grad
    assert got.tolist() == [[3, 3]]


# --- Use ------------------------------------------------------------------------------------------


def test_needs_names_what_the_caller_cannot_do_without(relay, rows):
    relay.stash(rows(3), payload(relay.spec, [1], relay.device))
    got = relay.resolve(rows(3), needs=("hidden_states", "topk_p"))
    assert got.hidden_states is not None


def test_a_map_says_what_it_is(relay_of):
    relay = relay_of()
    assert repr(relay) == f"<hwcore FutureMap of 12 rows on {relay.device}>"
    relay.close()
    assert "closed" in repr(relay)


def test_a_map_is_a_context_that_ends_it(hw):
    with FutureMap(RelaySpec(pool_size=3), backend=hw) as relay:
        pass
    relay.close()
    assert "closed" in repr(relay)


def test_an_error_in_the_block_is_not_hidden_by_the_end_of_the_map(hw):
    def program():
        with FutureMap(RelaySpec(pool_size=3), backend=hw) as relay:
            relay.close()
            raise KeyError

    with pytest.raises(KeyError):
        program()


def test_the_views_of_many_batch_sizes_are_not_all_kept(hw, monkeypatch, rows):
    monkeypatch.setattr("hwcore.overlap.outputs._MANY_SIZES", 2)
    with FutureMap(RelaySpec(pool_size=12), backend=hw, debug=False) as relay:
        for count in (1, 2, 3, 4, 5, 1, 2, 3):
            batch = rows(*range(1, count + 1))
            relay.stash(batch, RelayPayload(batch * count))
            assert relay.resolve(batch).next_token.tolist() == [
                count * row for row in range(1, count + 1)
            ]
        assert all(len(piece._batches) <= 2 for piece in relay._outputs._pieces)


def test_a_held_view_is_seen_after_the_kept_views_were_let_go_of(hw, monkeypatch, rows):
    monkeypatch.setattr("hwcore.overlap.outputs._MANY_SIZES", 1)
    with FutureMap(RelaySpec(pool_size=12), backend=hw, debug=False) as relay:

        def step(count):
            batch = rows(*range(1, count + 1))
            relay.stash(batch, RelayPayload(batch * count))
            return relay.resolve(batch).next_token[:1]

        for count in (1, 1, 2, 2):  # each piece forgets the views of one request
            step(count)
        held = step(3)
        for count in (4, 5, 6, 7):
            step(count)
        assert held.tolist() == [3]


def test_the_selected_backend_is_the_default(hw):
    with FutureMap(RelaySpec(pool_size=3)) as relay:
        assert relay.device.type == hw.device().type
