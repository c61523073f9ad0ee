"""A causal language model on the selected backend, with a KV cache whose slots can be moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import hwcore

if TYPE_CHECKING:
    import transformers


def device() -> torch.device:
    """Return the selected backend's device."""
    return hwcore.current_backend().device()


class SlotCache:
    """Keys and values of one sequence, in memory allocated once; new entries follow the kept ones.

    To the network it is a transformers cache: it has the methods that attention layers and mask
    building call.
    """

    is_compileable = False

    def __init__(self, config: Any, capacity: int, where: torch.device) -> None:
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        # [layer, keys or values, 1, heads, slots, width]: one move serves all layers
        self._entries = torch.zeros(layers, 2, 1, heads, capacity, width, device=where)
        self.length = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one layer's entries ``[1, heads, n, width]``; return all that it has."""
        end = self.length + keys.shape[2]
        own_keys, own_values = self._entries[layer_idx]
        own_keys[:, :, self.length : end] = keys
        own_values[:, :, self.length : end] = values
        return own_keys[:, :, :end], own_values[:, :, :end]

    def move(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy slots ``src [n]`` to ``dst [n]`` in every layer."""
        self._entries.index_copy_(4, dst, self._entries.index_select(4, src))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens are kept."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the place of the next token."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return how many keys a query of this length meets, and their offset."""
        return self.length + query_length, 0


class Model:
    """A network and the KV cache of one sequence.

    Parameters
    ----------
    network : transformers.PreTrainedModel
        Moved to the selected backend's device.
    capacity : int
        Slots in the KV cache: prompt, answer and the widest tree.
    """

    def __init__(self, network: transformers.PreTrainedModel, capacity: int) -> None:
        self.device = device()
        # Through Any: transformers' decorators hide the types of these calls.
        moving: Any = network
        self._network: Any = moving.to(self.device).eval()
        self.cache = SlotCache(network.config, capacity, self.device)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        last: int = 0,
    ) -> torch.Tensor:
        """Append tokens to the cache and return their logits.

        Parameters
        ----------
        tokens : Tensor, int64, [1, n]
        positions : Tensor, int64, [1, n], optional
            Default: the tokens follow one another.
        mask : Tensor, bool, [1, 1, n, length + n], optional
            What each token attends to. Default: all before it.
        last : int
            Return the logits of this many tokens only; 0: of all.

        Returns
        -------
        logits : Tensor, [1, n, vocab]
        """
        logits: torch.Tensor = self._network(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits
        self.cache.length += tokens.shape[1]
        return logits
