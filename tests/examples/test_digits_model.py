"""The three roles: what they hand on, and that a request's result is its own, bit for bit."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from examples.disaggregated_diffusion import model
from examples.disaggregated_diffusion.model import MICRO_BATCH, decode, denoise, encode
from examples.disaggregated_diffusion.monolithic import Pipeline, digest
from examples.disaggregated_diffusion.networks import (
    EMBEDDING,
    IMAGE,
    LATENT,
    Denoiser,
    LatentDecoder,
    TextEncoder,
)
from examples.disaggregated_diffusion.prompts import LENGTH
from examples.disaggregated_diffusion.requests import Request, Scheduler
from hwcore.diffusion import pack_tensors, unpack_tensors
from hwcore.errors import ArgumentTypeError, ArgumentValueError


@pytest.fixture(autouse=True)
def _one_thread():
    """More would sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", name="pipeline")
def _pipeline(hw):
    return Pipeline(hw.device())


def asked(samples=5, prompts=("a bold seven", "2"), guidance=2.0, scheduler=Scheduler.HEUN, seed=3):
    return Request("one", prompts, samples, guidance, scheduler, 4, seed)


# --- A request's result is its own ----------------------------------------------------------------


def test_other_requests_before_and_after_change_no_bit(pipeline):
    request = asked(samples=MICRO_BATCH + 6)
    alone = digest(pipeline.images(request))
    others = [asked(samples=9, guidance=1.0, seed=8), request, asked(prompts=("0",)), request]
    assert [digest(pipeline.images(other)) for other in others][1::2] == [alone, alone]


def test_requests_served_side_by_side_change_no_bit_of_each_other(pipeline):
    requests = [asked(samples=40, seed=seed) for seed in (1, 2)]
    alone = [digest(pipeline.images(request)) for request in requests]
    conditions = [encode(pipeline.encoder, request) for request in requests]
    latents = [denoise(pipeline.denoiser, one) for one in reversed(conditions)]
    together = [digest(decode(pipeline.decoder, one)) for one in reversed(latents)]
    assert together == alone
    assert together[0] != together[1]


