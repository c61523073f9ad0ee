"""What cannot be done is said before anything is done, and the map goes on."""

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, CaptureError, ClosedError
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec

from ._payloads import expected, payload, values
from .conftest import SIZES


@pytest.fixture(params=[False, True], ids=["plain", "debug"])
def relay(request, relay_of, rows):
    """A map that holds 30 at row 3 and 50 at row 5, and will be seen to hold them still."""
    relay = relay_of(request.param, **SIZES)
    relay.stash(rows(3, 5), payload(relay.spec, [30, 50], relay.device))
    relay.publish(rows(3, 5), rows(8, 9))
    return relay


@pytest.fixture
def unharmed(relay, rows):
    """Afterwards every row is as it was, and the map works."""
    yield
    assert relay.resolve_seq_lens(rows(3, 5), to_cpu=True).tolist() == [8, 9]
    assert values(relay.resolve(rows(3, 5))) == expected(relay.spec, [30, 50])
    relay.stash(rows(5), payload(relay.spec, [51], relay.device))
    assert values(relay.resolve(rows(5))) == expected(relay.spec, [51])
    if relay._watch is not None:
        relay.check()


CALLS = {
    "publish": lambda relay, indices: relay.publish(indices, torch.ones(1)),
    "stash": lambda relay, indices: relay.stash(indices, None),
    "resolve": lambda relay, indices: relay.resolve(indices),
    "resolve_seq_lens": lambda relay, indices: relay.resolve_seq_lens(indices),
    "discard": lambda relay, indices: relay.discard(indices),
}


@pytest.fixture(params=CALLS)
def call(request, relay):
    """Call a method with indices; its name stands in front of what it raises."""

    def run(indices):
        return CALLS[request.param](relay, indices)

    run.name = f"FutureMap.{request.param}"
    return run


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("row", [-1, 12, 1 << 40])
def test_rows_out_of_range_are_refused_where_the_host_can_see_them(hw, call, rows, row):
    if hw.info.device_type != "cpu":
        pytest.skip("on a device debugging finds them: test_consume_once.py")
    message = rf"{call.name}: indices\[1\] got {row} \(int\); expected a row .* in \[0, 12\)\. Pass"
    with pytest.raises(ArgumentValueError, match=message):
        call(rows(3, row))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("method", ["publish", "stash", "discard"])
def test_a_row_twice_is_refused_where_the_host_can_see_it(hw, relay, rows, method):
    if hw.info.device_type != "cpu":
        pytest.skip("on a device debugging finds it: test_consume_once.py")
    message = rf"FutureMap.{method}: indices got 4 \(int\); expected each row once"
    with pytest.raises(ArgumentValueError, match=message):
        CALLS[method](relay, rows(0, 4, 3, 4, 0))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (lambda rows: [3, 5], ArgumentTypeError, r"indices got \[3, 5\] \(list\)"),
        (lambda rows: rows(3, dtype=torch.int16), ArgumentTypeError, "indices.dtype got torch.int"),
        (lambda rows: rows(3, dtype=torch.float32), ArgumentTypeError, "expected torch.int64 or t"),
        (lambda rows: rows(3).view(1, 1), ArgumentTypeError, r"expected 1 dimensions, \[bs\]"),
        (lambda rows: rows(3)[0], ArgumentTypeError, r"indices.dim\(\) got 0"),
        (
            lambda rows: torch.zeros(1, dtype=torch.int64, device="meta"),
            ArgumentTypeError,
            "indices.device got device",
        ),
        (lambda rows: rows(*range(13)), ArgumentValueError, r"len\(indices\) got 13 .* at most 12"),
    ],
    ids=["list", "int16", "float", "2-d", "0-d", "device", "too long"],
)
def test_indices_of_a_wrong_kind_are_refused(call, rows, indices, error, message):
    with pytest.raises(error, match=f"{call.name}: .*{message}"):
        call(indices(rows))


