"""The Triton kernel of `store`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_kernel(
    cache_k, cache_v, k, v, slots,
    stride_ckn, stride_ckh, stride_cks, stride_cvn, stride_cvh, stride_cvs, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token: its key and value of all H heads into slot ``slots[t]``."""
    i_t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + i_t)
    i_n, i_s = slot // S, slot % S
    o_h = tl.arange(0, BLOCK_H)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_hd = (o_h < H) & (o_d < D)
    b_k = tl.load(k + i_t * stride_kt + o_h * stride_kh + o_d, mask=m_hd)  # [BLOCK_H, BLOCK_D]
    b_v = tl.load(v + i_t * stride_vt + o_h * stride_vh + o_d, mask=m_hd)  # [BLOCK_H, BLOCK_D]
    tl.store(cache_k + i_n * stride_ckn + o_h * stride_ckh + i_s * stride_cks + o_d, b_k, mask=m_hd)
    tl.store(cache_v + i_n * stride_cvn + o_h * stride_cvh + i_s * stride_cvs + o_d, b_v, mask=m_hd)
