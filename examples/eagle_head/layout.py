"""The head's weights under the names that SGLang's LlamaForCausalLMEagle3 loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from examples.serving.attention import rope_theta

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

TAPS = 2, 15, 27
"""The head sees the target's residual stream as it enters these layers."""

_INTEGERS = ("d2t", "t2d")


@dataclass(frozen=True)
class Shape:
    """The numbers of a head; all but ``draft_vocab`` are the target's."""

    hidden: int
    heads: int
    kv_heads: int
    width: int
    inner: int
    vocab: int
    draft_vocab: int
    theta: float
    epsilon: float
    taps: tuple[int, ...] = TAPS

    @classmethod
    def of(cls, config: Any, draft_vocab: int) -> Shape:
        """Return the shape of a head for a target with a transformers LlamaConfig."""
        return cls(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            width=config.head_dim,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            draft_vocab=draft_vocab,
            theta=rope_theta(config),
            epsilon=config.rms_norm_eps,
        )

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return the sizes of the layer's matrices, by name; the output matrix is not one."""
        at = "midlayer"
        head, kv = self.heads * self.width, self.kv_heads * self.width
        return {
            "fc.weight": (self.hidden, len(self.taps) * self.hidden),
            f"{at}.self_attn.q_proj.weight": (head, 2 * self.hidden),
            f"{at}.self_attn.k_proj.weight": (kv, 2 * self.hidden),
            f"{at}.self_attn.v_proj.weight": (kv, 2 * self.hidden),
            f"{at}.self_attn.o_proj.weight": (self.hidden, head),
            f"{at}.mlp.gate_proj.weight": (self.inner, self.hidden),
            f"{at}.mlp.up_proj.weight": (self.inner, self.hidden),
            f"{at}.mlp.down_proj.weight": (self.hidden, self.inner),
        }

    def norms(self) -> list[str]:
        """Return the names of the norms' weights."""
        inner = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        return [*(f"midlayer.{name}.weight" for name in inner), "norm.weight"]

    def config(self) -> dict[str, Any]:
        """Return what SGLang reads from ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width,
            "intermediate_size": self.inner,
            "hidden_act": "silu",
            "vocab_size": self.vocab,
            "draft_vocab_size": self.draft_vocab,
            "tie_word_embeddings": False,
            "max_position_embeddings": 8192,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.theta,
            "torch_dtype": "float16",
            # SGLang counts the layers that a state leaves, not those that it enters.
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in self.taps],
                "use_aux_hidden_state": True,
            },
        }


def save(folder: Path, shape: Shape, weights: Mapping[str, Tensor], draft_ids: Tensor) -> None:
    """Write a head to a folder: ``head.safetensors`` and ``config.json``.

    Parameters
    ----------
    folder : Path
    shape : Shape
    weights : mapping of str to Tensor
        By the names of :class:`Shape` and ``lm_head.weight``; written as fp16.
    draft_ids : Tensor, int64, [draft_vocab]
        The token that each entry of the draft vocabulary stands for, ascending.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: weight.detach().half().cpu() for name, weight in weights.items()}
    stored["d2t"] = draft_ids - torch.arange(len(draft_ids))
    stored["t2d"] = torch.zeros(shape.vocab, dtype=torch.bool).index_fill_(0, draft_ids, True)
    save_file(stored, folder / "head.safetensors")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")


def load(folder: Path) -> tuple[Shape, dict[str, Tensor], Tensor]:
    """Return a head's shape, its weights as fp32, and its draft vocabulary's token ids."""
    stored = load_file(folder / "head.safetensors")
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        width=config["head_dim"],
        inner=config["intermediate_size"],
        vocab=config["vocab_size"],
        draft_vocab=config["draft_vocab_size"],
        theta=config["rope_theta"],
        epsilon=config["rms_norm_eps"],
        taps=tuple(i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]),
    )
    weights = {name: one.float() for name, one in stored.items() if name not in _INTEGERS}
    return shape, weights, stored["d2t"] + torch.arange(shape.draft_vocab)
