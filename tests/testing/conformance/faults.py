"""Plugins that are each wrong in one way: the simulated accelerator with one hook spoilt.

``FAULTS`` holds them by name, each with the hook that the kit has to name. ``SOUND`` holds plugins
that differ from the simulated accelerator's own and are right all the same.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import threading
import time
import weakref

import torch

import hwcore
from hwcore.errors import CapabilityError
from hwcore.graphs.tape import Tape
from hwcore.graphs.tape import is_capturing as tape_is_capturing
from hwcore.kernels import (
    build_tree,
    commit_paths,
    gather_rows,
    mrope_positions,
    verify_tree_greedy,
)
from hwcore.types import (
    Availability,
    CompilePolicy,
    HostMemoryPolicy,
    MemoryInfo,
    PlanStreamPolicy,
    TransferEngineSpec,
)
from hwcore_sim.plugin import SimPlugin

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from sampling_kernel import sampling_kernel

FAULTS = {}
SOUND = {"SimPlugin": SimPlugin}


def fault(hook, *, denied=()):
    """Enter a class in FAULTS; ``denied`` are operators that the device lacks meanwhile."""

    def enter(plugin):
        plugin.expected, plugin.denied = hook, denied
        FAULTS[plugin.__name__] = plugin
        return plugin

    return enter


def sound(*, denied=()):
    """Enter a class in SOUND."""

    def enter(plugin):
        plugin.denied = denied
        SOUND[plugin.__name__] = plugin
        return plugin

    return enter


def implements(function):
    return hwcore.hookimpl(function)


def with_info(**changes):
    """Return a backend_info hook with fields exchanged; sets are added to."""

    @hwcore.hookimpl
    def backend_info(self):
        info = SimPlugin.backend_info(self)
        fields = {**vars(info)}
        for name, value in changes.items():
            fields[name] = fields[name] | value if isinstance(value, frozenset) else value
        return type(info)(**fields)

    return backend_info


# --- Who the backend is ---------------------------------------------------------------------------


@fault("backend_info")
class InfoChanges(SimPlugin):
    asked = 0

    @implements
    def backend_info(self):
        self.asked += 1
        info = SimPlugin.backend_info(self)
        return type(info)(**{**vars(info), "priority": self.asked})


@fault("backend_info")
class ListsTriton(SimPlugin):
    backend_info = with_info(capabilities=frozenset({"triton"}))


@fault("compile_policy")
class ListsCompile(SimPlugin):
    backend_info = with_info(capabilities=frozenset({"compile"}))


@fault("register_host_memory")
class ListsHostRegistration(SimPlugin):
    backend_info = with_info(capabilities=frozenset({"host_registration"}))


@fault("transfer_engines")
class ListsDirectTransfer(SimPlugin):
    backend_info = with_info(capabilities=frozenset({"device_direct_transfer"}))


@fault("graph_capture")
class DeclaresAQuirkItLacks(SimPlugin):
    backend_info = with_info(quirks=frozenset({"capture_executes"}))


@fault("device_string")
class DeclaresDevicesWithoutIndex(SimPlugin):
    backend_info = with_info(quirks=frozenset({"unindexed_device"}))


@fault("probe")
class ProbeSaysNo(SimPlugin):
    @implements
    def probe(self):
        return Availability(ok=False, reason="no device", fix="Find one")


@fault("setup")
class SetupRaises(SimPlugin):
    @implements
    def setup(self):
        message = "no driver"
        raise OSError(message)


# --- Devices --------------------------------------------------------------------------------------


@fault("device_string")
class DeviceStringWithoutIndex(SimPlugin):
    @implements
    def device_string(self, index=None):
        return self.backend_info().device_type


@fault("device_string")
class DeviceStringOffByOne(SimPlugin):
    @implements
    def device_string(self, index=None):
        name = self.backend_info().device_type
        # Right for what activation looks at, which is None and 0.
        return name if index is None else f"{name}:{index - 1 if index else 0}"


@fault("device_count")
class OneDeviceTooMany(SimPlugin):
    @implements
    def device_count(self):
        return torch.accelerator.device_count() + 1


@fault("device_count")
class OneDeviceOfTwo(SimPlugin):
    @implements
    def device_count(self):
        return 1


@fault("is_initialized")
class NeverInitialized(SimPlugin):
    @implements
    def is_initialized(self):
        return False


@fault("set_device")
class SetDeviceDoesNothing(SimPlugin):
    @implements
    def set_device(self, index):
        pass


@fault("set_device")
class SetDeviceLeaksToOtherThreads(SimPlugin):
    index = 0

    @implements
    def set_device(self, index):
        self.index = index
        torch.accelerator.set_device_index(index)

    @implements
    def device_string(self, index=None):
        name = self.backend_info().device_type
        return f"{name}:{self.index if index is None else index}"


@fault("memory_info")
class MemorySwapped(SimPlugin):
    @implements
    def memory_info(self, index=None):
        free, total = torch.accelerator.get_memory_info(index)
        return MemoryInfo(free_bytes=total, total_bytes=free)


@fault("memory_info")
class MemoryInMebibytes(SimPlugin):
    @implements
    def memory_info(self, index=None):
        free, total = torch.accelerator.get_memory_info(index)
        return MemoryInfo(free_bytes=free >> 20, total_bytes=total >> 20)


@fault("memory_info")
class MemoryOfDeviceZero(SimPlugin):
    @implements
    def memory_info(self, index=None):
        free, total = torch.accelerator.get_memory_info(0)
        return MemoryInfo(free_bytes=free, total_bytes=total)


@fault("manual_seed")
class SeedsTheHostOnly(SimPlugin):
    @implements
    def manual_seed(self, seed):
        torch.default_generator.manual_seed(seed)


@fault("manual_seed")
class SeedsTheDeviceOnly(SimPlugin):
    @implements
    def manual_seed(self, seed):
        torch.get_device_module().manual_seed_all(seed)


class Unseeded(torch.Generator):
    def manual_seed(self, seed):
        return self


@fault("generator")
class GeneratorIgnoresItsSeed(SimPlugin):
    @implements
    def generator(self, index=None):
        return Unseeded(self.backend_info().device_type)


@fault("generator")
class GeneratorOfDeviceZero(SimPlugin):
    @implements
    def generator(self, index=None):
        return torch.Generator(f"{self.backend_info().device_type}:0")


@fault("generator")
class OneGeneratorForAll(SimPlugin):
    @implements
    def generator(self, index=None):
        made = self.__dict__.setdefault("made", {})
        if index not in made:
            name = self.backend_info().device_type
            made[index] = torch.Generator(name if index is None else f"{name}:{index}")
        return made[index]


@fault("synchronize")
class SynchronizeReturnsEarly(SimPlugin):
    @implements
    def synchronize(self, device=None):
        pass


@fault("synchronize")
class SynchronizesOneStream(SimPlugin):
    @implements
    def synchronize(self, device=None):
        torch.accelerator.current_stream(device).synchronize()


@fault("synchronize")
class SynchronizesNothingForNone(SimPlugin):
    @implements
    def synchronize(self, device=None):
        if device is not None:
            torch.accelerator.synchronize(device)


@fault("synchronize")
class SynchronizesTheCurrentDevice(SimPlugin):
    @implements
    def synchronize(self, device=None):
        torch.accelerator.synchronize()


@fault("device_string")
class DeviceStringOfDeviceZero(SimPlugin):
    @implements
    def device_string(self, index=None):
        return f"{self.backend_info().device_type}:{index or 0}"


@fault("memory_info")
class MemoryOfDeviceZeroForNone(SimPlugin):
    @implements
    def memory_info(self, index=None):
        free, total = torch.accelerator.get_memory_info(index or 0)
        return MemoryInfo(free_bytes=free, total_bytes=total)


@fault("generator")
class GeneratorOfDeviceZeroForNone(SimPlugin):
    @implements
    def generator(self, index=None):
        return torch.Generator(f"{self.backend_info().device_type}:{index or 0}")


# --- Streams and events ---------------------------------------------------------------------------


@fault("create_stream")
class OneStreamForAll(SimPlugin):
    @implements
    def create_stream(self, device=None, priority=0):
        made = self.__dict__.setdefault("streams", {})
        device = torch.device(self.backend_info().device_type) if device is None else device
        return made.setdefault(device, torch.Stream(device))


@fault("create_stream")
class StreamOnDeviceZero(SimPlugin):
    @implements
    def create_stream(self, device=None, priority=0):
        return torch.Stream(f"{self.backend_info().device_type}:0")


@fault("create_stream")
class StreamOnDeviceZeroForNone(SimPlugin):
    @implements
    def create_stream(self, device=None, priority=0):
        device = device or torch.device(self.backend_info().device_type, 0)
        return torch.Stream(device, priority=priority)


class StreamThatKnowsItsPriority(torch.Stream):
    priority = 0


@fault("create_stream")
class PriorityForgotten(SimPlugin):
    @implements
    def create_stream(self, device=None, priority=0):
        device = torch.device(self.backend_info().device_type) if device is None else device
        return StreamThatKnowsItsPriority(device)


class EventOfDeviceZero(torch.Event):
    """As of drivers whose events belong to a device: torch's own takes the first stream's."""

    def record(self, stream=None):
        if stream is not None and stream.device.index != 0:
            message = "the event is of device 0"
            raise RuntimeError(message)
        super().record(stream)


@fault("create_event")
class EventOnDeviceZero(SimPlugin):
    @implements
    def create_event(self, device=None, enable_timing=False, blocking=False):
        kind = torch.Event if enable_timing else EventOfDeviceZero  # torch times its own alone
        return kind(device, enable_timing=enable_timing, blocking=blocking)


@fault("create_event")
class OneEventForAll(SimPlugin):
    @implements
    def create_event(self, device=None, enable_timing=False, blocking=False):
        if enable_timing:
            return torch.Event(device, enable_timing=True)
        self.event = self.__dict__.get("event") or torch.Event(device)
        return self.event


class EventInSeconds(torch.Event):
    def elapsed_time(self, end_event):
        return super().elapsed_time(end_event) / 1e3


@fault("create_event")
class ElapsedTimeInSeconds(SimPlugin):
    @implements
    def create_event(self, device=None, enable_timing=False, blocking=False):
        return EventInSeconds(device, enable_timing=enable_timing)


class EventThatSpins(torch.Event):
    def synchronize(self):
        while True:
            time.sleep(0.001)


@fault("synchronize_event")
class BlockingEventSpinsForever(SimPlugin):
    @implements
    def create_event(self, device=None, enable_timing=False, blocking=False, interprocess=False):
        if interprocess:
            raise CapabilityError
        kind = EventThatSpins if blocking else torch.Event
        return kind(device, enable_timing=enable_timing)


@fault("create_event")
class EventForOtherProcessesHasNoHandle(SimPlugin):
    @implements
    def create_event(self, device=None, enable_timing=False, blocking=False, interprocess=False):
        return torch.Event(device, enable_timing=enable_timing, blocking=blocking)


@fault("current_stream")
class CurrentStreamIgnoresTheDevice(SimPlugin):
    @implements
    def current_stream(self, device=None):
        return torch.accelerator.current_stream()


@fault("current_stream")
class CurrentStreamIgnoresTheContext(SimPlugin):
    @implements
    def current_stream(self, device=None):
        return self.__dict__.setdefault("first", torch.accelerator.current_stream(device))


@fault("current_stream")
class CurrentStreamOfTheProcess(SimPlugin):
    """Right in the thread that entered a stream, wrong in those that did not."""

    @implements
    def current_stream(self, device=None):
        here, thread = torch.accelerator.current_stream(device), threading.get_ident()
        if here.stream_id:
            self.last = (thread, here)
        where, last = self.__dict__.get("last", (thread, here))
        return here if where == thread else last


@fault("current_stream")  # seen when activated, by what is current within stream_context()
class ContextDoesNothing(SimPlugin):
    @implements
    def stream_context(self, stream):
        return contextlib.nullcontext(stream)


@fault("stream_context")
class ContextNotRestoredAfterAnException(SimPlugin):
    @implements
    @contextlib.contextmanager
    def stream_context(self, stream):
        stream.__enter__()
        yield stream
        stream.__exit__(None, None, None)


@fault("stream_context")
class ContextKeepsTheDevice(SimPlugin):
    @implements
    @contextlib.contextmanager
    def stream_context(self, stream):
        before = torch.accelerator.current_device_index()
        with stream:
            torch.accelerator.set_device_index(before)
            yield stream


@fault("stream_context")
class ContextLeaksIntoOtherThreads(SimPlugin):
    @implements
    @contextlib.contextmanager
    def stream_context(self, stream):
        entered = self.__dict__.setdefault("entered", [])
        entered.append(stream)
        try:
            with stream:
                yield stream
        finally:
            entered.pop()

    @implements
    def current_stream(self, device=None):
        here, entered = torch.accelerator.current_stream(device), self.__dict__.get("entered")
        return entered[-1] if entered and not here.stream_id else here


@fault("stream_context")
class ContextSwallowsExceptions(SimPlugin):
    @implements
    @contextlib.contextmanager
    def stream_context(self, stream):
        with contextlib.suppress(Exception), stream:
            yield stream


@fault("record_event")
class EventRecordedOnTheWrongStream(SimPlugin):
    @implements
    def record_event(self, event, stream=None):
        event.record(torch.accelerator.current_stream())


@fault("record_event")
class EventRecordedOnce(SimPlugin):
    @implements
    def record_event(self, event, stream=None):
        recorded = self.__dict__.setdefault("recorded", weakref.WeakSet())
        if event not in recorded:
            recorded.add(event)
            event.record(stream)


@fault("record_event")
class RecordBlocksTheHost(SimPlugin):
    @implements
    def record_event(self, event, stream=None):
        event.record(stream)
        event.synchronize()


@fault("wait_event")
class WaitEventDoesNothing(SimPlugin):
    @implements
    def wait_event(self, event, stream=None):
        pass


@fault("wait_event")
class WaitEventOfTheCurrentStream(SimPlugin):
    @implements
    def wait_event(self, event, stream=None):
        event.wait(torch.accelerator.current_stream())


@fault("wait_event")
class WaitEventBlocksTheHost(SimPlugin):
    @implements
    def wait_event(self, event, stream=None):
        event.synchronize()


@fault("wait_event")
class WaitEventDroppedAcrossDevices(SimPlugin):
    @implements
    def wait_event(self, event, stream=None):
        stream = stream or torch.accelerator.current_stream()
        if event.device == stream.device:
            event.wait(stream)


@fault("wait_event")
class WaitEventMovedByALaterRecord(SimPlugin):
    @implements
    def wait_event(self, event, stream=None):
        stream = stream or torch.accelerator.current_stream()
        event.wait(stream)
        waits = self.__dict__.setdefault("waits", weakref.WeakKeyDictionary())
        waits.setdefault(event, []).append(stream)

    @implements
    def record_event(self, event, stream=None):
        event.record(stream)
        for waiter in self.__dict__.get("waits", {}).get(event, []):
            event.wait(waiter)


@fault("wait_stream")
class WaitStreamDoesNothing(SimPlugin):
    @implements
    def wait_stream(self, waiter, producer):
        pass


@fault("wait_stream")
class WaitStreamReversed(SimPlugin):
    @implements
    def wait_stream(self, waiter, producer):
        producer.wait_stream(waiter)


@fault("wait_stream")
class WaitStreamBlocksTheHost(SimPlugin):
    @implements
    def wait_stream(self, waiter, producer):
        producer.synchronize()


@fault("synchronize_stream")
class SynchronizeStreamDoesNothing(SimPlugin):
    @implements
    def synchronize_stream(self, stream):
        pass


@fault("synchronize_event")
class SynchronizeEventDoesNothing(SimPlugin):
    @implements
    def synchronize_event(self, event):
        pass


@fault("query_event")
class QueryAlwaysTrue(SimPlugin):
    @implements
    def query_event(self, event):
        return True


@fault("query_event")
class QueryAlwaysFalse(SimPlugin):
    @implements
    def query_event(self, event):
        return False


@fault("query_event")
class QueryStaysTrue(SimPlugin):
    """Once reached, reached for ever, though it was recorded again."""

    @implements
    def query_event(self, event):
        reached = self.__dict__.setdefault("reached", weakref.WeakSet())
        if event not in reached and event.query():
            reached.add(event)
        return event in reached


@fault("query_event")
class QueryWaits(SimPlugin):
    @implements
    def query_event(self, event):
        event.synchronize()
        return True


@fault("record_stream")
class RecordStreamDoesNothing(SimPlugin):
    @implements
    def record_stream(self, tensor, stream):
        pass


@fault("record_stream")
class RecordStreamDoesNothingForViews(SimPlugin):
    @implements
    def record_stream(self, tensor, stream):
        if tensor._base is None:
            tensor.record_stream(stream)


@fault("record_stream")
class RecordStreamRefusesViews(SimPlugin):
    @implements
    def record_stream(self, tensor, stream):
        if not tensor.is_contiguous():
            message = "cannot record a view"
            raise RuntimeError(message)
        tensor.record_stream(stream)


# --- Compilation and operators --------------------------------------------------------------------


@fault("compile_policy")
class CompilePolicyChangesItsMind(SimPlugin):
    asked = 0

    @implements
    def compile_policy(self, request):
        self.asked += 1
        return CompilePolicy(enabled=False, reason=f"asked {self.asked} times")


@fault("compile_policy")
class CompilerThatDoesNotKnowTheDevice(SimPlugin):
    @implements
    def compile_policy(self, request):
        return CompilePolicy(enabled=True, backend="no_such_compiler")


@fault("compile_policy")
class CompilerOffWithoutReasonForSome(SimPlugin):
    @implements
    def compile_policy(self, request):
        return CompilePolicy(enabled=False, reason="" if request.name == "gather" else "off")


@fault("compile_policy")
class CompilePolicyRefusesAMode(SimPlugin):
    @implements
    def compile_policy(self, request):
        if request.mode not in (None, "default", "max-autotune"):
            raise ValueError(request.mode)
        return CompilePolicy(enabled=False, reason="off")


@fault("needs_cpu_fallback")
class NoFallbackForDeviceTensors(SimPlugin):
    @implements
    def needs_cpu_fallback(self, tensor, purpose):
        return False


@fault("needs_cpu_fallback")
class FallbackForCpuTensors(SimPlugin):
    @implements
    def needs_cpu_fallback(self, tensor, purpose):
        return purpose in ("serialize", "numpy") and tensor.numel() > 1


@fault("needs_cpu_fallback", denied=("topk",))
class MissingOperatorUnmentioned(SimPlugin):
    @implements
    def needs_cpu_fallback(self, tensor, purpose):
        return purpose in ("serialize", "numpy") and tensor.device.type != "cpu"


@fault("needs_cpu_fallback")
class FallbackRaisesForUnknownOperators(SimPlugin):
    @implements
    def needs_cpu_fallback(self, tensor, purpose):
        if purpose == "no_such_operator":
            raise KeyError(purpose)
        return SimPlugin.needs_cpu_fallback(self, tensor, purpose)


def with_kernel(name, kernel):
    @hwcore.hookimpl
    def kernels(self):
        return {name: kernel}

    return kernels


def with_sampling(**fault):
    return with_kernel("verify_tree_sampling", sampling_kernel(**fault))


def changed(results, place, change):
    """Return the results of a verification, one of them changed."""
    return (*results[:place], change(results[place]), *results[place + 1 :])


LENS = 2  # where accept_lens are among the results


def wrong_dtype(*args):
    return changed(verify_tree_greedy(*args), LENS, lambda lens: lens.to(torch.int64))


def wrong_value(*args):
    return changed(verify_tree_greedy(*args), LENS, lambda lens: lens + (lens > 1))


def on_the_host(*args):
    return changed(verify_tree_greedy(*args), LENS, torch.Tensor.cpu)


def breaks_on_empty(*args):
    if args[0].shape[0] == 0:
        message = "grid of 0 blocks"
        raise RuntimeError(message)
    return verify_tree_greedy(*args)


def takes_contiguous_only(*links_and_target):
    # What a kernel does that goes by the pointer and the shape.
    *links, target, steps = links_and_target
    flat = torch.as_strided(target, target.shape, torch.empty(target.shape).stride())
    return verify_tree_greedy(*links, flat, steps)


def writes_to_its_logits(*args):
    results = verify_tree_greedy(*args)
    args[4][..., :1].fill_(0)
    return results


@fault("kernels")
class KernelOfAWrongDtype(SimPlugin):
    kernels = with_kernel("verify_tree_greedy", wrong_dtype)


@fault("kernels")
class KernelOfAWrongValue(SimPlugin):
    kernels = with_kernel("verify_tree_greedy", wrong_value)


@fault("kernels")
class KernelBreaksOnAnEmptyBatch(SimPlugin):
    kernels = with_kernel("verify_tree_greedy", breaks_on_empty)


@fault("kernels")
class KernelTakesContiguousInputsOnly(SimPlugin):
    kernels = with_kernel("verify_tree_greedy", takes_contiguous_only)


@fault("kernels")
class KernelAnswersOnTheHost(SimPlugin):
    kernels = with_kernel("verify_tree_greedy", on_the_host)


@fault("kernels")
class KernelWritesToItsLogits(SimPlugin):
    kernels = with_kernel("verify_tree_greedy", writes_to_its_logits)


@fault("kernels")
class KernelOfAnUnknownName(SimPlugin):
    kernels = with_kernel("verify_tree_gredy", verify_tree_greedy)


def prefers_the_highest_token(draft_tokens, parents, next_token, next_sibling, target, steps):
    if target.is_floating_point():
        turned = target.flip(2).argmax(2)
        target = target.shape[2] - 1 - turned
    return verify_tree_greedy(draft_tokens, parents, next_token, next_sibling, target, steps)


@fault("kernels")
class GreedyTakesTheHighestOfEqualLogits(SimPlugin):
    kernels = with_kernel("verify_tree_greedy", prefers_the_highest_token)


@fault("kernels")
class SamplingAcceptsAtTheCoin(SimPlugin):
    """`<=` instead of `<`."""

    kernels = with_sampling(accepts=torch.le)


@fault("kernels")
class SamplingAcceptsAtTheCoinWithoutMass(SimPlugin):
    kernels = with_sampling(accepts=torch.le, massless_too=True)


@fault("kernels")
class SamplingKeepsTheResidual(SimPlugin):
    kernels = with_sampling(residual_kept=True)


@fault("kernels")
class SamplingTakesTheArgmax(SimPlugin):
    kernels = with_sampling(argmax=True)


@fault("kernels")
class SamplingUsesACoinTwice(SimPlugin):
    kernels = with_sampling(coin_reused=True)


@fault("kernels")
class SamplingCountsDuplicatesTwice(SimPlugin):
    kernels = with_sampling(duplicates_count=True)


@fault("kernels")
class SamplingFallsThrough(SimPlugin):
    kernels = with_sampling(falls_through=True)


@fault("kernels")
class SamplingReversesSiblings(SimPlugin):
    kernels = with_sampling(siblings_reversed=True)


@fault("kernels")
class SamplingReadsTheBonusWithAnotherStride(SimPlugin):
    kernels = with_sampling(bonus_stride=True)


def forgets_padding(parents, seq_lens, steps, mode, total):
    positions, mask, first, sibling = build_tree(parents, seq_lens, steps, mode, total)
    return (
        positions + (parents < 0) * (torch.arange(parents.shape[1], device=parents.device) > 0),
        mask,
        first,
        sibling,
    )


def moves_to_the_end(predict, index, accept_lens, seq_lens, slots, page_size):
    results = commit_paths(predict, index, accept_lens, seq_lens, slots, page_size)
    if slots is None:
        return results
    return (*results[:4], slots.flip(1)[:, : index.shape[1]].contiguous())


def counts_no_starts(deltas, rows, positions, starts):
    if starts is None or len(rows) == 0:
        return mrope_positions(deltas, rows, positions, starts)
    return (positions + deltas[rows[0]]).repeat(3, 1)


@fault("kernels")
class TreeCountsPaddingAsDeep(SimPlugin):
    kernels = with_kernel("build_tree", forgets_padding)


@fault("kernels")
class CommitMovesToTheEnd(SimPlugin):
    kernels = with_kernel("commit_paths", moves_to_the_end)


@fault("kernels")
class MropeGivesAllTheFirstDelta(SimPlugin):
    kernels = with_kernel("mrope_positions", counts_no_starts)


def gathers_the_row_before(rows, indices, out):
    return gather_rows(rows, (indices - 1).clamp(min=0), out)


def forgets_to_invalidate(guards, state, indices, outcome):
    return torch.amin(guards, 0, out=outcome), state


@fault("kernels")
class GatherOfTheWrongRow(SimPlugin):
    kernels = with_kernel("gather_rows", gathers_the_row_before)


@fault("kernels")
class KernelThatLeavesRowsFull(SimPlugin):
    kernels = with_kernel("assert_and_invalidate", forgets_to_invalidate)


@fault("kernels", denied=("where",))
class LacksWhatTheReferenceNeeds(SimPlugin):
    """It says so by needs_cpu_fallback(), which is not asked of what every device has."""


# --- Host memory ----------------------------------------------------------------------------------


@fault("pin_memory")
class PinReturnsUnpinned(SimPlugin):
    @implements
    def pin_memory(self, tensor):
        return tensor


@fault("pin_memory")
class PinLosesTheValues(SimPlugin):
    @implements
    def pin_memory(self, tensor):
        return torch.empty_like(tensor).fill_(3).pin_memory()


@fault("pin_memory")
class PinCopiesWhatIsPinned(SimPlugin):
    @implements
    def pin_memory(self, tensor):
        return tensor.clone().pin_memory()


@fault("pin_memory")
class PinAliasesItsSource(SimPlugin):
    @implements
    def pin_memory(self, tensor):
        if tensor.is_pinned():
            return tensor
        pinned = tensor.pin_memory()
        tensor.set_(pinned)
        return pinned


@fault("pin_memory")
class PinRefusesEmptyTensors(SimPlugin):
    @implements
    def pin_memory(self, tensor):
        if tensor.numel() == 0:
            message = "cannot pin 0 bytes"
            raise RuntimeError(message)
        return tensor.pin_memory()


@fault("pin_memory")
class PinRefusesStrides(SimPlugin):
    @implements
    def pin_memory(self, tensor):
        if not tensor.is_contiguous():
            message = "cannot pin strided memory"
            raise RuntimeError(message)
        return tensor.pin_memory()


@fault("host_memory_policy")
class PinnedBlockReusedBeforeTheCopy(SimPlugin):
    """A pinned pool that hands its block out again as soon as the last tensor on it is gone."""

    @implements
    def pin_memory(self, tensor):
        if tensor.is_pinned():
            return tensor
        pool = self.__dict__.setdefault("pool", {})
        form = (tensor.shape, tensor.dtype)
        block = pool.setdefault(form, tensor.clone().pin_memory())
        if sum(1 for user in self.__dict__.setdefault("users", weakref.WeakSet())) == 0:
            handed_out = block.view(block.shape)
            self.users.add(handed_out)
            return handed_out.copy_(tensor)
        return tensor.pin_memory()


@fault("host_memory_policy")
class PolicyDeniesPinning(SimPlugin):
    @implements
    def host_memory_policy(self):
        return HostMemoryPolicy(can_pin=False)


class Closed:
    def close(self):
        pass


@fault("register_host_memory")
class RegistrationClearsTheBuffer(SimPlugin):
    @implements
    def register_host_memory(self, buffer):
        buffer[:] = bytes(len(buffer))
        return Closed()


# --- Graphs ---------------------------------------------------------------------------------------


@fault("create_graph")
class OneGraphForAll(SimPlugin):
    @implements
    def create_graph(self):
        self.graph = self.__dict__.get("graph") or SimPlugin.create_graph(self)
        return self.graph


@fault("graph_pool")
class PoolThatFails(SimPlugin):
    @implements
    def graph_pool(self):
        message = "out of pools"
        raise RuntimeError(message)


@fault("graph_capture")
class CaptureExecutesUndeclared(SimPlugin):
    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        outputs = graph.capture(fn, pool=pool, stream=stream)
        graph.replay()
        return outputs


@fault("graph_capture")
class CaptureCallsTheFunctionTwice(SimPlugin):
    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        fn()
        return graph.capture(fn, pool=pool, stream=stream)


@fault("graph_capture")
class CaptureIgnoresTheStream(SimPlugin):
    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        return graph.capture(fn, pool=pool, stream=torch.Stream(self.backend_info().device_type))


@fault("graph_capture")
class CaptureNeedsAStream(SimPlugin):
    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        with stream:
            return graph.capture(fn, pool=pool, stream=stream)


@fault("graph_capture")
class CaptureTurnsTuplesIntoLists(SimPlugin):
    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        outputs = graph.capture(fn, pool=pool, stream=stream)
        return list(outputs) if isinstance(outputs, tuple) else outputs


@fault("graph_capture")
class CaptureLeavesTheStreamAfterAnException(SimPlugin):
    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        try:
            return graph.capture(fn, pool=pool, stream=stream)
        except Exception:
            stream.__enter__()
            raise


@fault("graph_capture")
class CaptureSwallowsExceptions(SimPlugin):
    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        with contextlib.suppress(Exception):
            return graph.capture(fn, pool=pool, stream=stream)


@fault("is_capturing")
class NeverCapturing(SimPlugin):
    @implements
    def is_capturing(self):
        return False


@fault("is_capturing")
class CapturingInEveryThread(SimPlugin):
    capturing = False

    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        self.capturing = True
        try:
            return graph.capture(fn, pool=pool, stream=stream)
        finally:
            self.capturing = False

    @implements
    def is_capturing(self):
        return self.capturing


@fault("is_capturing")
class AlwaysCapturing(SimPlugin):
    @implements
    def is_capturing(self):
        return True


@fault("graph_replay")
class ReplayWithStaleInputs(SimPlugin):
    @implements
    def graph_replay(self, graph, buffers=None, batch=None):
        pass


@fault("graph_replay")
class ReplayAllocatesNewOutputs(SimPlugin):
    """What the caller holds is a copy of the graph's outputs, so replays do not reach it."""

    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        outputs = graph.capture(fn, pool=pool, stream=stream)
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, outputs)


