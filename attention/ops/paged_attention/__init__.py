"""Attention of packed queries over chosen pages: the op of every strategy."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.kvcache.ops.dispatch import op


@op(
    native="keysift.attention.ops.paged_attention.native:paged_attention",
    triton="keysift.attention.ops.paged_attention.triton:paged_attention",
)
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: Tensor,
    pages: Tensor,
    starts: Tensor,
    *,
    queries_per_row: int,
    scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the tokens of its row's pages that are not in its future.

    Row r holds the queries ``r * M ... min((r + 1) * M, T) - 1``; the i-th of them stands at position ``starts[r] + i``
    of its sequence and sees position j where ``j <= starts[r] + i`` and, with a window, ``j > starts[r] + i - window``.
    Accumulates in fp32. Tokens that no query sees never reach a result, not even as NaN.

    Args:
        q: [T, Hq, D], any strides with a contiguous last axis.
        k: [N, Hkv, S, D], frames of keys after rotary embedding; v likewise. Same dtype as q.
        frames: [R, Hkv, F] int32, page -> frame of each row's sequence; axes may have stride 0.
        pages: [R, H, P] int32 with H in (Hkv, Hq): ascending page numbers, -1 pads the end; axes may have stride 0.
        starts: [R] int32, position of each row's first query.
        queries_per_row: M.
        scale: factor of the scores.
        window: tokens that a query sees, itself included; 0: all.

    Returns:
        out [T, Hq, D] in q's dtype, contiguous, and the natural-log log-sum-exp of the scores [T, Hq] in fp32;
        a query that sees nothing has out 0 and lse -inf.
    """
    tokens, heads, dim = q.shape
    out = torch.zeros(tokens, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.full((tokens, heads), float("-inf"), device=q.device)
    for row in range(starts.shape[0]):
        here = slice(row * queries_per_row, min((row + 1) * queries_per_row, tokens))
        positions = starts[row] + torch.arange(here.stop - here.start, device=q.device)
        keys, values, where = _gather(k, v, frames[row], pages[row], group=heads // k.shape[1])
        out[here], lse[here] = _attend(q[here].float(), keys, values, where, positions, scale, window)
    return out.to(q.dtype), lse


def _gather(k: Tensor, v: Tensor, frames: Tensor, pages: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [Hq, P * S, D] of one row's pages [H, P], and their positions [Hq, P * S], -1 where padded."""
    num_kv_heads, page_size, heads = k.shape[1], k.shape[2], k.shape[1] * group
    pages = pages.repeat_interleave(heads // pages.shape[0], dim=0).long()  # [Hq, P]
    kv_head = torch.arange(num_kv_heads, device=k.device).repeat_interleave(group)[:, None]  # [Hq, 1]
    frame = frames.long()[kv_head, pages.clamp(min=0)]  # [Hq, P]
    where = pages[..., None] * page_size + torch.arange(page_size, device=k.device)
    where = where.masked_fill(pages[..., None] < 0, -1).flatten(1)  # [Hq, P * S]
    return k[frame, kv_head].flatten(1, 2).float(), v[frame, kv_head].flatten(1, 2).float(), where


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, where: Tensor, positions: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """q [M, Hq, D] over keys [Hq, J, D] at `where` [Hq, J] -> out [M, Hq, D], lse [M, Hq]."""
    ages = positions[:, None, None] - where  # [M, Hq, J]
    seen = (where >= 0) & (ages >= 0)
    if window:
        seen = seen & (ages < window)
    scores = torch.einsum("mhd,hjd->mhj", q, keys) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    visible = seen.any(0)[..., None]  # a slot that no query sees may hold anything: 0 * NaN must not happen
    return torch.einsum("mhj,hjd->mhd", weights, values.masked_fill(~visible, 0.0)), lse