PAYLOADS = [
    ("next_token", lambda t: t.int(), ArgumentTypeError, "next_token.dtype got torch.int32"),
    ("next_token", lambda t: t[:1], ArgumentValueError, r"next_token.shape got \[1\] .* \[bs=2\]"),
    ("topk_p", lambda t: t.double(), ArgumentTypeError, "topk_p.dtype got torch.float64"),
    ("topk_p", lambda t: t[:, :1], ArgumentValueError, r"topk_p.shape got \[2, 1\]"),
    ("topk_index", lambda t: t.int(), ArgumentTypeError, "topk_index.dtype got torch.int32"),
    ("hidden_states", lambda t: t.float(), ArgumentTypeError, "hidden_states.dtype got torch.fl"),
    ("hidden_states", lambda t: t.repeat(1, 2), ArgumentValueError, r"got \[2, 10\]"),
    ("hidden_states", lambda t: t[0], ArgumentTypeError, "expected 2 dimensions"),
    ("hidden_states", lambda t: t.to("meta"), ArgumentTypeError, "hidden_states.device got"),
    ("hidden_states", lambda t: None, ArgumentTypeError, "expected a tensor, for the spec has it"),
    ("draft_probs", lambda t: t.mT, ArgumentValueError, r"draft_probs.shape got \[2, 3, 2\]"),
    ("topk_p", lambda t: t.tolist(), ArgumentTypeError, "topk_p got .*list"),
]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("name", "change", "error", "message"), PAYLOADS)
def test_payloads_that_do_not_fit_the_spec_are_refused(relay, rows, name, change, error, message):
    given = payload(relay.spec, [1, 2], relay.device)
    fields = {key: getattr(given, key) for key in RelayPayload.__slots__}
    fields[name] = change(fields[name])
    with pytest.raises(error, match=f"^FutureMap.stash: .*{message}"):
        relay.stash(rows(6, 7), RelayPayload(**fields))


@pytest.mark.usefixtures("unharmed")
def test_a_payload_is_no_dict(relay, rows):
    with pytest.raises(ArgumentTypeError, match=r"payload got .* expected a RelayPayload"):
        relay.stash(rows(6), {"next_token": rows(1)})


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "lens", [lambda rows: rows(1), lambda rows: rows(1, 2, dtype=torch.float32), lambda rows: 3]
)
def test_lengths_that_do_not_fit_are_refused(relay, rows, lens):
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match="publish: new_seq_lens"):
        relay.publish(rows(6, 7), lens(rows))


def test_a_value_that_the_map_does_not_hold_is_refused(relay_of, rows):
    relay = relay_of(topk=1)
    message = (
        r"resolve: value got 'hidden_states' \(str\); expected one of next_token, topk_index, topk_"
        r"p, which the spec has\. Make the map with a RelaySpec that sizes it\."
    )
    with pytest.raises(ArgumentValueError, match=message):
        relay.resolve(rows(1), needs=["hidden_states"])
    given = payload(RelaySpec(12, topk=1, hidden_size=2), [1], relay.device)
    with pytest.raises(ArgumentValueError, match="stash: value got 'hidden_states'"):
        relay.stash(rows(1), given)


def test_a_closed_map_says_so(relay, rows):
    relay.close()
    calls = [*CALLS.values(), lambda relay, _: relay.check()]
    for call in calls:
        with pytest.raises(ClosedError, match=r"the map is closed.* Make a new FutureMap"):
            call(relay, rows(3))


def test_a_capture_is_no_place_for_it(hw, call, relay, rows):
    batch = rows(3)
    with pytest.raises(CaptureError, match=f"{call.name}: was called inside a graph capture"):
        hw.graph_capture(hw.create_graph(), lambda: call(batch))
    assert relay.resolve(rows(5)).next_token.tolist() == [50]


# --- Specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"pool_size": 1}, ArgumentValueError, "pool_size got 1 .* at least 2"),
        ({"pool_size": 2.5}, ArgumentTypeError, "pool_size got 2.5"),
        ({"pool_size": True}, ArgumentTypeError, "pool_size got True"),
        ({"max_batch_size": 0}, ArgumentValueError, "max_batch_size got 0"),
        ({"topk": -1}, ArgumentValueError, "topk got -1"),
        ({"hidden_size": -1}, ArgumentValueError, "hidden_size got -1"),
        ({"hidden_dtype": "bfloat16"}, ArgumentTypeError, "hidden_dtype got 'bfloat16'"),
        ({"hidden_dtype": torch.complex64}, ArgumentTypeError, "hidden_dtype got torch.complex64"),
        ({"draft_probs": 3}, ArgumentTypeError, "draft_probs got 3"),
        ({"draft_probs": (0, 5)}, ArgumentValueError, "draft_probs steps got 0"),
        ({"draft_probs": (2, 0)}, ArgumentValueError, "draft_probs vocabulary got 0"),
        ({"probs_dtype": torch.int64}, ArgumentValueError, "probs_dtype got torch.int64"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(sizes, error, message):
    with pytest.raises(error, match=f"^RelaySpec: {message}"):
        RelaySpec(**{"pool_size": 8, **sizes})


def test_a_map_wants_a_spec(hw):
    with pytest.raises(ArgumentTypeError, match=r"FutureMap: spec got 8 .* RelaySpec\(pool_size"):
        FutureMap(8, backend=hw)
