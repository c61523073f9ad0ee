"""What a conformance test is given, and the decorator that makes a method one."""

from __future__ import annotations

import dataclasses
import functools
from concurrent import futures
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, get_args

import pytest
import torch

from hwcore.errors import ArgumentValueError, PluginError, describe
from hwcore.testing.conformance.deadline import DeadlineError, within
from hwcore.testing.conformance.errors import ConformanceError
from hwcore.testing.conformance.late import LateWrite
from hwcore.testing.conformance.trace import Trace, hook_that_raised
from hwcore.types import Capability, Quirk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hwcore.backend import Backend
    from hwcore.testing.conformance.raw import RawAccess
    from hwcore.types import Stream

__all__ = ["Kit", "TestNotes", "conforms"]

_F = TypeVar("_F", bound="Callable[..., None]")
_T = TypeVar("_T")
_SHOWN = 16  # elements


@dataclasses.dataclass
class TestNotes:
    """What one test did, beside passing or failing."""

    __test__ = False  # the name is no test's

    hook: str
    calls: list[str] = dataclasses.field(default_factory=list)
    feature: str | None = None
    quirks: list[str] = dataclasses.field(default_factory=list)
    hung: bool = False


def conforms(
    hook: str, *, needs: str | Sequence[str] = (), patience: float = 1.0
) -> Callable[[_F], _F]:
    """Mark a method of a group as the proof of something about ``hook``.

    The method runs in a thread of its own, so that no stream or device stays current after it, with
    the kit's time limit. Whatever it raises becomes an error that names a hook: the one at fault
    where a check says so, the one that raised, or ``hook``.

    Parameters
    ----------
    hook : str
        What the test is about.
    needs : str or sequence of str
        Capabilities without which the test is skipped, and counted as skipped.
    patience : float
        Multiple of the time limit, for a test that starts a process or a compiler.
    """
    features = (needs,) if isinstance(needs, str) else tuple(needs)
    for feature in features:
        _check_name("needs", feature, get_args(Capability))

    def mark(function: _F) -> _F:
        @functools.wraps(function)
        def test(self: object, kit: Kit, **fixtures: Any) -> None:
            body = functools.partial(function, self, kit, **fixtures)
            kit.run(hook, features, body, patience)

        test.conforms_to, test.patience = hook, patience  # type: ignore[attr-defined]
        return cast("_F", test)

    return mark


