"""What SGLang 0.5.23 gets wrong in staging, by the numbers of the list that hwcore was built from.

Here are those that layout, codec, allocator and pool decide. Everywhere the caller gets a named
error before a byte has moved, or the right tensors; and the pool has lost nothing.
"""

import ctypes

import pytest
import torch

from hwcore.diffusion import (
    TransferTensorBuffer,
    decode_manifest,
    encode_manifest,
    layout_of,
    manifest_of,
    pack_tensors,
    unpack_tensors,
)
from hwcore.diffusion.allocator import RangeAllocator
from hwcore.errors import ArgumentTypeError, ArgumentValueError, HwcoreError, LeaseError

from ._tensors import bits, filled, same

MIB = 1 << 20


@pytest.fixture
def large_pool(pool_of):
    return pool_of(24 * MIB)


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    """Every test ends with all of its pool free."""
    names = {"pool", "large_pool"} & {*request.fixturenames}
    pools = [request.getfixturevalue(name) for name in names]
    yield
    for pool in pools:
        pool.close()
        assert pool.stats().ranges.free_bytes == pool.size_bytes


def through(hw, pool, tree):
    """Write a tree, let the bytes be all that the other side gets, and read it there."""
    manifest, _ = manifest_of(tree)
    with pool.allocate(manifest.size_bytes) as source, pool.allocate(manifest.size_bytes) as slot:
        manifest, _ = pool.write_tensors_from_device(source, tree)
        slot.memory[: manifest.size_bytes].copy_(source.payload)
        slot.mark_received(manifest.size_bytes)
        theirs = decode_manifest(encode_manifest(manifest), slot.size_bytes)
        got, event = pool.read_tensors_from_manifest(slot, theirs, "cpu")
        hw.synchronize_event(event)
        return got


# --- 5: sizes that leave padding out --------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [[8, MIB - 8], [64] * 4000, [8, 4 * MIB - 8, 4 * MIB - 3], [1, 4097, 1, 4097, 1]],
    ids=["scalar first", "4000 small", "two large", "odd"],
)
def test_05_a_lease_of_the_size_that_the_manifest_says_is_large_enough(hw, large_pool, sizes):
    sent = [torch.full((size,), n % 251, dtype=torch.uint8) for n, size in enumerate(sizes)]
    for got, wanted in zip(through(hw, large_pool, sent), sent, strict=True):
        assert torch.equal(got, wanted)


# --- 6: an exception while writing or loading -----------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
        lambda: {1, 2},
    ],
    ids=["sparse", "meta", "quantised", "no tensor"],
)
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_06_what_cannot_be_staged_is_an_error_that_leaks_no_slot(pool, make):
    for _ in range(100):  # the pool would be full
        with pool.allocate(4096) as lease, pytest.raises(ArgumentTypeError):
            pool.write_tensors_from_device(lease, [torch.zeros(3), make()])


def test_06_what_cannot_be_loaded_is_an_error_that_leaks_no_slot(pool):
    manifest, _ = manifest_of([torch.zeros(1000)])
    for _ in range(100):
        with pool.allocate(4096) as lease, pytest.raises(ArgumentValueError):
            pool.read_tensors_from_manifest(lease, manifest)


def test_06_lazy_conjugates_and_negatives_are_staged(hw, pool):
    x = torch.view_as_complex(torch.arange(8.0, device=hw.device()).view(4, 2))
    conj, neg = through(hw, pool, [x.conj(), x.conj().imag])
    assert conj.tolist() == [0 - 1j, 2 - 3j, 4 - 5j, 6 - 7j]
    assert neg.tolist() == [-1, -3, -5, -7]


# --- 9: a pool that can never hold a request ------------------------------------------------------


def test_09_a_request_larger_than_the_pool_is_refused_at_once_with_both_sizes(pool):
    with pytest.raises(ArgumentValueError, match=f"{1 << 20} .*at most {pool.size_bytes}"):
        pool.allocate(1 << 20, timeout_s=1000)


def test_09_one_request_may_have_all_of_the_pool(pool):
    with pool.allocate(pool.size_bytes, timeout_s=0) as lease:
        assert lease.size_bytes == pool.size_bytes


# --- 10: types ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64, torch.bool],
    ids=str,
)
def test_10_what_is_staged_is_also_read_even_0_dim(hw, pool, dtype):
    sent = [filled(dtype, (), hw.device()), filled(dtype, (3, 5), hw.device())]
    for got, wanted in zip(through(hw, pool, sent), sent, strict=True):
        same(got, wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: [None, x],
        lambda x: (x, x + 1),
        lambda x: {"a": {"b": [x, 1, "text"]}},
        lambda x: torch.empty(0),
        lambda x: [],
        lambda x: {"extra": (), "none": None},
    ],
    ids=["None in a list", "tuple", "nested", "lone empty tensor", "empty list", "no tensors"],
)
def test_10_containers_arrive_as_they_are_and_never_as_numbers(hw, pool, make):
    sent = make(torch.arange(3.0))
    got = through(hw, pool, sent)
    assert repr(got) == repr(sent)
    same_tree = encode_manifest(manifest_of(got)[0]) == encode_manifest(manifest_of(sent)[0])
    assert same_tree


