"""A pool's leases and tensors: what is written is read, and no range has two owners."""

import contextlib
import gc

import pytest
import torch

from hwcore.diffusion import (
    Manifest,
    TransferTensorBuffer,
    copying,
    decode_manifest,
    encode_manifest,
    manifest_of,
)
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CaptureError,
    ClosedError,
    LeaseError,
)

from ._tensors import bits, dtypes, filled, same, shapes


def settled(pool):
    """The pool's figures once streams have done what they had."""
    pool._backend.synchronize()
    return pool.stats()


def is_all_free(pool):
    stats = settled(pool)
    return (stats.live_leases, stats.freed_leases, stats.ranges.live_blocks) == (0, 0, 0)


# --- Leases ---------------------------------------------------------------------------------------


def test_a_lease_is_freed_when_its_block_ends(pool):
    with pool.allocate(1000, "a request") as lease:
        assert pool.leases() == [lease]
        assert (lease.size_bytes, lease.offset % 64, lease.request_id) == (1000, 0, "a request")
    assert is_all_free(pool)


def test_a_lease_that_was_freed_within_its_block_is_not_freed_again(pool):
    with pool.allocate(1000) as lease:
        pool.free(lease)
    assert is_all_free(pool)


def test_a_lease_is_freed_when_its_block_raises(pool):
    with pytest.raises(KeyError), pool.allocate(1000):
        raise KeyError
    assert is_all_free(pool)


def test_freeing_twice_is_an_error_and_harms_nobody(pool):
    lease = pool.allocate(1000)
    pool.free(lease)
    other = pool.allocate(1000)
    with pytest.raises(LeaseError, match="that was not freed"):
        pool.free(lease)
    assert pool.leases() == [other]


def test_a_lease_of_another_pool_is_refused(pool, pool_of):
    with pytest.raises(LeaseError, match="of this pool"):
        pool_of().free(pool.allocate(1))


@pytest.mark.parametrize("lease", [0, None, b"12345678"])
def test_what_is_no_lease_cannot_be_freed(pool, lease):
    with pytest.raises(ArgumentTypeError, match="allocate"):
        pool.free(lease)


def test_a_freed_lease_can_be_neither_written_nor_read(pool):
    lease = pool.allocate(64)
    written = pool.write_tensors_from_device(lease, [torch.zeros(3)])
    pool.free(lease)
    for use in (
        lambda: pool.write_tensors_from_device(lease, [torch.zeros(3)]),
        lambda: pool.read_tensors_from_manifest(lease, written.manifest),
        lambda: pool.write_tensor(lease, torch.zeros(3)),
        lambda: pool.read_tensor(lease, (3,), torch.float32),
        lambda: lease.memory,
        lambda: lease.payload,
        lambda: lease.mark_received(1),
        lambda: pool.quarantine(lease, "a peer"),
    ):
        with pytest.raises(LeaseError):
            use()


def test_a_peer_names_a_lease_by_eight_bytes(pool):
    lease = pool.allocate(64)
    assert len(bytes(lease)) == 8
    assert pool.lease(bytes(lease)) is lease


def test_the_name_of_a_freed_lease_is_not_that_of_the_next(pool):
    lease = pool.allocate(64)
    pool.free(lease)
    following = pool.allocate(64)
    assert following.offset == lease.offset
    assert pool.lease(bytes(following)) is following
    with pytest.raises(LeaseError):
        pool.lease(bytes(lease))


def test_a_name_that_was_made_up_is_refused(pool):
    name = bytearray(bytes(pool.allocate(64)))
    for at in range(8):
        forged = bytearray(name)
        forged[at] ^= 1
        with pytest.raises(LeaseError):
            pool.lease(bytes(forged))
    for wrong in (b"", b"short", bytes(9), "12345678", 7):
        with pytest.raises(LeaseError):
            pool.lease(wrong)


def test_a_lease_of_nothing_takes_no_room_even_of_a_full_pool(pool):
    with pool.allocate(pool.size_bytes), pool.allocate(0, timeout_s=0) as lease:
        written = pool.write_tensors_from_device(lease, {"a": torch.empty(0, 3)})
        tree, _ = pool.read_tensors_from_manifest(lease, written.manifest)
        assert tree["a"].shape == (0, 3)
        assert lease.memory.numel() == 0
    assert is_all_free(pool)