@fault("graph_replay")
class ReplayCallsTheFunctionAgain(SimPlugin):
    """Host side effects of the function happen at each replay, as if nothing was captured."""

    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        self.__dict__.setdefault("functions", {})[id(graph)] = fn
        return graph.capture(fn, pool=pool, stream=stream)

    @implements
    def graph_replay(self, graph, buffers=None, batch=None):
        graph.replay()
        self.functions[id(graph)]()


@fault("graph_replay")
class ReplayRunsTwice(SimPlugin):
    @implements
    def graph_replay(self, graph, buffers=None, batch=None):
        graph.replay()
        graph.replay()


@fault("graph_replay")
class ReplayOnAnotherStream(SimPlugin):
    @implements
    def graph_replay(self, graph, buffers=None, batch=None):
        with torch.Stream(self.backend_info().device_type):
            graph.replay()


@fault("graph_replay")
class ReplayOnTheStreamOfCapture(SimPlugin):
    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        stream = stream or torch.Stream(self.backend_info().device_type)
        self.__dict__.setdefault("streams", {})[id(graph)] = stream
        return graph.capture(fn, pool=pool, stream=stream)

    @implements
    def graph_replay(self, graph, buffers=None, batch=None):
        with self.streams[id(graph)]:
            graph.replay()