def test_10_channels_last_stays_so(hw, pool):
    sent = filled(torch.float16, (2, 3, 4, 5)).to(memory_format=torch.channels_last)
    assert through(hw, pool, sent).is_contiguous(memory_format=torch.channels_last)


def test_10_a_tensor_that_is_there_four_times_is_sent_once(hw, pool):
    x = torch.arange(1000)
    got = through(hw, pool, [x] * 4)
    assert manifest_of([x] * 4)[0].size_bytes == x.nbytes
    assert all(one is got[0] for one in got)


def test_10_an_expanded_tensor_is_written_without_a_copy_before(hw, pool):
    x = torch.arange(3, device=hw.device()).expand(4, 3)
    assert layout_of([x, x]).size_bytes == 96
    same(through(hw, pool, [x])[0], x)


# --- 11: the codec --------------------------------------------------------------------------------


def test_11_the_codec_takes_float8_and_does_not_copy():
    x = filled(torch.float8_e4m3fn, (100, 100))
    frames = pack_tensors([x])
    assert frames[1].ctypes.data == x.data_ptr()
    received = [bytes(frames[0]), bytearray(frames[1])]
    got = unpack_tensors(received)[0]
    assert got.data_ptr() == ctypes.addressof(ctypes.c_char.from_buffer(received[1]))
    same(got, x)


# --- 12: the result aliases the slot --------------------------------------------------------------


@pytest.mark.parametrize("name", ["with its index", "without"])
def test_12_a_result_on_the_pools_own_device_is_not_the_slot(hw, pool, name):
    own = pool._device
    device = own.type if name == "without" else str(own)
    with pool.allocate(64) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [torch.full((16,), 7.0)])
        got, event = pool.read_tensors_from_manifest(lease, manifest, device)
        hw.synchronize_event(event)
        assert got[0].data_ptr() != lease.memory.data_ptr()
    with pool.allocate(64) as following:
        assert following.offset == lease.offset
        pool.write_tensors_from_device(following, [torch.full((16,), 8.0)])
        hw.synchronize()
        assert got[0].tolist() == [7] * 16