def test_a_range_that_is_freed_during_a_write_is_not_reused_before_that_has_returned(
    pool, monkeypatch
):
    lease, write = pool.allocate(64), pool._io.write

    def freed_meanwhile(*arguments):  # by another thread
        pool.free(lease)
        assert pool.stats().freed_leases == 1
        return write(*arguments)

    monkeypatch.setattr(pool._io, "write", freed_meanwhile)
    pool.write_tensors_from_device(lease, [torch.zeros(3)])
    assert is_all_free(pool)


def test_leases_are_found_by_their_request(pool):
    mine = [pool.allocate(64, "mine"), pool.allocate(64, "mine")]
    pool.allocate(64, "another's")
    assert pool.leases("mine") == mine


@pytest.mark.parametrize(
    ("memory", "error"),
    [
        ("a tensor", ArgumentTypeError),
        (torch.zeros(256), ArgumentTypeError),
        (torch.zeros(16, 16, dtype=torch.uint8), ArgumentTypeError),
        (torch.zeros(63, dtype=torch.uint8), ArgumentValueError),
        (torch.zeros(256, dtype=torch.uint8)[1:], ArgumentValueError),
        (torch.zeros(256, dtype=torch.uint8)[::2], ArgumentValueError),
    ],
    ids=range(6),
)
def test_memory_that_cannot_be_given_out_is_refused(hw, memory, error):
    with pytest.raises(error, match="memory"):
        TransferTensorBuffer(memory, hw)


def test_a_pool_is_a_part_of_its_memory(hw):
    memory = torch.zeros(256, dtype=torch.uint8)
    pool = TransferTensorBuffer(memory[64:192], hw)
    pool.allocate(128).memory.fill_(1)
    assert memory.sum() == memory[64:192].sum() == 128


@pytest.mark.parametrize("size", [-1, 1.5, "1", True, None])
def test_a_size_that_is_none_is_refused(pool, size):
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match="size_bytes"):
        pool.allocate(size)


# --- Quarantine -----------------------------------------------------------------------------------


def test_a_range_that_a_peer_may_write_is_not_reused_before_it_is_released(pool):
    lease = pool.allocate(pool.size_bytes)
    pool.quarantine(lease, "peer 1")
    pool.quarantine(lease, "peer 2")
    pool.free(lease)
    for holder in ("peer 1", "peer 2"):
        assert settled(pool).quarantined_leases == 1
        pool.release(bytes(lease), holder)
    assert is_all_free(pool)


def test_a_released_lease_is_not_freed_by_that(pool):
    lease = pool.allocate(64)
    pool.quarantine(lease, "a peer")
    pool.release(lease, "a peer")
    assert pool.leases() == [lease]


def test_a_release_of_what_is_not_held_is_an_error(pool, pool_of):
    lease = pool.allocate(64)
    pool.quarantine(lease, "a peer")
    for wrong, holder in (
        (lease, "another"),
        (pool_of().allocate(64), "a peer"),
        (bytes(8), "a peer"),
        (None, "a peer"),
    ):
        with pytest.raises(LeaseError, match="holds"):
            pool.release(wrong, holder)
    pool.release(lease, "a peer")
    with pytest.raises(LeaseError, match="holds"):
        pool.release(lease, "a peer")


def test_all_that_a_dead_peer_held_is_released_at_once(pool):
    leases = [pool.allocate(64) for _ in range(3)]
    for lease, holder in zip(leases, ("dead", "alive", "dead"), strict=True):
        pool.quarantine(lease, holder)
        pool.free(lease)
    assert pool.release_all("dead") == 2
    assert settled(pool).quarantined_leases == 1


# --- Writing and reading --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_is_read_as_it_was_written(hw, pool_of, dtype):
    pool = pool_of(1 << 18)
    for device in ("cpu", hw.device()):
        sent = [filled(dtype, shape, device) for shape in ((), (0,), (3,), (5, 1000))]
        with pool.allocate(manifest_of(sent)[0].size_bytes) as lease:
            manifest, _ = pool.write_tensors_from_device(lease, sent)
            for clone in (False, True):
                got, event = pool.read_tensors_from_manifest(lease, manifest, clone=clone)
                hw.synchronize_event(event)
                for one, wanted in zip(got, sent, strict=True):
                    same(one, wanted)
            del got, one


