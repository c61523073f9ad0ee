"""Speculation, with prompt lookup and an EAGLE head, against plain greedy decoding of a real model.

From a checkout only, with the extra ``demo`` installed: ``python benchmarks/speculation.py``.
"""

from __future__ import annotations

import math

import hwcore
from hwcore.cli.measurement import Row

_CONTEXT = 256
# Prompts whose answers repeat the prompt must gain; the others are for information.
_TARGETS = {"edit": 1.5, "repeat": 1.5}


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject: a ratio of decoding speeds a prompt.

    Raises
    ------
    RuntimeError
        If speculation gave a token that plain decoding does not give.
    """
    try:
        from examples.eagle_head.head import EagleHead
        from examples.serving import sizing
        from examples.serving.__main__ import HEAD
        from examples.serving.compare import PLAIN, compare
        from examples.serving.drafters import calibrated
        from examples.serving.llama import Llama
        from examples.serving.model import Model
        from examples.serving.prompts import PROMPTS, as_chat
        from examples.serving.weights import load
    except ImportError as error:
        what = f"not measured: {error}"
        return [Row(what, math.nan, "x", None, False, "needs a checkout and hwcore[demo]")]

    tokens, rounds, passes = (48, 1, 3) if quick else (128, 3, 7)
    config, weights, tokenizer = load(lambda _: None)
    names = _TARGETS if quick else [prompt.name for prompt in PROMPTS]
    prompts = {p.name: tokenizer(as_chat(p.text)).input_ids for p in PROMPTS if p.name in names}
    slots = max(*map(len, prompts.values()), _CONTEXT) + tokens + 2 * max(sizing.SIZES)
    device = hwcore.current_backend().device()
    llama = Llama(config, weights, device, slots)
    there = (HEAD / "config.json").is_file()
    head = EagleHead.load(HEAD, llama.embedding, slots) if there else None
    model = Model(llama, slots, taps=head.shape.taps if head else ())
    drafters, _ = calibrated(model, head, _CONTEXT, passes)
    rows = []
    for outcome in compare(model, prompts, tokens, drafters, rounds):
        place = outcome.first_difference()
        if place is not None:
            message = f"{outcome.name}: a wrong token at {place} of {tokens}"
            raise RuntimeError(message)
        plain = outcome.tokens_per_s(PLAIN)
        for way in outcome.drafted:
            length = outcome.accept_length(way)
            detail = (
                f"{plain:.1f} → {outcome.tokens_per_s(way):.1f} tok/s, accept length {length:.2f}"
            )
            target = _TARGETS.get(outcome.name) if way == "lookup" else None
            what = f"{outcome.name}, {way}"
            rows.append(Row(what, outcome.ratio(way), "x", target, False, detail))
    return rows


def main() -> None:
    """Print the rows."""
    for row in run():
        target = "" if row.target is None else f" (target {row.target}x)"
        print(f"{row.what:22} {row.value:5.2f}x{target}  {row.detail}")


if __name__ == "__main__":
    main()
