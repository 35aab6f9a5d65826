"""InfLLM-V2: blocks by the mean keys of overlapping windows, as MiniCPM was trained with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from keysift.kvcache import Context

from ..block import BlockStrategy, group_sum, log_sum, scores
from ..strategy import LARGEST, Positive

COARSE = 4
"""The windows by which shares are normalised are so many times as long, and as far apart, as those that are ranked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLMv2(BlockStrategy):
    """The blocks that the heads of a group attend to most in sum, by the mean keys of windows.

    Zhao et al., "InfLLM-V2: Dense-Sparse Switchable Attention", arXiv 2509.24663. A window's share is normalised by
    coarser windows, which are a quarter as many. The options and their defaults are those of MiniCPM4; a model whose
    configuration has a `sparse_config` brings its own. As there, `topk` counts beside the local blocks.
    """

    config_key: ClassVar[str | None] = "sparse_config"
    topk: Positive = 64
    """Blocks to read, those of the window apart."""
    use_nope: bool = False
    """Scores by keys before rotary embedding: not supported."""
    dense_len: Annotated[int, Field(ge=-1, le=LARGEST)] = 8192
    """Contexts shorter than this are read whole; -1: none. `dense_below` is raised to it."""

    def __post_init__(self) -> None:
        BlockStrategy.__post_init__(self)
        if self.use_nope:
            raise ValueError("use_nope: keys are cached after rotary embedding only, got True")
        if self.init_blocks >= self.topk:
            raise ValueError(f"topk: more than init_blocks ({self.init_blocks}), got {self.topk}")
        object.__setattr__(self, "dense_below", max(self.dense_below, self.dense_len - 1))

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
