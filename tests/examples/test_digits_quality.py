"""The trained networks, by a judge that was trained apart, and what is written about them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from examples.disaggregated_diffusion import model, monolithic, picture
from examples.disaggregated_diffusion.digits import halves, ink, styles
from examples.disaggregated_diffusion.evaluate import labels_of, samples
from examples.disaggregated_diffusion.monolithic import REQUIRED, Pipeline, digest
from examples.disaggregated_diffusion.networks import LATENT
from examples.disaggregated_diffusion.prompts import Style
from examples.disaggregated_diffusion.requests import GUIDANCES, STEPS, Scheduler, workload

pytest.importorskip("sklearn")  # not where a device is tested

from examples.disaggregated_diffusion.judge import Judge

FOLDER = model.TRAINED.parent
BUDGET_BYTES = 5_000_000


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", name="judge")
def _judge():
    return Judge()


@pytest.fixture(scope="module", name="quality")
def _quality():
    return json.loads((model.TRAINED / "quality.json").read_text())


@pytest.fixture(scope="module", name="pipeline")
def _pipeline(hw):
    return Pipeline(hw.device())


@pytest.fixture(scope="module", name="images")
def _images(pipeline):
    """1000 samples at guidance 2, as the evaluation draws them."""
    torch.set_num_threads(1)
    return samples(pipeline, 2.0, Scheduler.EULER)


# --- The judge ------------------------------------------------------------------------------------


def test_judge_and_networks_learn_from_halves_that_share_no_image():
    judged, learnt = halves()
    rows = [{tuple(row) for row in half.images.flatten(1).tolist()} for half in (judged, learnt)]
    assert not rows[0] & rows[1]
    assert len(judged.labels) + len(learnt.labels) == 1797


def test_the_judge_names_images_that_it_never_saw(judge, quality):
    assert judge.accuracy() > 0.98
    assert quality["judge"]["held_out"] == pytest.approx(judge.accuracy(), abs=0.002)


def test_the_judge_finds_noise_right_by_chance_alone(pipeline, judge, images):
    generator = torch.Generator().manual_seed(0)
    noise = model.decode(pipeline.decoder, torch.randn(1000, *LATENT, generator=generator))
    assert judge.share_right(noise, labels_of(noise)) < 0.2
    assert judge.share_right(images, (labels_of(images) + 1) % 10) < 0.02


# --- The samples ----------------------------------------------------------------------------------


def test_a_short_evaluation_gives_what_is_written(quality, judge, images):
    rows = {(row["guidance"], row["scheduler"]): row for row in quality["right"]}
    written = rows[2.0, "euler"]
    assert (written["samples"], written["steps"]) == (len(images), STEPS[Scheduler.EULER])
    right = judge.share_right(images, labels_of(images))
    # One in two hundred: other machines round otherwise.
    assert right == pytest.approx(written["right"], abs=0.005)


def test_enough_is_right_at_every_guidance_and_with_every_scheduler(quality):
    rows = {(row["guidance"], row["scheduler"]): row for row in quality["right"]}
    assert rows.keys() == {(guidance, one.value) for guidance in GUIDANCES for one in Scheduler}
    assert all(row["samples"] >= 1000 and row["right"] >= REQUIRED for row in rows.values())


def test_samples_are_neither_copies_nor_one_and_the_same(quality, images):
    learnt = halves()[1].images.flatten(1)
    nearest = torch.cdist(images.flatten(1), learnt).amin(1) / 8
    assert float(nearest.min()) > 2 * quality["training"]["autoencoder_error"]
    assert len(images.flatten(1).unique(dim=0)) == len(images)
    assert quality["spread"] > 0.7


def test_bold_digits_have_more_ink_than_thin_ones(pipeline, quality):
    thin, bold = (
        float(ink(samples(pipeline, styles=(style,), requests=2)).mean())
        for style in (Style.THIN, Style.BOLD)
    )
    assert bold > 1.1 * thin
    assert quality["mean_ink"]["bold"] > 1.1 * quality["mean_ink"]["thin"]


def test_phrasings_that_were_never_trained_on_are_understood(pipeline, judge, quality):
    found = samples(pipeline, unseen=True)
    right, written = judge.share_right(found, labels_of(found)), quality["unseen_phrasings"]
    assert right >= REQUIRED
    assert right == pytest.approx(written["right"], abs=0.005)
    assert written["samples"] == len(found)


def test_styles_are_the_thirds_of_a_kind_with_least_and_with_most_ink():
    learnt = halves()[1]
    amounts, given = ink(learnt.images), styles(learnt)
    for digit in range(10):
        of_style = {
            style: [
                float(amount)
                for amount, label, one in zip(amounts, learnt.labels, given, strict=True)
                if int(label) == digit and one is style
            ]
            for style in Style
        }
        thin, plain, bold = (of_style[one] for one in (Style.THIN, Style.PLAIN, Style.BOLD))
        assert max(thin) <= min(plain)
        assert max(plain) <= min(bold)
        assert len(thin) == len(bold)


# --- What is committed ----------------------------------------------------------------------------


def test_the_folder_fits_its_budget():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= BUDGET_BYTES


def test_what_is_written_about_the_weights_is_true_of_them(quality):
    for role, size in quality["size_bytes"].items():
        assert (model.TRAINED / f"{role}.safetensors").stat().st_size == size
    networks = (monolithic.TextEncoder, monolithic.Denoiser, monolithic.LatentDecoder)
    assert quality["parameters"] == {
        str(kind.role): sum(one.numel() for one in kind().parameters()) for kind in networks
    }


def test_the_readme_says_what_the_evaluation_found(quality):
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| (\d)\.0 \| (\w+), \d+ steps \| ([\d.]+) % \|$", text, re.MULTILINE)
    assert {(float(guidance), name): float(share) for guidance, name, share in rows} == {
        (row["guidance"], row["scheduler"]): round(100 * row["right"], 1)
        for row in quality["right"]
    }


# --- The run in one process -----------------------------------------------------------------------


@pytest.fixture(scope="module", name="run")
def _run(hw, tmp_path_factory):
    """The short form, by its command."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("run")
    before = torch.get_num_threads()
    done = CliRunner().invoke(monolithic.main, ["--short", "--out", str(out)])
    torch.set_num_threads(before)
    return done, out


