"""The Triton kernels of `paged_attention`: one attends over gathered pages, one merges the pieces of a list."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["T", "P", "PIECE", "window"])
def attend_kernel(
    q, k, v, frames, pages, starts, out, lse, scale, window, T, P, PIECE,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_ks, stride_vn, stride_vh, stride_vs,
    stride_fr, stride_fh, stride_fp, stride_pr, stride_ph, stride_pp,
    M: tl.constexpr, Hq: tl.constexpr, G: tl.constexpr, PACK: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M packed queries of one row and selection head over PIECE pages of its list.

    Query i of a row and head is token ``i // PACK`` and head ``i % PACK`` of the PACK = Hq // H that share the list.
    `scale` is in base 2.
    """
    BLOCKS: tl.constexpr = (M * PACK + BLOCK_M - 1) // BLOCK_M
    H: tl.constexpr = Hq // PACK
    i_b = tl.program_id(0) % BLOCKS
    i_h = tl.program_id(0) // BLOCKS % H
    i_r = (tl.program_id(0) // (BLOCKS * H)).to(tl.int64)
    i_piece = tl.program_id(1)
    i_kv = (i_h * PACK // G).to(tl.int64)

    o_m = i_b * BLOCK_M + tl.arange(0, BLOCK_M)
    o_t = i_r * M + o_m // PACK
    o_h = i_h * PACK + o_m % PACK
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_m = (o_m < M * PACK) & (o_t < T)
    p_q = q + o_t[:, None] * stride_qt + o_h[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]

    start = tl.load(starts + i_r)
    present = tl.minimum(T - i_r * M, M).to(tl.int32)
    first = start + i_b * BLOCK_M // PACK
    last = start + tl.minimum((i_b * BLOCK_M + BLOCK_M - 1) // PACK, present - 1)
    b_position = start + o_m // PACK  # [BLOCK_M]

    # Pages ascend, so those that some query of the block may see are a run lo..hi of the list, and those that each of
    # them sees whole are a run within it: tiles of these need no mask on their scores.
    p_pages = pages + i_r * stride_pr + i_h * stride_ph
    lo = i_piece * PIECE
    hi = i_piece * PIECE
    whole_lo = i_piece * PIECE
    whole_hi = i_piece * PIECE
    end = tl.minimum(i_piece * PIECE + PIECE, P)
    for i_p in range(i_piece * PIECE, end, BLOCK_P):
        o_p = i_p + tl.arange(0, BLOCK_P)
        b_page = tl.load(p_pages + o_p * stride_pp, mask=o_p < end, other=-1)  # [BLOCK_P]
        lo += tl.sum(((b_page >= 0) & (b_page * S + S - 1 <= first - window)).to(tl.int32), 0)
        hi += tl.sum(((b_page >= 0) & (b_page * S <= last)).to(tl.int32), 0)
        whole_lo += tl.sum(((b_page >= 0) & (b_page * S <= last - window)).to(tl.int32), 0)
        whole_hi += tl.sum(((b_page >= 0) & (b_page * S + S - 1 <= first)).to(tl.int32), 0)

    p_frames = frames + i_r * stride_fr + i_kv * stride_fh
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_n in range(lo * S, hi * S, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < hi * S
        b_page = tl.load(p_pages + o_n // S * stride_pp, mask=m_n, other=0)  # [BLOCK_N]
        b_key = b_page * S + o_n % S
        m_n = m_n & (b_key <= last) & (b_key > first - window)
        b_frame = tl.load(p_frames + b_page * stride_fp, mask=m_n, other=0).to(tl.int64)  # [BLOCK_N]
        p_k = k + i_kv * stride_kh + b_frame * stride_kn + o_n % S * stride_ks
        p_v = v + i_kv * stride_vh + b_frame * stride_vn + o_n % S * stride_vs
        b_k = tl.load(p_k[None, :] + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)  # [BLOCK_D, BLOCK_N]
        b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]

        b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if (i_n < whole_lo * S) | (i_n + BLOCK_N > whole_hi * S):
            b_age = b_position[:, None] - b_key[None, :]
            b_s = tl.where(m_n[None, :] & (b_age >= 0) & (b_age < window), b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_fade = tl.exp2(b_top - b_base)
        b_w = tl.exp2(b_s - b_base[:, None])
        b_sum = b_sum * b_fade + tl.sum(b_w, 1)
        b_out = tl.dot(b_w.to(b_v.dtype), b_v, b_out * b_fade[:, None], input_precision="ieee")
        b_top = b_new

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    o_out = (i_piece.to(tl.int64) * T + o_t) * Hq + o_h
    tl.store(lse + o_out, (b_top + tl.log2(b_sum)) * LN2, mask=m_m)
    p_out = out + o_out[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["PIECES"])
def merge_kernel(
    pieces, pieces_lse, out, lse, PIECES, stride, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One query and head: the pieces' outputs weighted by their share of the sum; an empty piece changes no bit."""
    i_q = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    b_out = tl.zeros([BLOCK_D], tl.float32)
    for i_p in range(0, PIECES, BLOCK_P):
        o_p = (i_p + tl.arange(0, BLOCK_P)).to(tl.int64)
        m_p = o_p < PIECES
        o_piece = o_p * stride + i_q
        b_lse = tl.load(pieces_lse + o_piece, mask=m_p, other=float("-inf"))  # [BLOCK_P]
        p_piece = pieces + o_piece[:, None] * D + o_d[None, :]
        b_piece = tl.load(p_piece, mask=m_p[:, None] & m_d[None, :], other=0.0)  # [BLOCK_P, BLOCK_D]
        new = tl.maximum(top, tl.max(b_lse, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp(top - base)
        b_w = tl.exp(b_lse - base)
        total = total * fade + tl.sum(b_w, 0)
        b_out = b_out * fade + tl.sum(b_w[:, None] * b_piece, 0)
        top = new
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + i_q + tl.arange(0, 1), top + tl.log(total))
    tl.store(out + i_q * D + o_d, (b_out / total).to(out.dtype.element_ty), mask=m_d)
