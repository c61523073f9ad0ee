"""Which operators there are, where they run, what they draw, what they refuse."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, CapabilityError


def values(tensor):
    return tensor.cpu().tolist()


# --- Denied operators ----------------------------------------------------------------------------


def test_a_denied_operator_is_missing_as_vendors_kernels_are(sim):
    x = torch.arange(4.0, device="sim")
    with sim.denied("topk"):
        message = "Could not run 'aten::topk.values' with arguments from the 'sim' backend"
        with pytest.raises(NotImplementedError, match=message) as caught:
            x.topk(2)
        assert 'hwcore_sim.device.allow("aten::topk")' in str(caught.value)
        assert values(x.sort(descending=True)[0]) == [3, 2, 1, 0]
    assert values(x.topk(2)[0]) == [3, 2]


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("aten::topk", lambda x: x.topk(1)),
        ("aten.topk", lambda x: x.topk(1)),
        ("topk.values", lambda x: x.topk(1)),
        ("aten.topk.values", lambda x: x.topk(1)),
        ("aten.topk.default", lambda x: x.topk(1)),
        ("add.Tensor", lambda x: x + x),
        ("add_.Tensor", lambda x: x.add_(x)),
        ("matmul", lambda x: x @ x),
        ("reshape", lambda x: x.reshape(2, 2)),
        ("copy_", lambda x: x.cpu()),
        ("view", lambda x: x.view(2, 2)),
        ("resize_", lambda x: x.clone().resize_(5)),
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("native_dropout", lambda x: torch.native_dropout(x, 0.5, True)),
        ("native_layer_norm", lambda x: torch.native_layer_norm(x, [4], None, None, 0.1)),
        ("empty", lambda x: torch.empty(2, device=x.device)),
        ("empty.memory_format", lambda x: torch.empty(2, device=x.device)),
        ("empty_strided", lambda x: torch.empty_strided((2,), (1,), device=x.device)),
        ("set_", lambda x: torch.empty_like(x).set_(x)),
        ("record_stream", lambda x: x.record_stream(torch.accelerator.current_stream())),
        (
            "_thnn_fused_lstm_cell",
            lambda x: torch.ops.aten._thnn_fused_lstm_cell(x[None], x[None], x[None, :1]),
        ),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_every_kind_of_operator_can_be_denied_by_every_name(sim, op, call, inference):
    x = torch.ones(4, device="sim")
    with torch.inference_mode(inference):
        with sim.denied(op), pytest.raises(NotImplementedError, match="simulated missing kernel"):
            call(x)
        call(x)


def test_denying_one_overload_leaves_the_others(sim):
    x = torch.ones(4, device="sim")
    with sim.denied("sum.dim_IntList"):
        assert x.max().item() == 1
        with pytest.raises(NotImplementedError, match=r"sum\.dim_IntList"):
            x.sum(0)


def test_the_cpu_keeps_what_the_device_is_denied(sim):
    with sim.denied("topk", "matmul"):
        x = torch.arange(4.0)
        assert (x @ x).item() == 14
        assert x.topk(1)[0].item() == 3


def test_deny_stays_until_allow(sim):
    sim.deny("topk", "sort")
    assert sim.denied_ops() == ("aten::sort", "aten::topk")
    sim.allow("topk")
    assert sim.denied_ops() == ("aten::sort",)
    sim.allow()
    assert sim.denied_ops() == ()


def test_contexts_nest_and_leave_what_was_denied_before(sim):
    sim.deny("topk")
    with sim.denied("topk", "sort"), sim.denied("sort"):
        pass
    assert sim.denied_ops() == ("aten::topk",)


def test_is_denied_knows_overloads_and_strange_names(sim):
    sim.deny("topk.values")
    assert sim.is_denied("topk")
    assert sim.is_denied("aten::topk")
    assert not sim.is_denied("sort")
    assert not sim.is_denied("serialize")


def test_an_operator_that_does_not_exist_is_an_error_with_near_matches(sim):
    with pytest.raises(ArgumentValueError, match=r"'topkk'.*Did you mean topk"):
        sim.deny("topkk")
    with pytest.raises(ArgumentTypeError, match="expected an operator's name"):
        sim.deny(3)
    assert sim.denied_ops() == ()
    assert values(torch.ones(1, device="sim")) == [1]


def test_operators_of_others_can_be_denied(sim):
    library = torch.library.Library("simdenied", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CPU")
    x = torch.ones(2, device="sim")
    with sim.denied("simdenied::double"), pytest.raises(NotImplementedError, match="double"):
        torch.ops.simdenied.double(x)
    assert values(torch.ops.simdenied.double(x)) == [2, 2]
    library._destroy()


def test_denying_in_one_thread_while_others_compute_breaks_nothing(sim):
    stop, problems = threading.Event(), []

    def compute():
        x = torch.ones(4, device="sim")
        while not stop.is_set():
            try:
                x.topk(2)[0].sum().item()
            except NotImplementedError:
                pass
            except Exception as error:  # noqa: BLE001
                problems.append(error)

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with sim.denied("topk"):
            pass
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not problems


# --- Devices of a call ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda x, c: x + c,
        lambda x, c: torch.cat([x, c]),
        lambda x, c: x @ c,
        lambda x, c: torch.where(x > 0, x, c),
        lambda x, c: x.gather(0, torch.zeros(2, 2, dtype=torch.long)),
        lambda x, c: c[torch.tensor([0]).to(x.device)],
        lambda x, c: c.clone().add_(x),
        lambda x, c: torch.add(x, x, out=torch.empty(2, 2)),
        lambda x, c: x + c.to("sim:1"),
    ],
)
def test_tensors_of_two_devices_are_torchs_own_error(policy, call):
    x = torch.ones(2, 2, device="sim")
    with pytest.raises(
        RuntimeError, match=r"Expected all tensors to be on the same device|indices"
    ):
        call(x, torch.ones(2, 2))
    assert values(x + 1) == [[2, 2], [2, 2]]


def test_numbers_and_indices_may_be_on_the_cpu(policy):
    x = torch.arange(4.0, device="sim")
    assert values(x + torch.tensor(2.0)) == [2, 3, 4, 5]
    assert values(x[torch.tensor([3, 0])]) == [3, 0]
    x[torch.tensor([1])] = 9
    assert values(x) == [0, 9, 2, 3]


def test_a_number_or_index_of_the_cpus_is_read_at_the_call(sim):
    x, number, index = torch.arange(4.0, device="sim"), torch.tensor(2.0), torch.tensor([1])
    y, z = x + number, x[index]
    number.fill_(100)
    index.fill_(3)
    assert values(y) == [2, 3, 4, 5]
    assert values(z) == [1]


def test_python_numbers_promote_as_on_the_cpu(policy):
    x = torch.ones(2, dtype=torch.int32, device="sim")
    assert (x + 1).dtype == torch.int32
    assert (x + 1.5).dtype == torch.float32
    assert values(x + 1.5) == [2.5, 2.5]
    assert values(2**31 + x.long()) == [2**31 + 1] * 2


def test_a_device_that_is_not_there_is_an_error_and_the_others_work(sim):
    for call in (
        lambda: torch.zeros(1, device="sim:7"),
        lambda: torch.ones(1).to("sim:2"),
        lambda: torch.Generator("sim:2"),
        lambda: torch.Stream("sim:2"),
        lambda: torch.accelerator.set_device_index(2),
        lambda: torch.sim.set_device(-2),
        lambda: torch.sim.synchronize(5),
    ):
        with pytest.raises(CapabilityError, match=r"got -?\d( \(int\))?; expected 0 to 1"):
            call()
    assert torch.accelerator.current_device_index() == 0
    assert values(torch.ones(1, device="sim:1")) == [1]


def test_results_are_on_the_device_of_the_arguments(policy):
    x = torch.ones(2, device="sim:1")
    assert (x + 1).device == torch.device("sim:1")
    assert x[x > 0].device == torch.device("sim:1")
    assert torch.zeros_like(x).device == torch.device("sim:1")


# --- Inference mode ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda y: torch.abs(y),
        lambda y: torch.add(y, 1, out=torch.empty(0, device=y.device)),
        lambda y: torch.nonzero(y, out=torch.empty(0, dtype=torch.long, device=y.device)),
        lambda y: y.clone().add_(1),
        lambda y: y.clone().resize_(3).fill_(2),
        lambda y: y.clone().squeeze_(),
        lambda y: y.clone().t_(),
    ],
)
def test_tensors_of_inference_mode_can_be_written_and_resized_in_it(policy, call):
    x = torch.tensor([[1.0, -2.0]])
    with torch.inference_mode():
        expected, got = call(torch.neg(x)), call(torch.neg(x.to("sim")))
        assert got.is_inference()
        assert values(got) == expected.tolist()


def test_tensors_of_before_can_be_written_and_resized_in_inference_mode(policy):
    x, out, found = torch.ones(2), torch.empty(0), torch.empty(0, dtype=torch.long)
    x, out, found = x.to("sim"), out.to("sim"), found.to("sim")
    with torch.inference_mode():
        torch.add(x, 1, out=out)
        torch.nonzero(x, out=found)
        x.add_(1)
    assert values(out) == values(x) == [2, 2]
    assert values(found) == [[0], [1]]
    assert not out.is_inference()


def test_writing_a_tensor_of_inference_mode_outside_is_torchs_own_error(policy):
    with torch.inference_mode():
        out = torch.empty(0, device="sim")
    x = torch.ones(2, device="sim")
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside"):
        torch.add(x, 1, out=out)


# --- Shapes that are known before the work runs --------------------------------------------------


def test_out_arguments_are_resized_at_the_call(policy):
    x = torch.ones(3, device="sim")
    out = torch.empty(0, device="sim")
    torch.add(x, x, out=out)
    assert out.shape == (3,)
    assert values(out) == [2, 2, 2]
    index = torch.empty(0, dtype=torch.long, device="sim")
    torch.sort(x, out=(torch.empty(0, device="sim"), index))
    assert values(index) == [0, 1, 2]
    found = torch.empty(0, dtype=torch.long, device="sim")
    assert values(torch.nonzero(x, out=found)) == [[0], [1], [2]]


def test_an_out_argument_may_be_an_input(policy):
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device="sim")
    torch.add(x, 1, out=x)
    assert values(x) == [[1, 2], [2, 1]]


def test_a_shape_that_depends_on_values_waits_for_the_current_stream(sim):
    x = torch.tensor([0.0, 1.0], device="sim")
    assert x.nonzero().shape == (1, 1)
    assert sim.pending(torch.accelerator.current_stream()) == 0


NORMS = [
    lambda: torch.nn.LayerNorm(8),
    lambda: torch.nn.GroupNorm(3, 3),
    lambda: torch.nn.RMSNorm(8),
    lambda: torch.nn.BatchNorm1d(3),
    lambda: torch.nn.BatchNorm1d(3).eval(),
    lambda: torch.nn.BatchNorm1d(3, track_running_stats=False),
    lambda: torch.nn.InstanceNorm1d(3),
]


@pytest.mark.parametrize("make", NORMS)
def test_a_normalisation_stays_queued_forwards_and_backwards(sim, make):
    x = torch.randn(2, 3, 8)
    norm = make()
    there = copy.deepcopy(norm).to("sim")
    x_there = x.to("sim").requires_grad_()
    x.requires_grad_()
    expected = norm(x)
    expected.square().sum().backward()
    torch.accelerator.synchronize()
    before = sim.pending()
    got = there(x_there)
    assert sim.pending() > before == 0
    before = sim.pending()
    got.square().sum().backward()
    assert sim.pending() > before
    torch.testing.assert_close(got.cpu(), expected)
    torch.testing.assert_close(x_there.grad.cpu(), x.grad)
    for one, other in zip(norm.buffers(), there.buffers(), strict=True):
        torch.testing.assert_close(other.cpu(), one)


@pytest.mark.parametrize("make", NORMS)
def test_a_normalisation_can_be_captured(sim, make):
    x, norm = torch.randn(2, 3, 8), make()
    expected = norm(x)
    there, x = copy.deepcopy(norm).to("sim"), x.to("sim")
    torch.accelerator.synchronize()
    graph = sim.Graph()
    out = graph.capture(lambda: there(x))
    graph.replay()
    torch.testing.assert_close(out.cpu(), expected)


def test_a_layer_norm_does_not_hide_a_missing_wait(sim):
    x, norm = torch.ones(2, 8).to("sim"), torch.nn.LayerNorm(8).to("sim")
    side = torch.Stream("sim")
    y = torch.zeros(2, 8, device="sim")
    torch.accelerator.synchronize()
    y.add_(3)
    norm(x)
    with side:
        z = y + 1
    side.synchronize()
    assert sim.peek(z)[0, 0] == 1


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_layer_norm_has_the_cpus_types(policy, kind):
    x = torch.randn(2, 8).to(kind)
    expected = torch.native_layer_norm(x, [8], None, None, 1e-5)
    got = torch.native_layer_norm(x.to("sim"), [8], None, None, 1e-5)
    for one, other in zip(got, expected, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.nn.functional.conv2d(x, torch.ones(4, 4, 3, 3, device=x.device)),
        lambda x: torch.nn.functional.conv_transpose2d(x, torch.ones(4, 4, 3, 3, device=x.device)),
        lambda x: x.roll(1, 2),
        lambda x: torch.nn.functional.pixel_shuffle(x, 2),
        lambda x: torch.nn.functional.pixel_unshuffle(x, 2),
        lambda x: torch.nn.functional.layer_norm(x, [6]),
        lambda x: torch.nn.functional.group_norm(x, 2),
        lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
        lambda x: torch.nn.functional.max_pool2d(x, 2),
        lambda x: x + 1,
    ],
)
def test_results_have_the_cpus_strides(policy, call):
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    got, expected = call(x.to("sim")), call(x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got.cpu(), expected)


def test_one_bad_call_does_not_make_good_ones_wait(sim):
    x = torch.ones(3, 2).to("sim")
    with pytest.raises(RuntimeError, match="p"):
        torch.ops.aten._cdist_forward(x, x, -1.0, None)
    torch.ops.aten._cdist_forward(x, x, 2.0, None)
    assert sim.pending(torch.accelerator.current_stream()) == 1


def test_a_custom_operator_without_metadata_works_by_waiting(policy):
    library = torch.library.Library("simcustom", "DEF")
    library.define("two(Tensor x, Tensor(a!) y) -> (Tensor, Tensor)")
    library.impl("two", lambda x, y: (x + 1, y.add_(x) * 2), "CPU")
    x, y = torch.ones(2, device="sim"), torch.ones(2, device="sim")
    one, two = torch.ops.simcustom.two(x, y)
    assert (values(one), values(two), values(y)) == ([2, 2], [4, 4], [2, 2])
    library._destroy()


def test_a_custom_operator_registered_anew_is_seen_anew(sim):
    for shape in ((2,), (3, 1), (2,), (4,)):
        library = torch.library.Library("simanew", "DEF")
        library.define("make(Tensor x) -> Tensor")
        library.impl("make", lambda x, shape=shape: torch.ones(shape), "CPU")
        library.impl("make", lambda x, shape=shape: x.new_empty(shape), "Meta")
        made = torch.ops.simanew.make(torch.ones(1, device="sim"))
        assert made.shape == shape
        assert made.sum().item() == made.numel()
        library._destroy()


def test_metadata_that_lies_is_named_when_the_work_runs(sim):
    library = torch.library.Library("simlies", "DEF")
    library.define("lie(Tensor x) -> Tensor")
    library.impl("lie", lambda x: torch.ones(3), "CPU")
    library.impl("lie", lambda x: x.new_empty(2), "Meta")
    torch.ops.simlies.lie(torch.ones(1, device="sim"))
    with pytest.raises(RuntimeError, match=r"simlies::lie.*returned sizes \[3\]; expected \[2\]"):
        torch.accelerator.synchronize()
    library._destroy()


def test_python_errors_of_a_kernel_keep_their_class(sim):
    library = torch.library.Library("simraises", "DEF")
    library.define("boom(Tensor x) -> Tensor")

    def boom(x):
        return {}[3]

    library.impl("boom", boom, "CPU")
    library.impl("boom", lambda x: torch.empty_like(x), "Meta")
    torch.ops.simraises.boom(torch.ones(1, device="sim"))
    with pytest.raises(KeyError):
        torch.accelerator.synchronize()
    library._destroy()


def test_the_default_dtype_of_the_call_counts(sim):
    x = torch.ones(2, dtype=torch.int64, device="sim")
    assert (x / 2).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert (x / 2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --- Random numbers ------------------------------------------------------------------------------


def draws(device):
    torch.manual_seed(11)
    p = torch.full((5,), 0.3, device=device)
    return [
        torch.rand(3, device=device),
        torch.randn(20, device=device),
        torch.randint(0, 100, (4,), device=device),
        torch.randperm(8, device=device),
        torch.bernoulli(p),
        torch.multinomial(p, 2),
        torch.normal(p, p),
        torch.empty(4, device=device).exponential_(),
        torch.nn.functional.dropout(torch.ones(16, device=device)),
    ]


def test_equal_seeds_give_the_cpus_numbers(policy):
    for one, other in zip(draws("sim"), draws("cpu"), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: torch.nn.functional.rrelu(-p, training=True),
        lambda p: torch.nn.functional.rrelu_(-p, training=True),
        lambda p: torch.poisson(p * 30),
        lambda p: torch._standard_gamma(p),
        lambda p: torch.binomial((p * 10).ceil(), p),
        lambda p: torch._sample_dirichlet(p),
    ],
)
def test_draws_whose_number_depends_on_values_neither_repeat_nor_drift(policy, draw):
    p = torch.full((5,), 0.3)
    torch.manual_seed(3)
    expected = [draw(p), draw(p), torch.rand(3)]
    torch.manual_seed(3)
    got = [draw(p.to("sim")), draw(p.to("sim")), torch.rand(3, device="sim")]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.cpu(), other)


def test_numbers_are_drawn_in_order_of_submission_not_of_execution(sim):
    side = torch.Stream("sim")
    torch.manual_seed(1)
    first = torch.rand(2, device="sim")
    with side:
        second = torch.rand(2, device="sim")
    side.synchronize()
    torch.manual_seed(1)
    assert values(first) == torch.rand(2).tolist()
    assert sim.peek(second).tolist() == torch.rand(2).tolist()


def test_a_generator_repeats_what_it_drew(policy):
    generator = torch.Generator("sim").manual_seed(4)
    state = generator.get_state()
    one = values(torch.rand(3, device="sim", generator=generator))
    assert values(torch.rand(3, device="sim", generator=generator)) != one
    generator.set_state(state)
    assert values(torch.rand(3, device="sim", generator=generator)) == one
    assert generator.initial_seed() == 4
    assert generator.device == torch.device("sim:0")


def test_a_generator_of_the_cpus_is_torchs_own_error(policy):
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator"):
        torch.rand(3, device="sim", generator=torch.Generator())


def test_each_device_has_a_default_generator(sim):
    torch.manual_seed(2)
    one, other = torch.rand(3, device="sim:0"), torch.rand(3, device="sim:1")
    assert values(one) == values(other)
    assert values(torch.rand(3, device="sim:0")) != values(one)


def test_the_state_of_a_default_generator_can_be_saved(sim):
    state = torch.sim.get_rng_state(1)
    one = values(torch.rand(3, device="sim:1"))
    torch.sim.set_rng_state(state, 1)
    assert values(torch.rand(3, device="sim:1")) == one
    with torch.random.fork_rng(devices=[1], device_type="sim"):
        inside = values(torch.rand(3, device="sim:1"))
    assert values(torch.rand(3, device="sim:1")) == inside