def test_the_short_run_is_judged_right(hw, run):
    done, out = run
    assert done.exit_code == 0, done.output
    right = float(re.search(r"right: ([\d.]+)%", done.output)[1])
    assert right >= 100 * REQUIRED
    assert f"on the backend {hw.info.name}" in done.output
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_it_keeps_the_images_and_a_digest_for_each_request(run, pipeline):
    _, out = run
    digests = json.loads((out / "digests.json").read_text())
    images = load_file(out / "images.safetensors")
    asked = workload(short=True)
    assert digests.keys() == images.keys() == {one.request.request_id for one in asked}
    assert digests == {name: digest(some) for name, some in images.items()}
    one = asked[3].request
    assert digests[one.request_id] == digest(pipeline.images(one))


def test_it_says_which_requests_differ_from_another_runs(run, monkeypatch):
    _, out = run
    other = json.loads((out / "digests.json").read_text())
    path = out / "other.json"
    monkeypatch.setattr(monolithic, "workload", lambda _: workload(short=True)[:3])
    three = {name: other[name] for name in list(other)[:3]}

    def again():
        command = ["--short", "--out", str(out / "again"), "--same-as", str(path)]
        return CliRunner().invoke(monolithic.main, command)

    path.write_text(json.dumps(three))
    assert again().exit_code == 0
    path.write_text(json.dumps(three | {"request-001": "0"}))
    assert "NOT as in" in (found := again()).output
    assert "request-001" in found.output
    assert "request-000" not in found.output
    assert found.exit_code == 1
    path.write_text(json.dumps(other))  # some that this run lacks
    assert again().exit_code == 1


def test_too_few_right_samples_fail_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr(monolithic, "workload", lambda _: workload(short=True)[:2])
    monkeypatch.setattr(Judge, "share_right", lambda *_: REQUIRED - 0.01)
    done = CliRunner().invoke(monolithic.main, ["--short", "--out", str(tmp_path)])
    assert done.exit_code == 1


def test_one_bit_or_another_shape_is_another_digest():
    images = torch.zeros(2, 1, 8, 8)
    changed = images.clone()
    changed.view(torch.int32)[1, 0, 7, 7] ^= 1
    assert len({digest(one) for one in (images, changed, images[:1], images.double())}) == 4
    assert digest(images.flatten(2)) != digest(images)


def test_a_digest_is_of_what_an_image_shows_however_it_lies():
    images = torch.arange(128.0).view(2, 1, 8, 8)
    turned = images.permute(3, 2, 1, 0)
    assert digest(turned) == digest(turned.contiguous()) != digest(images)


def test_the_sheet_shows_the_largest_requests_in_their_order(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    captions, cells = [], []
    text, imshow = axes.text, axes.imshow
    monkeypatch.setattr(
        axes, "text", lambda s, x, y, t, **k: captions.append(t) or text(s, x, y, t, **k)
    )
    monkeypatch.setattr(
        axes, "imshow", lambda s, i, **k: cells.append(i.shape) or imshow(s, i, **k)
    )
    results = [
        (one.request, torch.zeros(one.request.num_samples, 1, 8, 8)) for one in workload()[:6]
    ]
    picture.draw(tmp_path / "sheet.png", results, rows=4)
    sizes = [len(images) for _, images in results]
    kept = [size for size in sizes if sorted(sizes)[2:].count(size)]
    assert [int(re.search(r"(\d+) samples?,", one)[1]) for one in captions] == kept
    assert len(cells) == sum(min(size, 12) for size in kept)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