class Kit:
    """A backend under test, raw access past it, and the checks that tests make.

    Parameters
    ----------
    backend : Backend
    raw : RawAccess
    timeout_s : float
        Limit for each test.
    loader : str, optional
        Python source of an expression that makes the same backend in another process; without
        it tests that need one are skipped.
    on_enter : callable, optional
        Told each hook that is called, before it runs.

    Attributes
    ----------
    hw : Backend
    notes : TestNotes
        About the test that is running.
    """

    def __init__(
        self,
        backend: Backend,
        raw: RawAccess,
        timeout_s: float = 30.0,
        loader: str | None = None,
        on_enter: Callable[[str], None] | None = None,
    ) -> None:
        self.hw = backend
        self.raw = raw
        self.timeout_s = timeout_s
        self.loader = loader
        self.notes = TestNotes("")
        self._trace = Trace(on_enter)
        backend.register(self._trace.wrappers, "hwcore conformance")

    def avoid(self, hook: str, test: str) -> None:
        """Do not call a hook again: it hung, or ended the process, in ``test``."""
        self._trace.avoid[hook] = test

    def close(self) -> None:
        """Take the tracing off the backend again."""
        self.hw.unregister(self._trace.wrappers)

    @functools.cached_property
    def device(self) -> torch.device:
        """Device 0, where tests put their tensors."""
        return self.hw.device(0)

    @property
    def indices(self) -> tuple[int, ...]:
        """The devices to try: the first, and a second where it is listed and there."""
        several = self.lists("multi_device") and self.hw.device_count() > 1
        return (0, 1) if several else (0,)

    def each_device(self) -> Iterator[torch.device]:
        """Yield each device to try while it is current; torch alone makes it so, and no hook."""
        before = None if self.device.type == "cpu" else torch.accelerator.current_device_index()
        try:
            for index in self.indices:
                if before is None:
                    yield self.device
                else:
                    torch.accelerator.set_device_index(index)
                    yield torch.device(self.hw.info.device_type, index)
        finally:
            if before is not None:
                torch.accelerator.set_device_index(before)

    # --- What a backend says of itself ---

    def lists(self, feature: str) -> bool:
        """Say whether the backend lists a capability."""
        _check_name("feature", feature, get_args(Capability))
        return feature in self.hw.info.capabilities

    def has_quirk(self, quirk: str) -> bool:
        """Say whether the backend declares a quirk; if so, note that this test was adapted."""
        _check_name("quirk", quirk, get_args(Quirk))
        declared = quirk in self.hw.info.quirks
        if declared and quirk not in self.notes.quirks:
            self.notes.quirks.append(quirk)
        return declared

    def skip(self, feature: str, reason: str = "") -> NoReturn:
        """End the test as skipped for something that the backend does not claim to have."""
        self.notes.feature = feature
        pytest.skip(reason or f"the backend does not list `{feature}`")

    # --- Streams and tensors for tests ---

    def stream(self) -> Stream:
        """Return a new stream on device 0."""
        return self.hw.create_stream(self.device)

    def tensor(
        self,
        value: object,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return a tensor, on device 0 or the one given, that has its value already."""
        made = torch.tensor(value, dtype=dtype).to(device or self.device)
        self.raw.settle()
        return made

    def in_thread(self, function: Callable[[], _T]) -> _T:
        """Return what a function returns in a new thread, within the test's time."""
        with futures.ThreadPoolExecutor(1) as threads:
            return threads.submit(function).result()

    def late_write(self, stream: Stream) -> LateWrite:
        """Put slow work in ``stream``, and behind it a write that raw access can look for."""
        return LateWrite(self, stream)

    # --- Checks ---

    def same(
        self, what: str, got: object, expected: object, why: str, fix: str, *, hook: str = ""
    ) -> None:
        """Fail unless two values are equal; of tensors dtype and shape as well."""
        shown_got, shown_expected = _plain(got), _plain(expected)
        if isinstance(got, torch.Tensor) and isinstance(expected, torch.Tensor):
            alike = got.dtype == expected.dtype and got.shape == expected.shape
            if alike and torch.equal(got.cpu(), expected.cpu()):
                return
            if not alike:
                shown_got, shown_expected = _form(got), _form(expected)
            elif got.numel() > _SHOWN:
                differ = got.cpu() != expected.cpu()
                shown_got, shown_expected = (_plain(t.cpu()[differ][:3]) for t in (got, expected))
                what = f"{what}, first of {int(differ.sum())} places that differ"
        elif shown_got == shown_expected:
            return
        self.fail(what, shown_got, f"{shown_expected}, {why}", fix, hook=hook)

    def that(
        self, holds: bool, what: str, got: object, expected: str, fix: str, *, hook: str = ""
    ) -> None:
        """Fail unless ``holds``."""
        if not holds:
            self.fail(what, got, expected, fix, hook=hook)

    def fail(self, what: str, got: object, expected: str, fix: str, *, hook: str = "") -> NoReturn:
        """Fail with a message in the form of hwcore's errors, beginning with a hook."""
        hook = hook or self.notes.hook
        raise ConformanceError(describe(hook, what, _plain(got), expected, fix), hook)

    # --- Running ---

    def run(
        self, hook: str, features: Sequence[str], body: Callable[[], None], patience: float = 1.0
    ) -> None:
        """Run a test's body; see :func:`conforms`."""
        self.notes = notes = TestNotes(hook)
        for feature in features:
            if not self.lists(feature):
                self.skip(feature)
        self._trace.called.clear()

        def settled() -> None:
            if "multi_device" in features and len(self.indices) == 1:
                self.skip("multi_device", "there is one device; the test of device_count says so")
            body()
            self.raw.settle()

        limit_s = self.timeout_s * patience
        try:
            within(limit_s, settled, self._trace.inside)
        except (ConformanceError, pytest.skip.Exception):
            raise
        except DeadlineError as error:
            raise self._hang(error.inside or hook, body, limit_s) from None
        except PluginError as error:
            message = f"{error.hook or hook}: {error}"
            raise ConformanceError(message, error.hook or hook) from error
        except AssertionError as error:
            message = f"{hook}: {str(error) or 'a condition of the test does not hold'}"
            raise ConformanceError(message, hook) from error
        except Exception as error:
            culprit = hook_that_raised(error) or hook
            message = (
                f"{culprit}: the call raised {type(error).__name__}: {error}; expected no "
                f"exception, for the specification allows these arguments. {_RAISED_FIX}."
            )
            raise ConformanceError(message, culprit) from error
        finally:
            notes.calls = sorted(self._trace.called)

    def _hang(self, hook: str, body: Callable[[], None], limit_s: float) -> ConformanceError:
        name = getattr(getattr(body, "func", body), "__name__", "a test")
        self.avoid(hook, name)
        self.notes.hung = True
        return ConformanceError(hang_message(hook, limit_s), hook)


def hang_message(hook: str, limit_s: float) -> str:
    """Return what is said of a hook that did not come back."""
    return (
        f"{hook}: the call got no answer within {limit_s:g} s (--timeout); expected it to "
        f"return. Let it end once the work that it waits for has ended."
    )


_RAISED_FIX = "Implement the hook for them, or do not list the capability that they belong to"


def _plain(value: object) -> object:
    """Return something whose repr is short and says what is in a tensor."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist() if value.numel() <= _SHOWN else _form(value)
    return value


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        expected = f"one of {', '.join(known)}"
        raise ArgumentValueError(
            describe("conformance", f"`{what}`", name, expected, "Correct the test")
        )
