"""Compile policy: that it is the same for the same question, and that compiled code is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import hwcore
from hwcore.testing.conformance.kit import conforms
from hwcore.types import CompileRequest

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit


_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Compilation:
    @conforms("compile_policy")
    def test_the_same_request_gets_the_same_policy(self, kit: Kit) -> None:
        request = CompileRequest("model.forward", dynamic=True, mode="max-autotune")
        first, second = kit.hw.compile_policy(request), kit.hw.compile_policy(request)
        fix = "Decide by the request alone"
        kit.same("a second answer", second, first, "the first answer", fix)

    @conforms("compile_policy")
    def test_a_policy_says_why_it_is_off(self, kit: Kit) -> None:
        for name in ("model.forward", "gather", ""):
            policy = kit.hw.compile_policy(CompileRequest(name))
            said = policy.enabled or bool(policy.reason.strip())
            kit.that(said, f"for `{name}`", policy, "a reason where it is off", "Say why")

    @conforms("compile_policy")
    def test_every_request_that_torch_takes_gets_a_policy(self, kit: Kit) -> None:
        for mode in _MODES:
            for dynamic in (None, True, False):
                for fullgraph in (True, False):
                    kit.hw.compile_policy(CompileRequest("model", dynamic, fullgraph, mode))

    @conforms("compile_policy", patience=4)
    def test_a_wrapped_function_gives_the_eager_result_whatever_the_policy(self, kit: Kit) -> None:
        enabled = kit.hw.compile_policy(CompileRequest(_step.__qualname__)).enabled
        if enabled:
            kit.lists("compile") or kit.fail(
                "field `enabled`",
                enabled,
                "False, since the capability `compile` is not listed",
                "List it, or disable compilation with a reason",
            )
        x = kit.tensor([1.0, 2.0, 3.0])
        got = kit.raw.read(hwcore.compile(_step, backend=kit.hw)(x))
        fix = "Disable compilation with a reason, or name a compiler that knows the device"
        expected = _step(torch.tensor([1.0, 2.0, 3.0]))
        kit.that(torch.allclose(got, expected), "the result", got, f"{expected.tolist()}", fix)

    @conforms("compile_policy", needs="compile", patience=4)
    def test_functions_are_compiled_where_compile_is_listed(self, kit: Kit) -> None:
        policy = kit.hw.compile_policy(CompileRequest(_step.__qualname__))
        expected = "enabled=True, since `compile` is listed"
        fix = "Name the compiler, or do not list `compile`"
        kit.that(policy.enabled, "the answer", policy, expected, fix)
        x = kit.tensor([1.0, 2.0, 3.0])
        compiled = torch.compile(
            _step, backend=policy.backend, mode=policy.mode, dynamic=policy.dynamic
        )
        got, eager = kit.raw.read(compiled(x)), kit.raw.read(_step(x))
        close = torch.allclose(got, eager)
        kit.that(close, "the compiled function", got, f"{eager.tolist()}, as eager", fix)


def _step(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x * 2 - 3) + x.sum()