@pytest.mark.parametrize("source", ["host", "device"])
def test_every_way_to_lie_in_memory_is_read_as_it_was_written(hw, pool_of, source):
    pool = pool_of(1 << 18)
    sent = shapes("cpu" if source == "host" else hw.device())
    with pool.allocate(manifest_of(sent)[0].size_bytes) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, sent)
        for target in (None, "cpu", hw.device()):
            got, event = pool.read_tensors_from_manifest(lease, manifest, target)
            hw.synchronize_event(event)
            assert got.keys() == sent.keys()
            for name, wanted in sent.items():
                same(got[name], wanted)
            assert got["channels last"].stride() == sent["channels last"].stride()


def test_tensors_of_host_and_device_may_be_in_one_tree(hw, pool):
    small, large = torch.arange(5), torch.arange(3000)
    sent = [small, (small + 1).to(hw.device()), large, (large + 1).to(hw.device()), small + 2]
    with pool.allocate(pool.size_bytes) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, sent)
        got, event = pool.read_tensors_from_manifest(lease, manifest, "cpu")
        hw.synchronize_event(event)
        for one, wanted in zip(got, sent, strict=True):
            same(one, wanted)


def test_a_tensor_that_is_there_twice_is_written_once_and_read_as_one(pool):
    x = torch.arange(1000)
    with pool.allocate(8000) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, {"a": x, "b": [x]})
        got, _ = pool.read_tensors_from_manifest(lease, manifest)
        assert got["a"] is got["b"][0]


def test_a_manifest_is_read_where_its_bytes_were_sent(hw, pool):
    sent = {"a": torch.arange(3), "b": (torch.zeros(2000),)}
    source, target = pool.allocate(1 << 14), pool.allocate(1 << 14)
    manifest, _ = pool.write_tensors_from_device(source, sent)
    target.memory[: manifest.size_bytes].copy_(source.payload)  # as an engine does
    target.mark_received(manifest.size_bytes)
    theirs = decode_manifest(encode_manifest(manifest), target.size_bytes)
    got, event = pool.read_tensors_from_manifest(target, theirs, "cpu")
    hw.synchronize_event(event)
    assert bits(got["a"]) == bits(sent["a"])
    assert bits(got["b"][0]) == bits(sent["b"][0])


def test_more_than_was_received_cannot_be_read(pool):
    lease = pool.allocate(1 << 14)
    manifest, _ = manifest_of([torch.zeros(30)])
    with pytest.raises(ArgumentValueError, match="at most 0,"):
        pool.read_tensors_from_manifest(lease, manifest)
    lease.mark_received(119)
    with pytest.raises(ArgumentValueError, match="at most 119"):
        pool.read_tensors_from_manifest(lease, manifest)
    with pytest.raises(ArgumentValueError, match="at most 119"):
        pool.read_tensor(lease, (30,), torch.float32)
    with pytest.raises(ArgumentValueError, match="at most 16384"):
        lease.mark_received(1 << 15)


def test_a_tree_larger_than_its_lease_is_refused_before_a_byte_is_written(pool):
    lease = pool.allocate(64)
    with pytest.raises(ArgumentValueError, match="at most 64"):
        pool.write_tensors_from_device(lease, [torch.zeros(17)])
    assert lease.written_bytes == 0
    assert set(bits(lease.memory)) == {0xA5}


def test_one_tensor_is_written_and_read_at_an_offset(hw, pool):
    x = torch.arange(6, dtype=torch.int16).view(2, 3)
    with pool.allocate(64) as lease:
        for device in ("cpu", hw.device()):
            pool.write_tensor(lease, x.to(device).t(), byte_offset=10)
            for target in (None, "cpu", hw.device()):
                got, event = pool.read_tensor(lease, (3, 2), torch.int16, 10, target)
                hw.synchronize_event(event)
                same(got, x.t())
            del got
        assert lease.written_bytes == 22