def test_another_process_gets_the_same_bits(hw, pipeline):
    code = """
import torch
torch.set_num_threads(1)
from examples.disaggregated_diffusion.monolithic import Pipeline, digest
from examples.disaggregated_diffusion.requests import Request, Scheduler
request = Request("one", ("a bold seven", "2"), 70, 2.0, Scheduler.HEUN, 4, 3)
print(digest(Pipeline().images(request)))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HWCORE_BACKEND": hw.info.name},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.split() == [digest(pipeline.images(asked(samples=70)))]


def test_the_simulated_device_gets_the_hosts_bits(sim, pipeline):
    request = asked(samples=MICRO_BATCH + 1)
    assert digest(pipeline.images(request)) == digest(Pipeline("cpu").images(request))


def test_networks_see_received_tensors_in_aligned_memory_of_their_own(pipeline):
    latents = denoise(pipeline.denoiser, encode(pipeline.encoder, asked(samples=7)))
    expected = digest(decode(pipeline.decoder, latents))
    pool = torch.empty(latents.numel() + 1, device=latents.device)
    moved = pool[1:].view_as(latents).copy_(latents)  # 4 bytes off any alignment
    apart = latents.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    assert moved.data_ptr() % 64
    assert not apart.is_contiguous()
    for received in (moved, apart):
        seen = []
        hook = pipeline.decoder.register_forward_hook(
            lambda _, inputs, __, to=seen: to.extend(inputs)
        )
        assert digest(decode(pipeline.decoder, received)) == expected
        hook.remove()
        assert seen[0].data_ptr() % 64 == 0
        assert seen[0].is_contiguous()


def test_conditions_and_latents_travel_without_losing_a_bit(hw, pipeline):
    request = asked(samples=10)
    expected = digest(pipeline.images(request))

    def sent(tree):
        frames = [bytes(frame) for frame in pack_tensors(tree, enums=model.ENUMS)]
        return unpack_tensors(frames, device=hw.device(), enums=model.ENUMS)

    arrived = Request.from_tree(sent(request.to_tree()))
    latents = denoise(pipeline.denoiser, sent(encode(pipeline.encoder, arrived)))
    assert arrived == request
    assert digest(decode(pipeline.decoder, sent({"latents": latents})["latents"])) == expected


def test_noise_is_that_of_the_seed_or_of_a_generator_that_stands_where_it_did(pipeline):
    conditions = encode(pipeline.encoder, asked(samples=MICRO_BATCH + 3))
    fresh = torch.Generator().manual_seed(3)
    first = denoise(pipeline.denoiser, conditions)
    assert torch.equal(first.cpu(), denoise(pipeline.denoiser, conditions, fresh).cpu())
    assert not torch.equal(first.cpu(), denoise(pipeline.denoiser, conditions, fresh).cpu())


def test_other_seeds_and_other_samples_are_other_images(pipeline):
    images = pipeline.images(asked(samples=8, prompts=("3",))).cpu().flatten(1)
    others = pipeline.images(asked(samples=8, prompts=("3",), seed=4)).cpu().flatten(1)
    assert len(torch.cat((images, others)).unique(dim=0)) == 16


# --- What a role does -----------------------------------------------------------------------------


def test_each_role_reads_its_own_weights_alone(hw, tmp_path):
    for kind in (TextEncoder, Denoiser, LatentDecoder):
        folder = tmp_path / kind.role
        folder.mkdir()
        shutil.copy(model.TRAINED / f"{kind.role}.safetensors", folder)
        loaded = model.load(kind, folder=folder).state_dict()
        assert {one.device for one in loaded.values()} == {hw.device(0)}
        stored = load_file(model.TRAINED / f"{kind.role}.safetensors")
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name].cpu(), stored[name]) for name in stored)


def test_weights_that_are_not_there_are_named_with_what_makes_them(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"denoiser\.safetensors.*disaggregated_diffusion\."
    ):
        model.load(Denoiser, "cpu", tmp_path)


def test_the_encoder_hands_on_what_the_denoiser_needs(hw, pipeline):
    conditions = encode(pipeline.encoder, asked(samples=5))
    assert conditions["embeddings"].shape == (2, LENGTH, EMBEDDING)
    assert conditions["embeddings"].device == hw.device(0)
    assert conditions["mask"].sum(1).tolist() == [1 + len("a bold seven"), 2]
    assert conditions["prompt_of"].tolist() == [0, 1, 0, 1, 0]
    assert conditions["timesteps"].tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert conditions["scheduler"] is Scheduler.HEUN
    assert (conditions["guidance"], conditions["seeds"]) == (2.0, [3])


def test_without_guidance_nothing_is_run_without_the_prompt(pipeline):
    conditions = encode(pipeline.encoder, asked(samples=3, guidance=1.0))
    assert conditions["extra"]["negative"] == [None, None]
    assert passes(pipeline, conditions) == [3] * 7


def test_heun_looks_at_the_end_of_every_step_but_the_last(pipeline):
    assert passes(pipeline, encode(pipeline.encoder, asked(samples=3))) == [6] * 7
    euler = encode(pipeline.encoder, asked(samples=3, scheduler=Scheduler.EULER))
    assert passes(pipeline, euler) == [6] * 4


def test_padding_of_a_prompt_is_not_seen(pipeline):
    """Attention and pooling leave it out: the embeddings there may be anything."""
    conditions = encode(pipeline.encoder, asked(samples=4, prompts=("7",)))
    changed = copy.deepcopy(conditions)
    changed["embeddings"][:, 5:] = 9.0
    found = [denoise(pipeline.denoiser, one).cpu() for one in (conditions, changed)]
    assert torch.equal(*found)


def test_a_large_request_runs_in_pieces_of_bounded_size(pipeline):
    samples = 2 * MICRO_BATCH + 5
    conditions = encode(pipeline.encoder, asked(samples=samples, guidance=1.0))
    sizes = passes(pipeline, conditions)
    assert sizes == [MICRO_BATCH] * 14 + [5] * 7
    latents = denoise(pipeline.denoiser, conditions)
    decoded = passes_of(pipeline.decoder, lambda: decode(pipeline.decoder, latents))
    assert decoded == [MICRO_BATCH, MICRO_BATCH, 5]


@pytest.mark.parametrize(("samples", "size_bytes"), [(1, 256), (64, 16 * 1024)])
def test_a_sample_is_256_bytes_of_latents_and_as_many_of_pixels(pipeline, samples, size_bytes):
    request = asked(samples=samples, prompts=("7",))
    latents = denoise(pipeline.denoiser, encode(pipeline.encoder, request))
    images = decode(pipeline.decoder, latents)
    assert latents.shape == (samples, *LATENT)
    assert images.shape == (samples, *IMAGE)
    assert latents.nbytes == images.nbytes == size_bytes
    assert -1 <= float(images.min()) <= float(images.max()) <= 1


def passes_of(network, run):
    """Batch sizes of a network's passes."""
    sizes = []
    hook = network.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    try:
        run()
    finally:
        hook.remove()
    return sizes