@fault("graph_replay")
class ReplayBlocksTheHost(SimPlugin):
    @implements
    def graph_replay(self, graph, buffers=None, batch=None):
        graph.replay()
        torch.accelerator.synchronize()


@fault("graph_replay")
class ReplayForgetsWhatWasRecomputed(SimPlugin):
    @implements
    def plan_stream_policy(self):
        return PlanStreamPolicy(recompute_after_join=frozenset({"mrope_positions"}))


@fault("plan_stream_policy")
class PlanStreamPolicyChanges(SimPlugin):
    asked = 0

    @implements
    def plan_stream_policy(self):
        self.asked += 1
        return PlanStreamPolicy(enabled=False, reason=f"asked {self.asked} times")


# --- Other processes ------------------------------------------------------------------------------


@fault("distributed_backend")
class DistributedBackendEmpty(SimPlugin):
    @implements
    def distributed_backend(self):
        return ""


@fault("distributed_backend")
class DistributedBackendUnknown(SimPlugin):
    @implements
    def distributed_backend(self):
        return "glo"


@fault("transfer_engines")
class EngineListedTwice(SimPlugin):
    @implements
    def transfer_engines(self):
        return [TransferEngineSpec(name="shm", protocol="memfd")] * 2


# --- Sound ones -----------------------------------------------------------------------------------