@pytest.mark.parametrize(
    ("offset", "named"),
    [(1, "multiple of 4"), (-4, "at least 0"), (56, "at most 64"), (0.0, "int")],
)
def test_an_offset_that_cannot_be_is_refused(pool, offset, named):
    with (
        pool.allocate(64) as lease,
        pytest.raises((ArgumentTypeError, ArgumentValueError), match=named),
    ):
        pool.write_tensor(lease, torch.zeros(3), offset)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2**40, 2**40), torch.uint8), ((-1,), torch.uint8), (3, torch.uint8), ((1,), "float32")],
)
def test_a_shape_that_cannot_be_is_refused(pool, shape, dtype):
    with (
        pool.allocate(64) as lease,
        pytest.raises((ArgumentTypeError, ArgumentValueError), match="read_tensor"),
    ):
        pool.read_tensor(lease, shape, dtype)


def test_a_lease_may_be_written_in_inference_mode_and_outside(pool):
    with pool.allocate(64) as lease:
        with torch.inference_mode():
            pool.write_tensors_from_device(lease, [torch.ones(3)])
        manifest, _ = pool.write_tensors_from_device(lease, [torch.full((3,), 2.0)])
        got, _ = pool.read_tensors_from_manifest(lease, manifest)
        assert got[0].tolist() == [2, 2, 2]


def test_nothing_is_written_or_read_while_a_graph_is_captured(hw, pool):
    x = torch.zeros(3, device=hw.device())
    with pool.allocate(64) as lease:
        with pytest.raises(CaptureError, match="write_tensors_from_device"):
            hw.graph_capture(hw.create_graph(), lambda: pool.write_tensors_from_device(lease, [x]))
        assert lease.written_bytes == 0


# --- Views ----------------------------------------------------------------------------------------


def test_a_view_keeps_its_range_out_of_the_pool_for_as_long_as_it_lives(pool):
    with pool.allocate(pool.size_bytes) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [torch.arange(5), torch.zeros(3)])
        views = pool.read_tensors_from_manifest(lease, manifest).tree
    part = views[0][2:]
    del views
    gc.collect()
    assert settled(pool).freed_leases == 1
    assert part.tolist() == [2, 3, 4]
    del part
    assert is_all_free(pool)


def test_the_lease_of_a_view_says_so_when_another_finds_no_room(pool):
    from hwcore.errors import AllocationTimeoutError

    with pool.allocate(pool.size_bytes, "the first") as lease:
        view = lease.memory
    with pytest.raises(AllocationTimeoutError, match=r"'the first' .*tensors that view it"):
        pool.allocate(64, timeout_s=0.01)
    del view
    assert is_all_free(pool)


def test_tensors_on_a_device_that_was_asked_for_are_no_views(hw, pool):
    with pool.allocate(64) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [torch.ones(3)])
        got, event = pool.read_tensors_from_manifest(lease, manifest, lease.memory.device)
        copy, other = pool.read_tensors_from_manifest(lease, manifest, clone=True)
        hw.synchronize_event(event)
        hw.synchronize_event(other)
        lease.memory.zero_()
        hw.synchronize()
    assert is_all_free(pool)
    assert got[0].tolist() == copy[0].tolist() == [1, 1, 1]


# --- Streams --------------------------------------------------------------------------------------


def test_copies_run_on_the_stream_that_is_given_after_the_current_one(hw, pool, in_any_order):
    side, other = hw.create_stream(), hw.create_stream()
    x = torch.zeros(2000, device=hw.device())
    with pool.allocate(1 << 14) as lease:
        x += 1  # on the current stream
        manifest, _ = pool.write_tensors_from_device(lease, [x, x[:3]], side)
        got, event = pool.read_tensors_from_manifest(lease, manifest, hw.device(), other)
        hw.wait_event(event)
        assert [t.sum().item() for t in got] == [2000, 3]


def test_a_source_may_go_before_its_copy_has_run(hw, pool, in_any_order):
    side = hw.create_stream()
    with pool.allocate(1 << 14) as lease:
        x = torch.ones(2000, device=hw.device())
        manifest, _ = pool.write_tensors_from_device(lease, [x], side)
        del x
        torch.zeros(2000, device=hw.device())  # would get its memory
        got, event = pool.read_tensors_from_manifest(lease, manifest, "cpu")
        hw.synchronize_event(event)
        assert got[0].sum() == 2000


