import copy

import pytest
import torch

from hwcore.diffusion import decode_manifest, encode_manifest, manifest_of
from hwcore.diffusion.serving.request import DiffusionRequest, schedule_for
from hwcore.diffusion.tree import unflatten
from hwcore.errors import ArgumentValueError, PeerError


def sent(request):
    """What the other side has of a request."""
    manifest, tensors = manifest_of(request.to_tree())
    manifest = decode_manifest(encode_manifest(manifest), manifest.size_bytes)
    return unflatten(manifest.structure, [tensor.clone() for tensor in tensors])


def drawn(request):
    return [torch.randn(4, generator=generator).tolist() for generator in request.generators]


def test_seeds_become_generators_at_their_beginning(hw):
    request = DiffusionRequest.from_tree("r", sent(DiffusionRequest("r", seeds=[7, 2**63])))
    request.restore_generators(hw)
    assert drawn(request) == [
        torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (7, 2**63)
    ]


def test_a_generator_that_was_drawn_from_goes_on_where_it_was(hw):
    request = DiffusionRequest("r", seeds=[7, 8])
    request.restore_generators(hw)
    torch.randn(100, generator=request.generators[1])
    received = DiffusionRequest.from_tree("r", sent(request))
    received.restore_generators(hw)
    assert drawn(received) == drawn(request)


def test_the_state_travels_only_where_the_seed_does_not_say_it():
    request = DiffusionRequest("r", seeds=[7, 8])
    request.restore_generators()
    torch.randn(1, generator=request.generators[0])
    first, second = request.to_tree()["states"]
    assert first is not None
    assert second is None


def test_generators_on_the_device_are_rebuilt_there(hw):
    request = DiffusionRequest("r", seeds=[7], noise_on_device=True)
    request.restore_generators(hw)
    torch.randn(3, generator=request.generators[0], device=hw.device())
    received = DiffusionRequest.from_tree("r", sent(request))
    received.restore_generators(hw)
    assert received.generators[0].device.type == hw.info.device_type
    ours, theirs = (
        torch.randn(3, generator=it.generators[0], device=hw.device()) for it in (request, received)
    )
    assert torch.equal(ours.cpu(), theirs.cpu())


def test_fields_and_extra_arrive_as_they_were():
    fields = {"embeds": [torch.ones(2), None, torch.zeros(3)], "mask": torch.tensor([True])}
    extra = {"teacache": {"on": True, "steps": (1, 2)}, "nothing": None}
    request = DiffusionRequest("r", fields, num_inference_steps=4, mu=0.5, extra=extra)
    received = DiffusionRequest.from_tree("r", sent(request))
    assert received.fields["embeds"][1] is None
    assert torch.equal(received.fields["embeds"][2], torch.zeros(3))
    assert received.extra == extra
    assert (received.num_inference_steps, received.mu) == (4, 0.5)


def test_seeds_without_their_generators_are_an_error():
    request = DiffusionRequest("r", seeds=[1, 2], generators=[torch.Generator()])
    with pytest.raises(ArgumentValueError, match="one for each of 2 seeds"):
        request.to_tree()


BAD = {
    "a field of another type": {"seeds": 7},
    "a seed of another type": {"seeds": ["7"]},
    "a seed that is a bool": {"seeds": [True]},
    "a negative seed": {"seeds": [-1]},
    "a number that is a bool": {"num_inference_steps": True},
    "states of another count": {"states": [None, None, None]},
    "a state of another type": {"seeds": [1], "states": [7]},
}


@pytest.mark.parametrize("what", BAD)
def test_a_peers_tree_with_something_else_in_it_is_refused(what):
    tree = DiffusionRequest("r").to_tree() | BAD[what]
    with pytest.raises(PeerError, match=r"from_tree: .*expected .*Send what"):
        DiffusionRequest.from_tree("r", tree)


