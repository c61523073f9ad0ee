"""Backends of this run's device that answer otherwise."""

import hwcore
from hwcore import discovery


class _Answers:
    """Says of some operators that they run on the CPU, and of others that they do not."""

    def __init__(self, on_cpu, on_device):
        self.on_cpu, self.on_device, self.asked = frozenset(on_cpu), frozenset(on_device), []

    @hwcore.hookimpl(wrapper=True)
    def needs_cpu_fallback(self, tensor, purpose):
        answer = yield
        self.asked.append((tensor.device.type, purpose))
        return purpose in self.on_cpu or (answer and purpose not in self.on_device)


def answering(hw, on_cpu=(), on_device=()):
    """Return a new backend on the same device, and a list of what it is asked from now on."""
    backend = hwcore.Backend(discovery.load(hw.origin), hw.origin)
    backend.generator(None)  # the checks of activation, which ask as well, are over then
    answers = _Answers(on_cpu, on_device)
    backend.register(answers)
    return backend, answers.asked