@pytest.mark.parametrize("pool_of", ["device"], indirect=True)
def test_a_page_locked_source_may_go_even_where_its_memory_is_reused_early(hw, pool_of, late):
    with contextlib.ExitStack() as reuse:
        if hw.info.name == "sim":
            from hwcore_sim import device

            reuse.enter_context(device.pinned_reuse("early"))
        pool = pool_of()
        with pool.allocate(1 << 14) as lease:
            x = hw.pin_memory(torch.ones(2000))
            manifest, _ = pool.write_tensors_from_device(lease, [x])
            del x
            hw.pin_memory(torch.zeros(2000))  # would get its memory
            got, event = pool.read_tensors_from_manifest(lease, manifest, "cpu")
            hw.synchronize_event(event)
            assert got[0].sum() == 2000


def test_what_was_read_on_another_stream_may_go_before_the_work_on_it_has_run(
    hw, pool, in_any_order
):
    side = hw.create_stream()
    with pool.allocate(1 << 14) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [torch.ones(2000)])
        got, event = pool.read_tensors_from_manifest(lease, manifest, hw.device(), side)
        hw.wait_event(event)
        total = got[0].sum()
        del got
        with hw.stream_context(side):
            torch.zeros(2000, device=hw.device())  # would get its memory
        assert total.item() == 2000


def test_host_memory_is_read_when_the_device_has_written_it(hw, host_pool, in_any_order):
    side = hw.create_stream()
    x = torch.zeros(2000, device=hw.device())
    x += 1
    with host_pool.allocate(1 << 14) as lease:
        manifest, _ = host_pool.write_tensors_from_device(lease, [x], side)
        assert host_pool.read_tensors_from_manifest(lease, manifest).tree[0].sum() == 2000
        x += 1
        host_pool.write_tensors_from_device(lease, [x], side)
        assert lease.payload.view(torch.float32).sum() == 4000


@pytest.mark.usefixtures("watched")
def test_streams_that_share_a_lease_do_not_race(hw, pool, in_any_order):
    side, other = hw.create_stream(), hw.create_stream()
    with pool.allocate(1 << 14) as lease:
        for turn in range(3):
            x = torch.full((2000,), float(turn), device=hw.device())
            manifest, _ = pool.write_tensors_from_device(lease, [x, x[:3]], side)
            del x
            got, event = pool.read_tensors_from_manifest(lease, manifest, hw.device(), other)
            hw.wait_event(event)
            assert got[0].sum().item() == 2000 * turn
        views, event = pool.read_tensors_from_manifest(lease, manifest)
        hw.wait_event(event)
        assert views[1].sum().item() == 6
        del views


def test_the_host_does_not_write_under_a_copy_of_the_device(hw, host_pool, in_any_order):
    with host_pool.allocate(1 << 14) as lease:
        host_pool.write_tensors_from_device(lease, [torch.ones(20, device=hw.device())])
        manifest, _ = host_pool.write_tensors_from_device(lease, [torch.full((20,), 2.0)])
        hw.synchronize()
        got, _ = host_pool.read_tensors_from_manifest(lease, manifest)
        assert got[0].sum() == 40


def test_a_freed_range_is_not_reused_before_the_copy_from_it_has_run(hw, pool, in_any_order):
    """The next tenant fills the range at once, as a peer does that writes without any stream."""
    side = hw.create_stream()
    with pool.allocate(pool.size_bytes) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [torch.ones(2000)])
        got, event = pool.read_tensors_from_manifest(lease, manifest, hw.device(), side)
    with pool.allocate(pool.size_bytes) as following:
        _poke(following.memory)
        hw.wait_event(event)
        assert got[0].sum().item() == 2000


def test_a_freed_range_is_not_reused_before_what_read_its_views_has_run(hw, pool, in_any_order):
    side = hw.create_stream()
    with pool.allocate(pool.size_bytes) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [torch.ones(2000)])
        views, event = pool.read_tensors_from_manifest(lease, manifest)
        lease.record_stream(side)
        with hw.stream_context(side):
            hw.wait_event(event)
            copy = torch.empty(2000, device=hw.device()).copy_(views[0], non_blocking=True)
        del views
    with pool.allocate(pool.size_bytes) as following:
        _poke(following.memory)
        hw.synchronize()
        assert copy.sum().item() == 2000