def passes(pipeline, conditions):
    return passes_of(pipeline.denoiser, lambda: denoise(pipeline.denoiser, conditions))


# --- What a role refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("embeddings", torch.zeros(2, LENGTH, EMBEDDING + 1), ArgumentValueError),
        ("embeddings", torch.zeros(2, LENGTH, EMBEDDING).half(), ArgumentTypeError),
        ("mask", torch.ones(3, LENGTH, dtype=torch.bool), ArgumentValueError),
        ("mask", None, ArgumentTypeError),
        ("prompt_of", torch.zeros(4), ArgumentTypeError),
        ("prompt_of", torch.zeros(0, dtype=torch.uint8), ArgumentValueError),
        ("prompt_of", torch.zeros(4097, dtype=torch.uint8), ArgumentValueError),
        ("prompt_of", torch.tensor([0, 2], dtype=torch.uint8), ArgumentValueError),
        ("timesteps", torch.ones(1), ArgumentValueError),
        ("scheduler", "heun", ArgumentTypeError),
        ("guidance", None, ArgumentTypeError),
        ("guidance", float("nan"), ArgumentValueError),
        ("seeds", [], ArgumentTypeError),
        ("extra", {}, ArgumentTypeError),
        ("extra", {"negative": [None, None]}, ArgumentTypeError),
    ],
)
def test_the_denoiser_names_what_is_wrong_with_conditions(pipeline, name, value, error):
    conditions = encode(pipeline.encoder, asked()) | {name: value}
    with pytest.raises(error) as caught:
        denoise(pipeline.denoiser, conditions)
    assert ("negative" if name == "extra" else name) in str(caught.value)


def test_the_denoiser_names_what_conditions_lack(pipeline):
    conditions = encode(pipeline.encoder, asked())
    del conditions["mask"], conditions["seeds"]
    with pytest.raises(ArgumentTypeError, match="nothing for mask, seeds"):
        denoise(pipeline.denoiser, conditions)


@pytest.mark.parametrize(
    ("latents", "error"),
    [
        (torch.zeros(2, 4, 4), ArgumentTypeError),
        (torch.zeros(2, *LATENT).double(), ArgumentTypeError),
        (torch.zeros(2, 4, 4, 5), ArgumentValueError),
        (torch.zeros(0, *LATENT), ArgumentValueError),
        (torch.zeros(4097, *LATENT), ArgumentValueError),
    ],
)
def test_the_decoder_names_latents_that_are_none(pipeline, latents, error):
    with pytest.raises(error, match="`latents`"):
        decode(pipeline.decoder, latents)
