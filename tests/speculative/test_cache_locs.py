import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import cache_locs


@pytest.mark.parametrize("table_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_the_entries_after_each_requests_last(table_dtype, index, device):
    table = (100 + torch.arange(28).view(4, 7)).to(device, table_dtype)
    rows = torch.tensor([3, 0, 0], device=device, dtype=index)
    lens = torch.tensor([4, 0, 2], device=device, dtype=index)
    got = cache_locs(table, rows, lens, 3)
    assert got.dtype == torch.int64
    assert got.tolist() == [[125, 126, 127], [100, 101, 102], [102, 103, 104]]


def test_nothing_to_locate(device):
    table = torch.zeros(2, 5, dtype=torch.int64, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert cache_locs(table, none, none, 3).shape == (0, 3)
    full = torch.tensor([5], device=device)
    assert cache_locs(table, torch.tensor([1], device=device), full, 0).shape == (1, 0)


def test_tables_of_more_than_2_to_the_31_entries(unread):
    """On no device with values: the index is int64 whatever the arguments are."""
    table = torch.empty(2**20, 2**13, dtype=torch.int32, device=unread)
    rows = torch.empty(4, dtype=torch.int32, device=unread)
    assert cache_locs(table, rows, rows, 6).shape == (4, 6)


def test_no_value_is_read_on_the_host(hw, device, monkeypatch):
    monkeypatch.setenv("HWCORE_DEBUG", "0")  # debugging looks at what the tensors hold
    if hw.info.name != "sim":
        pytest.skip("the device does not tell what the host waits for")
    from hwcore_sim import device as sim

    table = torch.arange(20, device=device).view(4, 5)
    rows, lens = torch.tensor([2, 1], device=device), torch.tensor([1, 3], device=device)
    with sim.host_waits() as waits:
        got = cache_locs(table, rows, lens, 2)
    assert waits == []
    assert got.tolist() == [[11, 12], [8, 9]]


def ints(*values):
    return torch.tensor(values)


BAD = [
    ({"req_to_token": ints(1, 2)}, ArgumentTypeError, r"req_to_token\.dim\(\) got 1"),
    (
        {"req_to_token": torch.zeros(5, 2, dtype=torch.int64).T},
        ArgumentValueError,
        r"req_to_token\.stride\(\) got \(1, 2\) .*a contiguous table",
    ),
    ({"rows": ints(2)}, ArgumentValueError, r"rows\[0\] got 2 .*a row in \[0, 2\)"),
    ({"rows": ints(-1)}, ArgumentValueError, r"rows\[0\] got -1"),
    ({"rows": ints(1).float()}, ArgumentTypeError, r"rows\.dtype"),
    ({"seq_lens": ints(1, 2)}, ArgumentValueError, r"seq_lens\.shape"),
    ({"seq_lens": ints(-1)}, ArgumentValueError, r"seq_lens\[0\] got -1"),
    (
        {"seq_lens": ints(4)},
        ArgumentValueError,
        r"seq_lens\[0\] got 4 .*with 2 more entries within 5\. Draft fewer nodes",
    ),
    ({"count": -1}, ArgumentValueError, "count got -1"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_is_named(changed, error, message, hw):
    arguments = {
        "req_to_token": torch.zeros(2, 5, dtype=torch.int64),
        "rows": ints(1),
        "seq_lens": ints(3),
        "count": 2,
    }
    cache_locs(**arguments)
    with pytest.raises(error, match="^cache_locs: " + message):
        cache_locs(**(arguments | changed))


def test_a_check_while_debugging_selects_no_backend(processes, hw):
    if hw.info.name != "sim":
        pytest.skip("only there is a device that can be used without being selected")
    script = """
        import os, torch, hwcore
        from hwcore.speculative import cache_locs
        from hwcore_sim.plugin import SimPlugin
        os.environ["HWCORE_DEBUG"] = "1"
        hw = hwcore.Backend(SimPlugin())
        table, one = torch.arange(6).view(2, 3), torch.ones(1, dtype=torch.int64)
        there = [values.to(hw.device()) for values in (table, one, one)]
        print(cache_locs(*there, 2, backend=hw).tolist(), "HWCORE_BACKEND" in os.environ)
    """
    assert processes.run(script).output == ["[[4, 5]] False"]