@sound()
class ListsNothing(SimPlugin):
    """Less is claimed than the device can do."""

    @implements
    def backend_info(self):
        info = SimPlugin.backend_info(self)
        return type(info)(**{**vars(info), "capabilities": frozenset()})

    @implements
    def host_memory_policy(self):
        return HostMemoryPolicy()


@sound(denied=("topk", "nonzero", "index_copy", "index_fill_"))
class LacksOperatorsAndSaysSo(SimPlugin):
    """Its own needs_cpu_fallback() asks the device which operators it lacks."""


@sound()
class HasAKernel(SimPlugin):
    kernels = with_kernel("verify_tree_greedy", verify_tree_greedy)


@sound()
class SamplesItsOwnWay(SimPlugin):
    kernels = with_sampling()


@sound()
class CapturesWithTheTape(SimPlugin):
    """The tape does the work while it captures, which the quirk says."""

    backend_info = with_info(quirks=frozenset({"capture_executes"}))

    @implements
    def create_graph(self):
        return Tape()

    @implements
    def graph_capture(self, graph, fn, pool=None, stream=None):
        with stream or contextlib.nullcontext():
            return graph.capture(fn)

    @implements
    def is_capturing(self):
        return tape_is_capturing()


@sound()
class RecomputesAfterTheJoin(SimPlugin):
    @implements
    def plan_stream_policy(self):
        return PlanStreamPolicy(recompute_after_join=frozenset({"mrope_positions"}))

    @implements
    def graph_replay(self, graph, buffers=None, batch=None):
        for name, tensor in (batch.recomputed if batch else {}).items():
            buffers[name].copy_(tensor)
        graph.replay()
