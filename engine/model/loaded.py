"""Loaded model and its properties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keysift.attention import Attend

from . import placement
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device, and the properties that the cache, the strategies and the server need."""

    name: str
    module: nn.Module
    tokenizer: Tokenizer
    max_model_len: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: frozenset[int]
    """Tokens that end a text, whichever of the model's files states them; see `endings`."""
    scale: float
    """Factor of query-key products before the softmax."""
    windows: tuple[int, ...]
    """Per layer: a query reads itself and the window - 1 tokens before it; 0: everything before it."""
    devices: tuple[torch.device, ...]
    """Per layer: device of its attention."""
    fingerprint: str
    """Equal for equal weights in the same precision; part of every prefix-cache key."""
    bias_channels: int = 0
    """Channels of a learned key bias, which the cache holds for each head besides `head_dim`; see `key_bias`."""
    ranks: int = 1
    """Processes that share the model. All properties, such as `num_kv_heads`, are those of this rank's part."""

    def forward(self, input_ids: Tensor, positions: Tensor, last: Tensor, attend: Attend) -> Tensor:
        """Next-token logits [B, V] fp32 after the tokens at indices last [B] of input_ids [T] at positions [T].

        `attend` is called once per layer and knows each token's sequence.
        """
        with torch.inference_mode(), placement.keep_logits(self.module, self.devices, last) as kept:
            output = self.module(
                input_ids=input_ids[None],
                position_ids=positions[None],
                use_cache=False,
                attend=attend,
                **kept,
            )
        return output.logits[0].float()  # type: ignore[no-any-return]  # [B, V]
