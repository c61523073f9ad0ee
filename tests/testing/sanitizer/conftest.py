import pytest

from hwcore.testing.sanitizer import Sanitizer


@pytest.fixture
def sanitizer(hw):
    """A sanitizer that collects; a test looks at its races itself."""
    with Sanitizer(hw, on_race="collect") as sanitizer:
        yield sanitizer


@pytest.fixture
def streams(hw, sanitizer):
    """The current stream and another, named `main` and `side`."""
    main = hw.current_stream()
    sanitizer.name(main, "main")
    side = hw.create_stream()
    sanitizer.name(side, "side")
    return main, side


@pytest.fixture
def zeros(hw):
    """Make zeros on the device, its making over and done with."""
    import torch

    def make(*shape, **options):
        tensor = torch.zeros(*shape, device=hw.device(), **options)
        hw.synchronize()
        return tensor

    return make
