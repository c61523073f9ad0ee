"""The classes of errors, and the one shape of their messages."""

from __future__ import annotations

import pickle

import pytest

from hwcore import errors

BUILTINS = {
    "AllocationCancelledError": RuntimeError,
    "AllocationTimeoutError": TimeoutError,
    "LateWriteError": TimeoutError,
    "LeaseError": LookupError,
    "ApiVersionError": RuntimeError,
    "ArgumentTypeError": TypeError,
    "ArgumentValueError": ValueError,
    "BackendUnavailableError": RuntimeError,
    "CapabilityError": RuntimeError,
    "CaptureError": RuntimeError,
    "ClosedError": RuntimeError,
    "ConsumeOnceError": RuntimeError,
    "ForkError": RuntimeError,
    "PeerError": ConnectionError,
    "PeerRefusedError": PermissionError,
    "PeerTimeoutError": TimeoutError,
    "PluginDefinitionError": TypeError,
    "PluginLoadError": ImportError,
    "PluginReturnError": ValueError,
    "ProbeError": RuntimeError,
    "RequestError": RuntimeError,
    "RequestTimeoutError": TimeoutError,
    "SelectionError": RuntimeError,
    "SetupError": RuntimeError,
    "StaleGraphError": RuntimeError,
    "TorchImportError": ImportError,
    "TransferAbortedError": RuntimeError,
    "UnknownBackendError": LookupError,
}
CLASSES = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


def test_what_became_of_a_request_survives_a_process_border():
    error = pickle.loads(pickle.dumps(errors.RequestTimeoutError("what", "r", "deadline", True)))
    assert isinstance(error, errors.RequestTimeoutError)
    assert str(error) == "what"
    assert (error.request_id, error.reason, error.retryable) == ("r", "deadline", True)


def test_every_error_is_a_hwcore_error_and_the_builtin_that_fits():
    for name, builtin in BUILTINS.items():
        assert issubclass(CLASSES[name], builtin)
    for name, kind in CLASSES.items():
        assert issubclass(kind, errors.HwcoreError)
        assert kind.__doc__
        assert name in errors.__all__
        assert name in BUILTINS or name in ("HwcoreError", "PluginError")


@pytest.mark.parametrize(
    "kind", [kind for kind in CLASSES.values() if issubclass(kind, errors.PluginError)]
)
def test_an_error_about_a_plugin_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("what", "acme", "probe")))
    assert type(error) is kind
    assert (str(error), error.plugin, error.hook) == ("what", "acme", "probe")
    assert kind("what").hook is None


def test_a_value_is_shown_briefly_even_if_its_repr_raises():
    class Rude:
        def __repr__(self):
            raise ValueError

    assert errors.shown(Rude()) == "<unprintable> (Rude)"
    assert errors.shown("x" * 1000) == "'" + "x" * 198 + "… (str)"
    assert errors.shown(None) == "None (NoneType)"


def test_a_message_says_where_what_came_what_was_expected_and_the_fix():
    text = errors.describe("here", "`size`", -1, "a positive int", "Pass one")
    assert text == "here: `size` got -1 (int); expected a positive int. Pass one."
