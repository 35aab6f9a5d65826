"""FlexAttention over selected pages: torch's nearest equivalent of paged attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from keysift.kvcache import Selection, Step

from ..lib.prompt import Prompt
from .clock import causal_pairs

BLOCKS = ((64, 16), (128, 128))
"""Queries and keys of a block: those of our rows and pages, and those that FlexAttention is made for."""


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


class Flex:
    """Compiled once for each length and kind of block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @cached_property
    def _compiled(self) -> Any:
        return torch.compile(flex_attention, dynamic=False)

    def mask(
        self, prompt: Prompt, selections: Sequence[Selection], row: int, block: tuple[int, int]
    ) -> tuple[BlockMask, float]:
        """The blocks that hold what was chosen, and how many pairs they keep, all query heads counted.

        Blocks before all queries are full, the others are masked: those of the queries' own tokens. Block
        sizes divide the prompt, those of keys divide those of queries.
        """
        tokens, heads, _ = prompt.q.shape
        both = zip(selections, prompt.contexts, strict=True)
        chosen = torch.cat([_blocks(selection, c.step, row, block, tokens) for selection, c in both], 1)  # [H, Q, K]
        chosen = chosen.repeat_interleave(heads // chosen.shape[0], 0)  # [Hq, Q, K]
        first = torch.arange(chosen.shape[1], device=chosen.device)[:, None] * block[0]
        last = torch.arange(1, chosen.shape[2] + 1, device=chosen.device) * block[1] - 1
        full = chosen & (last <= first)
        pairs = float(full.sum(dtype=torch.float64)) * block[0] * block[1] + heads * (
            tokens // block[0]
        ) * causal_pairs(block[0])
        mask = BlockMask.from_kv_blocks(
            *_listed(chosen & ~full), *_listed(full), BLOCK_SIZE=block, mask_mod=causal,
            seq_lengths=(tokens, tokens), compute_q_blocks=False,
        )  # fmt: skip
        return mask, pairs

    def work(self, prompt: Prompt, mask: BlockMask) -> Callable[[], Tensor]:
        """Attention of the whole prompt, [1, Hq, T, D]."""
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (prompt.q, prompt.k, prompt.v))
        rows, keys = mask.BLOCK_SIZE
        options = {"BLOCK_M": rows, "BLOCK_N": keys} if self._device.type == "cuda" and keys < 64 else None
        return lambda: self._compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)


def _blocks(selection: Selection, step: Step, row: int, block: tuple[int, int], tokens: int) -> Tensor:
    """[H, Q, K] bool, blocks that hold a chosen page of a chunk's rows."""
    size, mask = step.page_size, selection.mask(step.max_pages).transpose(0, 1)  # [H, R, F]
    wide = torch.nn.functional.pad(mask, (0, tokens // size - step.max_pages))
    split = torch.unflatten(torch.unflatten(wide, 2, (-1, block[1] // size)), 1, (-1, block[0] // row))
    return split.any(4).any(2)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [1, Hq, Q] and ascending numbers [1, Hq, Q, K] of the true blocks [Hq, Q, K], as BlockMask has them."""
    listed = Selection.from_mask(blocks).pages.clamp(min=0)
    return blocks.sum(-1, dtype=torch.int32)[None], listed[None].contiguous()