def test_work_through_a_view_that_outlives_its_lease_is_waited_for(hw, pool, in_any_order):
    with pool.allocate(pool.size_bytes) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [torch.ones(2000)])
        view = pool.read_tensors_from_manifest(lease, manifest).tree[0]
    copy = torch.empty(2000, device=hw.device()).copy_(view, non_blocking=True)
    del view
    with pool.allocate(pool.size_bytes) as following:
        _poke(following.memory)
        hw.synchronize()
        assert copy.sum().item() == 2000


@pytest.mark.parametrize("pool_of", ["page-locked", "device"], indirect=True)
def test_the_host_does_not_wait_while_there_is_room(hw, pool, late):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells what the host waited for")
    from hwcore_sim import device

    x = torch.zeros(2000, device=hw.device())
    with device.host_waits() as waits:
        for _ in range(3):
            with pool.allocate(8000) as lease:
                manifest, _ = pool.write_tensors_from_device(lease, [x], hw.create_stream())
                if x.device == pool._device:
                    pool.read_tensors_from_manifest(lease, manifest)
                pool.read_tensors_from_manifest(lease, manifest, hw.device())
    assert waits == []


def _poke(memory):
    """Overwrite memory as somebody who knows no stream: at once."""
    import ctypes

    ctypes.memset(memory.data_ptr(), 0, memory.numel())


def _fail_to_write(pool, lease, monkeypatch):
    def fail(base, part):
        part_of_it = base[:8]  # noqa: F841 - as any frame may have
        message = "cut short"
        raise RuntimeError(message)

    monkeypatch.setattr(copying, "write_part", fail)
    pool.write_tensors_from_device(lease, [torch.ones(9)])


def _fail_while_another_is_handled(pool, lease, monkeypatch):
    def fail(base, part):
        part_of_it = base[:8]
        raise KeyError(part_of_it.numel())

    def fail_again(base, part):
        try:
            fail(base, part)
        except KeyError:
            message = "cut short"
            raise RuntimeError(message) from None

    monkeypatch.setattr(copying, "write_part", fail_again)
    pool.write_tensors_from_device(lease, [torch.ones(9)])


def _fail_to_read(pool, lease, monkeypatch):
    manifest, _ = pool.write_tensors_from_device(lease, [torch.ones(9)])
    pool.read_tensors_from_manifest(lease, Manifest("no tensor", manifest.layout))


@pytest.mark.parametrize("fail", [_fail_to_write, _fail_while_another_is_handled, _fail_to_read])
def test_an_error_that_somebody_keeps_does_not_keep_the_memory(hw, pool, monkeypatch, fail):
    lease = pool.allocate(pool.size_bytes)
    with pytest.raises((RuntimeError, ArgumentValueError)) as kept:
        fail(pool, lease, monkeypatch)
    pool.free(lease)
    hw.synchronize()
    assert pool.stats().ranges.free_bytes == pool.size_bytes
    assert kept.value.__traceback__ is not None


def test_an_error_that_a_caller_handles_keeps_its_own_frames(pool, monkeypatch):
    lease = pool.allocate(pool.size_bytes)

    def fail():
        value = 7
        raise KeyError(value)

    try:
        fail()
    except KeyError as handled:
        with pytest.raises(RuntimeError):
            _fail_to_write(pool, lease, monkeypatch)
        frame = handled.__traceback__.tb_next.tb_frame
    assert frame.f_locals["value"] == 7
    pool.free(lease)


# --- The end --------------------------------------------------------------------------------------


def test_a_closed_pool_gives_out_nothing(pool):
    pool.close()
    pool.close()
    with pytest.raises(ClosedError, match="allocate"):
        pool.allocate(0)


def test_closing_names_what_is_still_in_use(pool):
    lease = pool.allocate(64, "a request")
    with pytest.raises(ClosedError, match="64 bytes of 'a request'"):
        pool.close(timeout_s=0)
    pool.free(lease)
    pool.close()


def test_closing_waits_for_streams(hw, pool, in_any_order):
    with pool.allocate(1 << 14) as lease:
        pool.write_tensors_from_device(lease, [torch.ones(2000, device=hw.device())])
    pool.close()
    assert pool.stats().freed_leases == 0
