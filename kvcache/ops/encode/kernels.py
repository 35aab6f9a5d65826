"""The Triton kernel of `encode`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """Numbers between -2**22 and 2**22 rounded to integers, half to even, as this addition rounds them."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def multiples_of(b_bound):
    """A page's bounds [D] as integer multiples of their scale, and that scale."""
    scale = tl.div_rn(tl.max(tl.abs(b_bound), 0), 127.0)
    return nearest(tl.div_rn(b_bound, tl.maximum(scale, 1e-30))), scale


@triton.jit
def encode_kernel(
    k, summaries, frames, levels, bounds, scales,
    stride_kn, stride_kh, stride_ks, stride_un, stride_uh, stride_ui,
    stride_wn, stride_wh, stride_ww, stride_bn, stride_bh, stride_bi, stride_cn, stride_ch,
    S: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one listed frame: its bounds to int8, its S keys to W words of levels."""
    PER_WORD: tl.constexpr = 32 // BITS
    i_n = tl.load(frames + tl.program_id(0)).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_u = summaries + i_n * stride_un + i_h * stride_uh + o_d
    b_least = tl.load(p_u + stride_ui, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    b_greatest = tl.load(p_u + 2 * stride_ui, mask=m_d, other=0.0).to(tl.float32)
    b_middle, middle_scale = multiples_of((b_least + b_greatest) * 0.5)
    b_half, half_scale = multiples_of((b_greatest - b_least) * 0.5)
    p_b = bounds + i_n * stride_bn + i_h * stride_bh + o_d
    tl.store(p_b, b_middle.to(tl.int8), mask=m_d)
    tl.store(p_b + stride_bi, b_half.to(tl.int8), mask=m_d)
    p_c = scales + i_n * stride_cn + i_h * stride_ch
    tl.store(p_c, middle_scale)
    tl.store(p_c + 1, half_scale)

    b_extent = b_half * half_scale
    b_low = b_middle * middle_scale - b_extent
    b_width = tl.maximum(b_extent * (2.0 / 2**BITS), 1e-30)
    o_w = tl.arange(0, BLOCK_D // PER_WORD)
    for i_s in range(0, S, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S)
        m_sd = (o_s < S)[:, None] & m_d[None, :]
        p_k = k + i_n * stride_kn + i_h * stride_kh + o_s[:, None] * stride_ks + o_d[None, :]
        b_k = tl.load(p_k, mask=m_sd, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_D]
        b_cell = tl.floor(tl.div_rn(b_k - b_low[None, :], tl.zeros_like(b_k) + b_width[None, :]))
        b_level = tl.minimum(tl.maximum(b_cell, 0.0), 2.0**BITS - 1).to(tl.int32)
        b_level = tl.where(m_sd, b_level, 0) << (o_d % PER_WORD * BITS)[None, :]
        b_word = tl.sum(tl.reshape(b_level, [BLOCK_S, BLOCK_D // PER_WORD, PER_WORD]), 2)  # no two share a bit
        p_w = levels + i_n * stride_wn + i_h * stride_wh + o_w[None, :] * stride_ww + o_s[:, None]
        tl.store(p_w, b_word, mask=(o_s < S)[:, None] & (o_w < W)[None, :])
