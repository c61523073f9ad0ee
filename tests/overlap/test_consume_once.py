"""The debug mode: a row is written once and read once, in turn, and the host learns of it later."""

import pickle

import pytest

from hwcore.errors import CapabilityError, ConsumeOnceError
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec

from ._payloads import payload, values
from .conftest import SIZES


@pytest.fixture
def relay(relay_of, in_any_order):
    return relay_of(debug=True)


def stash(relay, rows, *numbers):
    relay.stash(rows(*numbers), RelayPayload(rows(*(10 * number for number in numbers))))


def raised(relay):
    with pytest.raises(ConsumeOnceError) as caught:
        relay.check()
    relay.check()  # told once
    return caught.value


def facts(error):
    return error.row, error.kind, error.iteration


def test_in_turn_there_is_nothing_to_tell(relay, rows):
    for _ in range(3):
        stash(relay, rows, 3, 5)
        relay.publish(rows(3, 5), rows(1, 1))
        relay.resolve(rows(5, 3))
        relay.check()


def test_a_read_before_the_first_write_is_told(relay, rows):
    stash(relay, rows, 3)
    relay.resolve(rows(3, 6))
    error = raised(relay)
    assert facts(error) == (6, "read before it was written", 1)
    assert error.buffer == "next_token"
    assert str(error) == (
        "FutureMap: row 6 of `next_token` was read before it was written, in iteration 1; expected "
        "one stash and one resolve of a row in turn. Resolve each row once after its stash, and "
        "discard the rows of retracted requests."
    )


def test_a_second_read_is_told(relay, rows):
    stash(relay, rows, 3, 5)
    relay.resolve(rows(3))
    relay.resolve(rows(5, 3))
    assert facts(raised(relay)) == (3, "read twice", 2)


def test_a_second_write_is_told(relay, rows):
    stash(relay, rows, 3, 5)
    relay.resolve(rows(3))
    stash(relay, rows, 3, 5)
    assert facts(raised(relay)) == (5, "written twice", 1)


def test_a_read_after_a_discard_is_told(relay, rows):
    stash(relay, rows, 3)
    relay.discard(rows(3))
    assert relay.resolve(rows(3)).next_token.tolist() == [-1]
    assert facts(raised(relay)) == (3, "read before it was written", 1)


def test_a_discarded_row_may_be_written_again(relay, rows):
    stash(relay, rows, 3, 4)
    relay.discard(rows(3, 4))
    stash(relay, rows, 4, 3)
    relay.resolve(rows(3, 4))
    relay.check()


def test_the_padding_row_is_never_asserted_on(relay, rows):
    for _ in range(3):
        stash(relay, rows, 0, 4, 0)
        relay.resolve(rows(0, 0, 4))
        relay.resolve(rows(0))
        relay.discard(rows(0, 0))
    relay.check()
    assert relay.resolve(rows(0)).next_token.tolist() == [0]


def test_an_emptied_rows_token_reads_minus_one(relay, rows):
    stash(relay, rows, 3)
    relay.resolve(rows(3))
    assert relay.resolve(rows(3, 4)).next_token.tolist() == [-1, -1]
    assert facts(raised(relay)) == (4, "read before it was written", 2)


def test_other_values_are_kept_when_a_row_is_emptied(relay_of, rows):
    relay = relay_of(debug=True, **SIZES)
    relay.stash(rows(3), payload(relay.spec, [7], relay.device))
    whole = values(relay.resolve(rows(3)))
    again = values(relay.resolve(rows(3)))
    assert again == {**whole, "next_token": [-1]}
    raised(relay)


def test_the_first_failure_is_the_one_that_is_told(relay, rows):
    stash(relay, rows, 3)
    relay.resolve(rows(3))  # 1
    relay.resolve(rows(3))  # 2: twice
    relay.publish(rows(3), rows(1))
    relay.resolve(rows(9))  # 3: never written
    stash(relay, rows, 5)
    stash(relay, rows, 5)  # written twice
    assert facts(raised(relay)) == (3, "read twice", 2)


def test_a_failure_is_kept_though_nobody_publishes_before_the_next_read(relay, rows):
    stash(relay, rows, 3, 5)
    relay.resolve(rows(6, 3))  # 1
    relay.resolve(rows(5))  # 2
    assert facts(raised(relay)) == (6, "read before it was written", 1)


def test_failures_of_reads_and_writes_have_their_own_iterations(relay, rows):
    stash(relay, rows, 3)
    relay.resolve(rows(3))  # 1
    stash(relay, rows, 4)
    stash(relay, rows, 4)
    relay.resolve(rows())  # 2
    assert facts(raised(relay)) == (4, "written twice", 1)


