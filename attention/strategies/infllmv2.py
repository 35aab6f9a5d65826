"""InfLLM-V2: blocks by the mean keys of overlapping windows, as MiniCPM was trained with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keysift.kvcache import Context

from ..block import BlockStrategy, group_sum, log_sum, scores
from ..strategy import Positive, Tokens, option

COARSE = 4
"""Length and stride of the windows by which shares are normalised, in those of the windows that are ranked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLMv2(BlockStrategy):
    """The blocks that the heads of a group attend to most in sum, by the mean keys of windows.

    A window's share is normalised by coarser windows, which are a quarter as many. Options and defaults are those of
    MiniCPM4; a model whose configuration has a `sparse_config` brings its own. As there, the local blocks do not count
    into `topk`.
    """

    source = "Zhao et al., InfLLM-V2: Dense-Sparse Switchable Attention, arXiv 2509.24663"
    config_key = "sparse_config"
    removed: ClassVar[Mapping[str, str]] = {
        "dense_len": "use dense_below, which is dense_len - 1",
        "use_nope": "keys are cached after rotary embedding, and scored as they are cached",
    }
    dense_below: Tokens = option(8191, "tokens of a context up to which everything is read: dense_len - 1 of a model")
    topk: Positive = option(64, "blocks to read besides the window's")

    def __post_init__(self) -> None:
        BlockStrategy.__post_init__(self)
        if self.init_blocks >= self.topk:
            raise ValueError(f"topk: more than init_blocks ({self.init_blocks}), got {self.topk}")

    @classmethod
    def from_config(cls, stated: Mapping[str, object]) -> dict[str, object]:
        """MiniCPM's `sparse_config`: contexts shorter than `dense_len` are dense, and `use_nope` has to be off."""
        options = dict(stated)
        if (use_nope := options.pop("use_nope", False)) is not False:
            raise ValueError(f"use_nope: keys are cached after rotary embedding only, got {use_nope!r}")
        if "dense_len" in options:
            options["dense_below"] = max(_dense_len(options.pop("dense_len")) - 1, 0)
        return options

    def choose(self, q: Tensor, context: Context) -> Tensor:
        step, pages = context.step, scores(q, context)
        fine = self.windows(pages, step)  # [R, Hq, w]
        norm = log_sum(self.windows(pages, step, COARSE))
        norm = torch.where(norm.isneginf(), log_sum(fine), norm)  # too short a context has no coarse window
        shares = group_sum(fine - norm, context.spec.num_kv_heads)
        return self.top(self.pooled(shares, step), self.most_blocks, self.forced(step)[:, None], step)

    @property
    def most_blocks(self) -> int:
        return self.topk + self.local_blocks


def _dense_len(stated: object) -> int:
    """The whole number of tokens that a configuration states, -1: none."""
    if isinstance(stated, int | float) and not isinstance(stated, bool) and stated >= -1 and stated == int(stated):
        return int(stated)
    raise ValueError(f"dense_len: a number of tokens or -1, got {stated!r}")
