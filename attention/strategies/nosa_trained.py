"""NOSA for its own checkpoints: a few blocks by the query, all others by the learned bias of their keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keysift.kvcache import CacheSpec, Context

from ..block import BlockStrategy, biases, group_sum, log_sum, scores
from ..strategy import Positive, Tokens, option


@dataclass(frozen=True, slots=True, kw_only=True)
class NosaTrained(BlockStrategy):
    """The `query_blocks` that the query attends to most, and up to `topk` those whose keys carry the greatest bias.

    The second choice does not depend on the query, so most of what a token reads its predecessor has read. Only for
    checkpoints with such a bias; the defaults are those that they were trained with. Prompts read everything, with the
    bias, which is more than in training. Generated tokens are scored like all others.
    """

    source = "Huang et al., NOSA: Native and Offloadable Sparse Attention, arXiv 2510.13602"
    dense_below: Tokens = option(
        4096, "tokens of a context up to which everything is read: topk blocks leave nothing out"
    )
    window_size: Tokens = 1024
    topk: Positive = option(64, "blocks to read in all")
    query_blocks: Positive = option(33, "blocks by the query, those that every token reads included")

    def __post_init__(self) -> None:
        BlockStrategy.__post_init__(self)
        if (least := self.init_blocks + self.local_blocks + 1) > self.query_blocks:
            raise ValueError(
                f"query_blocks: at least {least}, the blocks that are always read, got {self.query_blocks}"
            )
        if self.query_blocks > self.topk:
            raise ValueError(f"topk: at least query_blocks ({self.query_blocks}), got {self.topk}")

    def choose(self, q: Tensor, context: Context) -> Tensor:
        step, heads = context.step, context.spec.num_kv_heads
        fine = self.windows(scores(q, context), step)  # [R, Hq, w]
        by_query = self.pooled(group_sum(fine - log_sum(fine), heads), step)
        wanted = self.top(by_query, self.query_blocks, self.forced(step)[:, None], step)
        by_bias = self.pooled(self.windows(biases(q, context), step), step)
        return self.top(by_bias, self.topk, wanted, step)

    def check(self, spec: CacheSpec) -> None:
        BlockStrategy.check(self, spec)
        if not spec.bias_channels:
            raise ValueError("the model's keys carry no learned bias, it was not trained for this")

    @property
    def most_blocks(self) -> int:
        return self.topk

    @property
    def name(self) -> str:
        return "nosa-trained"