@pytest.mark.parametrize("tree", [[], None, {}, {"fields": {}}], ids=repr)
def test_a_peers_tree_that_is_no_request_is_refused(tree):
    with pytest.raises(PeerError, match=r"expected a dict of fields, seeds, .* and states"):
        DiffusionRequest.from_tree("r", tree)


STATES = {"size": torch.zeros(3, dtype=torch.uint8), "dtype": torch.zeros(5056)}


@pytest.mark.parametrize("what", STATES)
def test_a_state_of_another_kind_of_generator_is_refused(hw, what):
    tree = DiffusionRequest("r", seeds=[1]).to_tree() | {"states": [STATES[what].to(hw.device())]}
    request = DiffusionRequest.from_tree("r", tree)
    with pytest.raises(PeerError, match="expected the state of a generator"):
        request.restore_generators(hw)


@pytest.mark.usefixtures("late")
def test_a_state_on_a_device_is_read_when_it_has_come(hw):
    request = DiffusionRequest("r", seeds=[7])
    request.restore_generators(hw)
    torch.randn(3, generator=request.generators[0])
    tree = request.to_tree()
    side = hw.create_stream()
    with hw.stream_context(side):
        tree["states"] = [state.to(hw.device(), non_blocking=True) for state in tree["states"]]
    received = DiffusionRequest.from_tree("r", tree)
    hw.wait_stream(hw.current_stream(), side)
    received.restore_generators(hw)
    assert drawn(received) == drawn(request)


def test_a_request_that_is_only_passed_on_keeps_its_states():
    request = DiffusionRequest("r", seeds=[7])
    request.restore_generators()
    torch.randn(3, generator=request.generators[0])
    passed_on = DiffusionRequest.from_tree(
        "r", sent(DiffusionRequest.from_tree("r", sent(request)))
    )
    passed_on.restore_generators()
    assert drawn(passed_on) == drawn(request)


class Schedule:
    """As those of diffusers."""

    def __init__(self):
        self.timesteps, self.device = None, None

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, mu=None):
        self.device, self.mu = device, mu
        self.timesteps = (
            torch.arange(num_inference_steps).flip(0)
            if timesteps is None
            else torch.as_tensor(timesteps)
        )


class Sigmas(Schedule):
    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None):
        self.timesteps = torch.as_tensor(sigmas) * 1000


def test_each_request_has_a_schedule_of_its_own(hw):
    template = Schedule()
    before = copy.deepcopy(vars(template))
    request = DiffusionRequest("r", num_inference_steps=3, mu=0.25)
    schedule = schedule_for(template, request, hw.device())
    assert vars(template) == before
    assert (schedule.device, schedule.mu) == (hw.device(), 0.25)
    assert request.timesteps.tolist() == [2, 1, 0]


def test_sigmas_count_before_timesteps_and_those_before_the_number_of_steps():
    all_three = {"num_inference_steps": 3, "timesteps": [9, 5], "sigmas": [0.5]}
    request = DiffusionRequest("r", **all_three)
    schedule_for(Sigmas(), request, "cpu")
    assert request.timesteps.tolist() == [500.0]
    request = DiffusionRequest("r", **all_three)
    schedule_for(Schedule(), request, "cpu")  # takes no sigmas
    assert request.timesteps.tolist() == [9, 5]


def test_a_request_that_says_nothing_of_its_schedule_gets_it_as_it_is():
    assert schedule_for(Schedule(), DiffusionRequest("r"), "cpu").timesteps is None


@pytest.mark.parametrize(
    ("options", "named"),
    [({"mu": 0.5, "sigmas": [0.5]}, "`mu`"), ({"timesteps": [1]}, "`timesteps`")],
    ids=["mu", "timesteps"],
)
def test_what_the_schedule_cannot_be_set_to_is_named(options, named):
    expected = rf"{named} of the request got .* expected what Sigmas.set_timesteps takes: .*sigmas"
    with pytest.raises(ArgumentValueError, match=expected):
        schedule_for(Sigmas(), DiffusionRequest("r", **options), "cpu")
