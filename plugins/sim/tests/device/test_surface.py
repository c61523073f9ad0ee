"""What else torch offers for a device: each works, or is refused in words. Nothing crashes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hwcore.errors import CapabilityError


def values(tensor):
    return tensor.cpu().tolist()


@pytest.fixture(autouse=True, params=["lazy", "eager"])
def policy(sim, request):
    sim.set_drain_policy(request.param)
    return request.param


@pytest.fixture
def x(sim):
    return torch.arange(4.0, device="sim")


def storage(size=4, fill=7):
    return torch.UntypedStorage(size, device="sim").fill_(fill)


# --- Storages ------------------------------------------------------------------------------------


def test_untyped_storages_are_made_read_and_written(sim):
    made = storage()
    made[1] = 3
    assert made.tolist() == [7, 3, 7, 7]
    assert bytes(made.cpu()) == bytes([7, 3, 7, 7])
    assert made.device == torch.device("sim:0")
    assert "device=sim:0" in repr(made)
    assert torch.UntypedStorage(0, device="sim").nbytes() == 0


def test_untyped_storages_are_copied_both_ways(sim):
    made = storage()
    assert made.clone().tolist() == [7] * 4
    assert copy.deepcopy(made).tolist() == [7] * 4
    host = torch.UntypedStorage(4).fill_(1)
    assert made.copy_(host).tolist() == [1] * 4
    assert host.copy_(storage()).tolist() == [7] * 4
    assert host.sim().device == torch.device("sim:0")


def test_untyped_storages_grow_and_shrink(sim):
    made = storage()
    made.resize_(1000)
    assert made.tolist()[:4] == [7] * 4
    made.resize_(0)
    assert made.nbytes() == 0


def test_a_tensor_whose_storage_was_taken_away_is_an_error_until_it_is_back(x):
    x.untyped_storage().resize_(0)
    for use in (lambda: x + 1, x.tolist, lambda: x.fill_(1), lambda: x.copy_(torch.ones(4))):
        with pytest.raises(RuntimeError, match="expected at least 16, which its tensor needs"):
            use()
    x.untyped_storage().resize_(16)
    assert values(x.fill_(2)) == [2] * 4


def test_storages_are_not_shared_between_processes(x):
    with pytest.raises(RuntimeError, match="only available on CPU"):
        storage()._share_fd_cpu_()
    with pytest.raises(RuntimeError, match="only available on CPU"):
        torch.multiprocessing.get_context("spawn").SimpleQueue().put(x)
    assert x.share_memory_() is x


# --- Copies, pickles and files -------------------------------------------------------------------


def test_tensors_and_modules_are_copied_deeply(x):
    other = copy.deepcopy(x.requires_grad_())
    assert other.requires_grad
    assert other.data_ptr() != x.data_ptr()
    assert values(other.detach()) == [0, 1, 2, 3]
    assert copy.deepcopy(torch.nn.Linear(2, 2).to("sim")).weight.device.type == "sim"


def test_tensors_are_pickled(x):
    other = pickle.loads(pickle.dumps(x[1:]))
    assert other.device == x.device
    assert values(other) == [1, 2, 3]


def test_generators_are_pickled(sim):
    generator = torch.Generator("sim").manual_seed(3)
    other = pickle.loads(pickle.dumps(generator))
    one, two = (torch.rand(2, device="sim", generator=g) for g in (generator, other))
    assert values(one) == values(two)


@pytest.mark.parametrize(
    ("where", "device"),
    [(None, "sim:0"), ("cpu", "cpu"), ("sim:1", "sim:1"), ({"sim:0": "sim:1"}, "sim:1")],
)
def test_tensors_are_saved_and_loaded(x, where, device):
    file = io.BytesIO()
    torch.save({"x": x, "view": x[2:]}, file)
    file.seek(0)
    loaded = torch.load(file, map_location=where)
    assert str(loaded["x"].device) == device
    assert values(loaded["view"]) == [2, 3]
    assert loaded["view"].untyped_storage().data_ptr() == loaded["x"].data_ptr()


def test_a_file_for_a_device_that_is_not_there_is_torchs_own_error(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    with pytest.raises(RuntimeError, match=r"device 9 but torch\.sim\.device_count"):
        torch.load(file, map_location="sim:9")


# --- Views and changes of shape ------------------------------------------------------------------


def test_views_share_memory(x):
    x.view(2, 2)[1].fill_(9)
    x.as_strided((2,), (2,), 0).add_(1)
    assert values(x) == [1, 1, 10, 9]
    assert x[2:].data_ptr() == x.data_ptr() + 8
    assert x[2:]._base is x
    assert values(x.view(torch.int32)) == x.cpu().view(torch.int32).tolist()
    assert values(x.unfold(0, 2, 2)) == [[1, 1], [10, 9]]


def test_a_view_keeps_its_memory(sim, x):
    view = x[2:]
    address = x.data_ptr()
    del x
    assert torch.empty(4, device="sim").data_ptr() != address
    assert values(view) == [2, 3]


def test_shapes_change_in_place(x):
    y = torch.ones(1, 2, device="sim")
    assert y.squeeze_().shape == (2,)
    assert y.unsqueeze_(1).t_().shape == (1, 2)
    assert values(x.resize_(2)) == [0, 1]
    assert values(x.resize_(4)) == [0, 1, 2, 3]
    assert x.resize_(1, 2, 2, 3, memory_format=torch.channels_last).stride() == (12, 1, 6, 2)
    assert values(x.resize_(4)) == [0, 1, 2, 3]


def test_a_shared_storage_grows_for_all_its_tensors(x):
    view = x[2:]
    view.resize_(1000)
    assert values(view)[:2] == [2, 3]
    x.fill_(5)
    assert values(view)[:2] == [5, 5]


def test_set_takes_another_storage(x):
    y = torch.empty(0, device="sim")
    assert values(y.set_(x)) == [0, 1, 2, 3]
    assert values(y.set_(x.untyped_storage(), 1, (2,), (2,))) == [1, 3]
    assert y.set_().shape == (0,)
    y.set_(torch.UntypedStorage(20, device="sim"), 0, (5,), (1,)).fill_(1)
    assert values(y) == [1] * 5


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.set_(torch.UntypedStorage(16)),
        lambda x: x.set_(torch.ones(4)),
        lambda x: x.set_(x.untyped_storage(), -1, (1,), (1,)),
        lambda x: x.as_strided((100,), (1,)),
        lambda x: x.resize_(-1),
        lambda x: x.resize_(2, memory_format=torch.preserve_format),
        lambda x: setattr(x, "data", torch.ones(4)),
        lambda x: torch.empty(-1, device="sim"),
        lambda x: torch.empty((1 << 40, 1 << 40), device="sim"),
        lambda x: x.copy_(torch.ones(5)),
        lambda x: torch.empty(2, device="sim", pin_memory=True),
        lambda x: x.numpy(),
        lambda x: x.__array__(),
        lambda x: torch.from_dlpack(x),
        lambda x: x.resize_(1 << 60),
    ],
)
def test_what_cannot_be_is_an_error_and_changes_nothing(x, call):
    with pytest.raises((RuntimeError, TypeError, ValueError, BufferError)):
        call(x)
    assert values(x) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.to_sparse(),
        lambda x: x.cpu().to_sparse().to("sim"),
        lambda x: x.view(2, 2).to_sparse_csr(),
        lambda x: torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2,)).to("sim"),
        lambda x: torch.empty(2, layout=torch.sparse_coo, device="sim"),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x.to_mkldnn(),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's own, about its sparse and quantized tensors
def test_layouts_that_the_device_lacks_are_refused_in_words(x, call):
    with pytest.raises(NotImplementedError, match="sim"):
        call(x)
    assert values(x) == [0, 1, 2, 3]


# --- Kinds of values -----------------------------------------------------------------------------


def test_conjugated_and_negated_views_are_seen_as_such(sim):
    z = torch.tensor([1 + 2j, 3 - 1j], device="sim")
    assert values(z.conj()) == [1 - 2j, 3 + 1j]
    assert values(z.conj() + 1) == [2 - 2j, 4 + 1j]
    assert values(z.conj().imag) == [-2, 1]
    assert values(z.conj().resolve_conj()) == [1 - 2j, 3 + 1j]
    assert torch.tensor([1 + 2j]).conj().to("sim").tolist() == [1 - 2j]
    z.real.fill_(5)
    assert values(z) == [5 + 2j, 5 - 1j]
    z.conj().copy_(torch.tensor([1j, 2j]))
    assert values(z) == [-1j, -2j]


def test_zero_tensors_are_zeros(sim):
    assert values(torch._efficientzerotensor(3, device="sim") + 1) == [1] * 3


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int64", "uint16", "float16", "bfloat16", "float64", "complex64"],
)
def test_every_kind_of_number_goes_there_and_back(dtype):
    x = torch.tensor([0, 1, 1]).to(getattr(torch, dtype))
    assert torch.equal(x.to("sim").cpu(), x)


def test_empty_and_0_dimensional_tensors_compute(sim):
    nothing = torch.empty(0, 3, device="sim")
    assert values(nothing.sum(0)) == [0, 0, 0]
    assert (nothing @ torch.ones(3, 2, device="sim")).shape == (0, 2)
    assert values(torch.cat([torch.empty(0, device="sim"), torch.ones(1, device="sim")])) == [1]
    assert (torch.tensor(2, device="sim") * torch.tensor(1.5)).item() == 3


def test_tensors_are_printed(x):
    assert repr(x) == "tensor([0., 1., 2., 3.], device='sim:0')"
    assert repr(x.bool()[0]) == "tensor(False, device='sim:0')"
    assert repr(torch.empty(0, device="sim")) == "tensor([], device='sim:0')"
    assert f"{x[2]:.1f}" == "2.0"


# --- torch's machinery ---------------------------------------------------------------------------


def test_gradients_flow_and_optimisers_step(sim):
    layer, host = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    host.load_state_dict(layer.state_dict())
    layer.to("sim")
    for module, device in ((layer, "sim"), (host, "cpu")):
        optimiser = torch.optim.AdamW(module.parameters())
        module(torch.ones(1, 3, device=device)).square().sum().backward()
        optimiser.step()
    assert torch.allclose(layer.weight.cpu(), host.weight)


def test_layers_of_every_kind_train(sim):
    image = torch.randn(2, 3, 8, 8, device="sim")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(4, 4, 2, groups=2),
        torch.nn.GroupNorm(2, 4),
        torch.nn.Dropout(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 4),
        torch.nn.LayerNorm(4),
    ).to("sim")
    net(image).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()(image)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_give_what_the_cpu_gives(sim, kind):
    torch.manual_seed(0)
    host = getattr(torch.nn, kind)(3, 5, 2)
    layer = copy.deepcopy(host).to("sim")
    x = torch.randn(4, 2, 3)
    inputs = [x.clone().requires_grad_(), x.to("sim").requires_grad_()]
    for module, given in zip((host, layer), inputs, strict=True):
        module(given)[0].square().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad.cpu(), atol=1e-5)
    for one, other in zip(host.parameters(), layer.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad.cpu(), atol=1e-5)


def test_attention_gives_what_the_cpu_gives(sim):
    torch.manual_seed(0)
    q = torch.randn(1, 2, 4, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    got = attend(*[q.to("sim")] * 3, is_causal=True)
    assert torch.allclose(got.cpu(), attend(q, q, q, is_causal=True), atol=1e-5)


def test_inference_mode_is_seen(x):
    with torch.inference_mode():
        x[1:3].fill_(9)
        y = x + 1
    assert values(y) == [1, 10, 10, 4]
    with pytest.raises(RuntimeError, match="inference tensor"):
        y.add_(1)


def test_autocast_computes_in_the_lower_precision(sim):
    a = torch.ones(2, 2, device="sim")
    with torch.autocast("sim", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert torch.nn.functional.linear(a, a).dtype == torch.bfloat16
        assert (a @ a).softmax(-1).dtype == torch.float32
        assert (a + a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_run(x, backend):
    @torch.compile(backend=backend, fullgraph=True)
    def function(x):
        return (x.sin() * 2 + x.sum()).relu()

    assert torch.allclose(function(x).cpu(), function(x.cpu()))


def test_fake_tensors_have_the_device(sim):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert (torch.empty(3, device="sim") + 1).device.type == "sim"


def test_dispatch_modes_see_the_programs_calls_and_not_the_devices(sim):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        y = torch.ones(2, device="sim") + 1
        torch.accelerator.synchronize()
        y.sum().item()
    assert seen.calls == [
        "aten.ones.default",
        "aten.add.Tensor",
        "aten.sum.default",
        "aten._local_scalar_dense.default",
    ]


def test_transforms_work(x):
    assert values(torch.vmap(lambda a: a * 2)(x)) == [0, 2, 4, 6]
    assert values(torch.func.grad(lambda a: (a * a).sum())(x)) == [0, 2, 4, 6]
    traced = torch.func.functionalize(lambda a: a.clone().add_(1))
    assert values(traced(x)) == [1, 2, 3, 4]


def test_lists_of_tensors_compute_at_once(x):
    assert [values(t) for t in torch._foreach_add([x, x[1:]], 1)] == [[1, 2, 3, 4], [2, 3, 4]]
    torch._foreach_mul_([x], 2)
    assert values(x) == [0, 2, 4, 6]
    assert torch._foreach_norm([x])[0].item() == pytest.approx(56**0.5)


def test_a_data_loader_pins_for_the_device(sim):
    loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2, pin_memory=True)
    assert all(batch.is_pinned() for (batch,) in loader)


def test_a_default_device_is_taken(sim):
    with torch.device("sim:1"):
        assert torch.zeros(2).device == torch.device("sim:1")


def test_torchs_generic_accelerator_functions_work(sim):
    accelerator = torch.accelerator
    assert accelerator.current_accelerator() == torch.device("sim")
    assert accelerator.device_count() == 2
    accelerator.set_device_index(1)
    assert accelerator.current_device_index() == torch.sim.current_device() == 1
    with accelerator.device_index(0):
        assert torch.zeros(1, device="sim").device == torch.device("sim:0")
    assert accelerator.current_device_index() == 1
    accelerator.synchronize()
    accelerator.empty_cache()
    accelerator.empty_host_cache()
    assert "supported_dtypes" in accelerator.get_device_capability()


def test_the_device_module_has_what_programs_call(sim):
    module = torch.get_device_module("sim")
    assert module is torch.sim
    assert module.get_device_name(1) == "simulated sim:1"
    assert module.get_device_properties().total_memory == module.mem_get_info()[1]
    with module.device(1):
        stream = module.Stream(priority=-1)
        assert stream.device == torch.device("sim:1")
        with module.stream(stream):
            assert module.current_stream() == stream
        assert module.current_stream() == module.default_stream()
    event = module.Event(enable_timing=True)
    event.record()
    module.synchronize()
    assert event.query()
    assert torch.ones(1).sim("sim:1").device == torch.device("sim:1")
    with pytest.raises(CapabilityError):
        module.set_device(9)


@pytest.mark.parametrize("index", [2, 5, 100, 200, 256, 300, -2, -3, 1 << 70])
def test_a_device_that_is_not_there_is_refused_by_every_function_of_the_module(sim, index):
    module, state = torch.sim, torch.sim.get_rng_state()
    for use in (
        module.current_stream,
        module.default_stream,
        module.get_device_name,
        module.get_device_properties,
        module.get_rng_state,
        lambda at: module.set_rng_state(state, at),
        module.max_memory_allocated,
        module.mem_get_info,
        module.memory_allocated,
        module.memory_stats,
        module.reset_peak_memory_stats,
        module.set_device,
        module.synchronize,
        module.Stream,
    ):
        with pytest.raises(CapabilityError, match="expected 0 to 1, for there are 2 simulated"):
            use(index)


def test_minus_one_is_the_current_device(sim):
    torch.sim.set_device(1)
    assert torch.sim.get_device_name(-1) == torch.sim.get_device_name() == "simulated sim:1"
