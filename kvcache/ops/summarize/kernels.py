"""The Triton kernel of `summarize`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def summarize_kernel(
    summaries, k, v, frames,
    stride_un, stride_uh, stride_ui, stride_kn, stride_kh, stride_ks, stride_vn, stride_vh, stride_vs,
    S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one listed frame: its S keys and values to four rows."""
    i_n = tl.load(frames + tl.program_id(0)).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    m_sd = (o_s < S) & (o_d < D)[None, :]
    p_k = k + i_n * stride_kn + i_h * stride_kh + o_s * stride_ks + o_d[None, :]
    p_v = v + i_n * stride_vn + i_h * stride_vh + o_s * stride_vs + o_d[None, :]
    b_k = tl.load(p_k, mask=m_sd, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_D]
    b_v = tl.load(p_v, mask=m_sd, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_D]

    p_u = summaries + i_n * stride_un + i_h * stride_uh + o_d
    dtype: tl.constexpr = summaries.dtype.element_ty
    b_least = tl.min(tl.where(m_sd, b_k, float("inf")), 0)
    b_greatest = tl.max(tl.where(m_sd, b_k, float("-inf")), 0)
    tl.store(p_u, (tl.sum(b_k, 0) / S).to(dtype), mask=o_d < D)
    tl.store(p_u + stride_ui, b_least.to(dtype), mask=o_d < D)
    tl.store(p_u + 2 * stride_ui, b_greatest.to(dtype), mask=o_d < D)
    tl.store(p_u + 3 * stride_ui, (tl.sum(b_v, 0) / S).to(dtype), mask=o_d < D)