def test_the_map_goes_on_after_a_failure(relay, rows):
    relay.resolve(rows(3))
    raised(relay)
    stash(relay, rows, 3)
    assert relay.resolve(rows(3)).next_token.tolist() == [30]
    relay.resolve(rows(3))
    assert facts(raised(relay)) == (3, "read twice", 3)


# --- Where it is raised ---------------------------------------------------------------------------


def test_lengths_on_the_host_bring_what_was_found_up_to_their_publish(relay, rows):
    relay.publish(rows(3), rows(1))
    relay.resolve(rows(3))
    assert relay.resolve_seq_lens(rows(3), to_cpu=True).tolist() == [1], "not published yet"
    relay.publish(rows(3), rows(2))
    with pytest.raises(ConsumeOnceError, match=r"row 3 .* read before it was written"):
        relay.resolve_seq_lens(rows(3), to_cpu=True)
    assert relay.resolve_seq_lens(rows(3), to_cpu=True).tolist() == [2], "told once"
    relay.check()


def test_closing_brings_what_was_found_and_closes(relay, rows):
    relay.resolve(rows(3))
    with pytest.raises(ConsumeOnceError):
        relay.close()
    relay.close()
    assert "closed" in repr(relay)


def test_a_programs_own_error_is_the_one_to_see(hw, rows):
    def program():
        with FutureMap(RelaySpec(3), backend=hw, debug=True) as relay:
            relay.resolve(rows(2))
            raise KeyError

    with pytest.raises(KeyError):
        program()


def test_the_variable_switches_it_on(hw, rows, monkeypatch):
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    with FutureMap(RelaySpec(3), backend=hw) as relay:
        relay.resolve(rows(2))
        raised(relay)


def test_without_debugging_there_is_nothing_to_check(relay_of, rows):
    relay = relay_of(debug=False)
    relay.resolve(rows(3, 3))
    with pytest.raises(CapabilityError, match=r"without debugging .* debug=True, or set HWCORE_DE"):
        relay.check()


def test_the_error_travels_between_processes(relay, rows):
    relay.resolve(rows(3))
    error = raised(relay)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert facts(copy) == facts(error)


# --- What only the device can see -----------------------------------------------------------------


@pytest.fixture
def on_a_device(hw):
    if hw.info.device_type == "cpu":
        pytest.skip("the host's own tensors are checked before anything is written")


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("row", [12, -1, 1 << 20])
def test_a_row_out_of_range_is_told_and_harms_nobody(relay, rows, row):
    stash(relay, rows, 3)
    assert relay.resolve(rows(3, row)).next_token.tolist() == [30, 0]
    assert facts(raised(relay)) == (row, "out of range", 1)
    relay.stash(rows(row, 4), RelayPayload(rows(7, 8)))
    assert facts(raised(relay)) == (row, "out of range", 1)
    relay.publish(rows(row, 4), rows(70, 80))
    assert facts(raised(relay)) == (row, "out of range", 1)
    relay.discard(rows(row))
    assert facts(raised(relay)) == (row, "out of range", 1)
    assert relay.resolve_seq_lens(rows(row, 4)).tolist() == [0, 80]
    assert facts(raised(relay)) == (row, "out of range", 1)
    assert relay.resolve(rows(4)).next_token.tolist() == [8]
    relay.check()


@pytest.mark.usefixtures("on_a_device")
def test_a_row_twice_in_one_stash_is_told(relay, rows):
    relay.stash(rows(3, 4, 0, 3, 0), RelayPayload(rows(1, 2, 3, 4, 5)))
    assert facts(raised(relay)) == (3, "in one stash twice", 0)
    assert relay.resolve(rows(4)).next_token.tolist() == [2]
    relay.check()


# --- Its cost -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_a_device", "late")
@pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
def test_the_host_waits_for_nothing(hw, relay_of, rows, debug):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells whether its queue was waited for")
    from hwcore_sim import device

    relay = relay_of(debug, **SIZES)
    given, batch, lens = payload(relay.spec, [1, 2], relay.device), rows(3, 5), rows(1, 1)
    hw.synchronize()
    waited = []
    device.launch_host_function(lambda: waited.append(True))
    for _ in range(3):
        relay.publish(batch, lens)
        relay.stash(batch, given)
        relay.resolve(batch)
        relay.resolve_seq_lens(batch)
        relay.discard(batch)
    assert not waited
    relay.resolve_seq_lens(batch, to_cpu=True)
    assert waited, "the named wait"