def test_12_a_view_keeps_its_slot_from_the_next_tenant(pool):
    with pool.allocate(pool.size_bytes // 2) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [torch.full((16,), 7.0)])
        view = pool.read_tensors_from_manifest(lease, manifest).tree[0]
    with pool.allocate(pool.size_bytes // 2) as following:
        assert following.offset != lease.offset
        following.memory.zero_()
        assert view.tolist() == [7] * 16
    del view


# --- 13: slots in flight --------------------------------------------------------------------------


def test_13_a_request_with_a_lease_may_have_another_and_neither_is_lost(pool):
    leases = [pool.allocate(64, "same"), pool.allocate(64, "same")]
    assert pool.leases("same") == leases
    for lease in leases:
        pool.free(lease)


def test_13_a_slot_freed_during_its_push_is_not_given_to_another(hw, pool):
    lease = pool.allocate(pool.size_bytes // 2)
    pool.write_tensors_from_device(lease, [torch.ones(3)])
    source = lease.payload
    pool.quarantine(lease, "push 1")
    pool.free(lease)
    with pool.allocate(pool.size_bytes // 2) as other:
        pool.write_tensors_from_device(other, [torch.full((3,), 666.0)])
        assert source.view(torch.float32).tolist() == [1, 1, 1]  # what the push reads
    del source
    pool.release(lease, "push 1")


def test_13_a_slot_that_a_peer_writes_late_is_not_given_to_another(pool):
    lease = pool.allocate(pool.size_bytes // 2)
    address = lease.memory.data_ptr()
    pool.quarantine(lease, "a peer")
    pool.free(lease)
    with pool.allocate(pool.size_bytes // 2) as other:
        other.memory.zero_()
        pool._backend.synchronize()
        ctypes.memset(address, 66, 64)
        assert not other.memory.any().item()
    pool.release(lease, "a peer")


def test_13_a_stale_handle_frees_nothing(pool):
    lease = pool.allocate(pool.size_bytes)
    pool.free(lease)
    with pool.allocate(pool.size_bytes) as other:
        with pytest.raises(LeaseError):
            pool.free(lease)
        with pytest.raises(LeaseError):
            pool.lease(bytes(lease))
        assert pool.leases() == [other]


def test_13_more_than_the_slot_is_not_taken_and_the_neighbour_keeps_its_bytes(pool):
    with pool.allocate(64) as lease, pool.allocate(64) as neighbour:
        neighbour.memory.fill_(1)
        for use in (
            lambda: pool.write_tensors_from_device(lease, [torch.zeros(32)]),
            lambda: pool.write_tensor(lease, torch.zeros(16), 4),
            lambda: lease.mark_received(65),
        ):
            with pytest.raises(ArgumentValueError, match="at most 64"):
                use()
        assert lease.memory.untyped_storage().nbytes() == 64  # no view reaches beyond
        assert bits(neighbour.memory) == [1] * 64


def test_13_a_tensor_made_for_the_copy_is_not_reused_before_it_has_run(hw, pool, in_any_order):
    side = hw.create_stream()
    x = torch.ones(4000, dtype=torch.complex64, device=hw.device())
    with pool.allocate(1 << 15) as lease:
        manifest, _ = pool.write_tensors_from_device(lease, [x.conj()], side)
        torch.zeros(4000, dtype=torch.complex64, device=hw.device())
        got, event = pool.read_tensors_from_manifest(lease, manifest, "cpu")
        hw.synchronize_event(event)
        assert got[0].sum() == 4000


# --- 14: bytes of the request before --------------------------------------------------------------


def test_14_only_used_bytes_are_sent_and_none_of_the_tenant_before(hw, pool):
    sent = [filled(torch.uint8, (5001,)), filled(torch.uint8, (4999,)), filled(torch.uint8, (3,))]
    with pool.allocate(pool.size_bytes) as lease:
        lease.memory.fill_(0xEE)
    with pool.allocate(3 * 8192) as lease:
        for device in ("cpu", hw.device()):
            tree = [one.to(device) for one in sent]
            manifest, _ = pool.write_tensors_from_device(lease, tree)
            payload = bytes(bits(lease.payload))
            assert len(payload) <= 1.02 * (5001 + 4999 + 3)
            for start, end in manifest.layout.gaps():
                assert not any(payload[start:end])
            covered = sum(end - start for start, end in manifest.layout.gaps()) + 5001 + 4999 + 3
            assert covered == len(payload)


def test_14_a_gap_before_a_single_tensor_is_cleared(pool):
    with pool.allocate(64) as lease:
        pool.write_tensor(lease, torch.ones(4, dtype=torch.uint8), byte_offset=8)
        assert bits(lease.payload) == [0] * 8 + [1] * 4


# --- (f): the allocator ---------------------------------------------------------------------------


def test_f_blocks_of_any_size_take_no_power_of_two():
    choose = torch.Generator().manual_seed(0)
    sizes = torch.randint(MIB // 10, 30 * MIB, (500,), generator=choose).tolist()
    allocator = RangeAllocator(1 << 40)
    for size in sizes:
        allocator.allocate(size)
    assert allocator.stats().waste <= 1.001


# --- (g): manifests of a peer ---------------------------------------------------------------------


def test_g_a_manifest_on_the_wire_has_no_offset_to_forge(pool):
    manifest, _ = manifest_of([torch.zeros(2000), torch.zeros(3)])
    theirs = decode_manifest(encode_manifest(manifest), 1 << 14)
    assert theirs == manifest
    assert b"\x1f\x40" not in encode_manifest(manifest)  # 8000, where the second one lies


@pytest.mark.parametrize("offset", [-64, 64, 1 << 40])
def test_g_a_manifest_that_reaches_into_another_slot_is_refused(pool, offset):
    from msgspec.structs import replace

    manifest, _ = manifest_of([torch.zeros(3)])
    entry = replace(manifest.layout.entries[0], offset=offset)
    forged = replace(manifest, layout=replace(manifest.layout, entries=(entry,)))
    with pool.allocate(64) as lease, pool.allocate(64):
        lease.mark_received(64)
        with pytest.raises(ArgumentValueError, match="offset"):
            pool.read_tensors_from_manifest(lease, forged)


def test_g_a_shape_larger_than_the_slot_is_refused(pool):
    manifest, _ = manifest_of([torch.zeros(1000)])
    with pool.allocate(64) as lease:
        lease.mark_received(64)
        with pytest.raises(ArgumentValueError, match="bytes of tensor 0"):
            pool.read_tensors_from_manifest(lease, manifest)


@pytest.mark.parametrize("count", [30_000_000, -1, 0])
def test_g_a_number_of_tensors_that_are_not_there_is_refused(pool, count):
    import msgspec

    data = msgspec.msgpack.encode([1, ["l", ["x", count]], [[1, ["uint8", [1], None]]], [[0, 1]]])
    manifest = decode_manifest(data, 64)
    with pool.allocate(64) as lease:
        lease.mark_received(64)
        with pytest.raises(HwcoreError, match="structure"):
            pool.read_tensors_from_manifest(lease, manifest)


def test_g_a_pool_of_one_process_reads_no_lease_of_another_pool(hw, pool):
    other = TransferTensorBuffer(torch.zeros(1 << 10, dtype=torch.uint8), hw)
    with other.allocate(64) as lease:
        manifest, _ = other.write_tensors_from_device(lease, [torch.zeros(3)])
        with pytest.raises(LeaseError):
            pool.read_tensors_from_manifest(lease, manifest)
