"""Training, in few steps: what it learns, that its seed is all, and what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("sklearn")  # not where a device is tested

from examples.disaggregated_diffusion import train
from examples.disaggregated_diffusion.digits import halves
from examples.disaggregated_diffusion.monolithic import REQUIRED, Pipeline
from examples.disaggregated_diffusion.networks import LATENT
from examples.disaggregated_diffusion.requests import Request, Scheduler
from examples.disaggregated_diffusion.training import Settings, train_autoencoder, train_denoiser

SETTINGS = Settings(autoencoder_steps=120, denoiser_steps=4, batch_size=64)

pytestmark = pytest.mark.usefixtures("once")  # on the host, whatever the backend


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(_):
    pass


@pytest.fixture(scope="module", name="autoencoder")
def _autoencoder():
    torch.set_num_threads(1)
    return train_autoencoder(halves()[1], SETTINGS, quiet)


@torch.no_grad()
def latents_of(autoencoder, images):
    encoder, decoder = autoencoder
    mean, log_variance = encoder(images)
    drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    return (drawn - decoder.mean) / decoder.scale


@torch.no_grad()
def test_the_autoencoder_restores_images_that_it_never_saw(autoencoder):
    images = halves()[0].images
    restored = autoencoder[1](latents_of(autoencoder, images))
    assert float(((restored - images) ** 2).mean()) < 0.25 * float(images.var())


def test_latents_have_unit_variance_in_every_channel(autoencoder):
    latents = latents_of(autoencoder, halves()[1].images)
    assert latents.shape[1:] == LATENT
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.1, rtol=0)


def test_the_seed_is_all_that_training_depends_on(autoencoder):
    def trained():
        text, denoiser = train_denoiser(halves()[1], *autoencoder, SETTINGS, quiet)
        return [*text.parameters(), *denoiser.parameters()]

    first = trained()
    torch.rand(7)  # of the process's own noise
    assert all(torch.equal(one, other) for one, other in zip(first, trained(), strict=True))


def test_text_encoder_and_denoiser_are_both_trained(autoencoder):
    text, denoiser = train_denoiser(halves()[1], *autoencoder, SETTINGS, quiet)
    torch.manual_seed(SETTINGS.seed + 1)
    untrained = type(text)()
    pairs = zip(text.parameters(), untrained.parameters(), strict=True)
    assert not any(torch.equal(one, before) for one, before in pairs)
    assert denoiser.output.weight.count_nonzero() > 0  # it began at nothing


@pytest.mark.parametrize(("right", "status"), [(REQUIRED, 0), (REQUIRED - 0.001, 1)])
def test_it_writes_what_the_roles_load_and_fails_where_too_few_are_right(
    monkeypatch, tmp_path, right, status
):
    found = {"right": [{"right": 1.0}, {"right": right}]}
    monkeypatch.setattr(train, "evaluate", lambda *_: found)
    steps = ["--autoencoder-steps", "2", "--denoiser-steps", "2", "--seed", "5"]
    done = CliRunner().invoke(train.main, ["--out", str(tmp_path), *steps])
    assert done.exit_code == status, done.output

    written = json.loads((tmp_path / "quality.json").read_text())
    training = written["training"]
    assert (training["seed"], training["denoiser_steps"]) == (5, 2)
    for role, size in written["size_bytes"].items():
        assert (tmp_path / f"{role}.safetensors").stat().st_size == size
    request = Request("one", ("7",), 2, 2.0, Scheduler.EULER, 2, 0)
    assert Pipeline("cpu", tmp_path).images(request).shape == (2, 1, 8, 8)
