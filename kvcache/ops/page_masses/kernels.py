"""The Triton kernels of `page_masses` and `page_bounds`, and the parts that those of `code_masses` share.

A program takes BLOCK_G query heads of one row and KV head over a tile of pages. A page's number never depends on what
else is in its tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def unit(TILES, Hkv: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr):
    """Tile of pages, row, KV head and block of query heads of a program."""
    GROUPS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    i_u = (tl.program_id(0) // TILES).to(tl.int64)
    return tl.program_id(0) % TILES, i_u // (GROUPS * Hkv), i_u // GROUPS % Hkv, i_u % GROUPS


@triton.jit
def load_heads(
    q, i_r, i_kv, i_g, stride_qr, stride_qh,
    G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The heads of a program, [BLOCK_G], which of them are there, and their queries [BLOCK_G, BLOCK_D]."""
    o_g = i_g * BLOCK_G + tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_h = i_kv * G + o_g
    p_q = q + i_r * stride_qr + o_h[:, None] * stride_qh + o_d[None, :]
    return o_h, o_g < G, tl.load(p_q, mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def join(b_top, b_sum, b_s):
    """Log-sum-exps in base 2, [BLOCK_G, BLOCK_P] each as a maximum and a sum, joined with scores of more slots."""
    b_new = tl.maximum(b_top, tl.max(b_s, 2))
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    return b_new, b_sum * tl.exp2(b_top - b_base) + tl.sum(tl.exp2(b_s - b_base[:, :, None]), 2)


@triton.jit
def exact(
    b_q, p_k, p_frames, i_p, position, F, scale, stride_kn, stride_ks, stride_fp,
    S: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The log masses [BLOCK_G, BLOCK_P] of pages by their keys; -inf where the query sees none of them."""
    o_n = tl.arange(0, BLOCK_P * BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    b_page = i_p + o_n // BLOCK_S
    b_top = tl.full([BLOCK_G, BLOCK_P], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
    for i_s in range(0, S, BLOCK_S):
        b_slot = i_s + o_n % BLOCK_S
        m_n = (b_slot < S) & (b_page < F) & (b_page * S + b_slot <= position)
        b_frame = tl.load(p_frames + b_page * stride_fp, mask=m_n, other=0).to(tl.int64)
        p_n = p_k + b_frame * stride_kn + b_slot * stride_ks
        b_k = tl.load(p_n[None, :] + o_d[:, None], mask=m_n[None, :] & (o_d < D)[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * (scale * LOG2E)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_top, b_sum = join(b_top, b_sum, tl.reshape(b_s, [BLOCK_G, BLOCK_P, BLOCK_S]))
    return (b_top + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum))) * LN2


@triton.jit
def store_own(
    masses, b_q, o_h, m_h, k, own, i_r, i_kv, position, F, scale, stride_kn, stride_kh, stride_ks, stride_or, stride_oh,
    Hq: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, OWN_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The page that the row stands in, exactly."""
    i_own = position // S
    p_own = own + i_r * stride_or + i_kv * stride_oh  # the frame of whatever page
    b_own = exact(
        b_q, k + i_kv * stride_kh, p_own, i_own, position, F, scale, stride_kn, stride_ks, 0,
        S, D, BLOCK_G, 1, OWN_S, BLOCK_D,
    )  # fmt: skip
    tl.store(
        masses + ((i_r * Hq + o_h) * F + i_own)[:, None] + tl.zeros([1, 1], tl.int32),
        b_own,
        mask=m_h[:, None] & (i_own < F),
    )


@triton.jit(do_not_specialize=["F"])
def masses_kernel(
    q, k, frames, positions, masses, scale, F,
    stride_qr, stride_qh, stride_kn, stride_kh, stride_ks, stride_fr, stride_fh, stride_fp,
    Hkv: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pages, exactly."""
    i_t, i_r, i_kv, i_g = unit(tl.cdiv(F, BLOCK_P), Hkv, G, BLOCK_G)
    o_h, m_h, b_q = load_heads(q, i_r, i_kv, i_g, stride_qr, stride_qh, G, D, BLOCK_G, BLOCK_D)
    o_p = i_t * BLOCK_P + tl.arange(0, BLOCK_P)
    position = tl.load(positions + i_r)
    b_mass = tl.full([BLOCK_G, BLOCK_P], float("-inf"), tl.float32)
    if i_t * BLOCK_P * S <= position:
        b_mass = exact(
            b_q, k + i_kv * stride_kh, frames + i_r * stride_fr + i_kv * stride_fh, i_t * BLOCK_P, position, F, scale,
            stride_kn, stride_ks, stride_fp, S, D, BLOCK_G, BLOCK_P, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    p_out = masses + ((i_r * (Hkv * G) + o_h) * F)[:, None] + o_p[None, :]
    tl.store(p_out, b_mass, mask=m_h[:, None] & (o_p < F)[None, :])


@triton.jit(do_not_specialize=["F"])
def bounds_kernel(
    q, k, own, summaries, frames, positions, masses, scale, F,
    stride_qr, stride_qh, stride_kn, stride_kh, stride_ks, stride_un, stride_uh, stride_ui,
    stride_fr, stride_fh, stride_fp, stride_or, stride_oh,
    Hkv: tl.constexpr, G: tl.constexpr, S: tl.constexpr, LOG_S: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, OWN_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pages at most: positive channels of a query meet the greatest keys, negative ones the least."""
    i_t, i_r, i_kv, i_g = unit(tl.cdiv(F, BLOCK_P), Hkv, G, BLOCK_G)
    o_h, m_h, b_q = load_heads(q, i_r, i_kv, i_g, stride_qr, stride_qh, G, D, BLOCK_G, BLOCK_D)
    o_p = i_t * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    position = tl.load(positions + i_r)
    p_frames = frames + i_r * stride_fr + i_kv * stride_fh
    m_p = o_p < position // S
    b_frame = tl.load(p_frames + o_p * stride_fp, mask=m_p, other=0).to(tl.int64)
    p_u = (summaries + i_kv * stride_uh + b_frame * stride_un)[None, :] + o_d[:, None]
    m_u = m_p[None, :] & (o_d < D)[:, None]
    b_least = tl.load(p_u + stride_ui, mask=m_u, other=0.0)  # [BLOCK_D, BLOCK_P]
    b_greatest = tl.load(p_u + 2 * stride_ui, mask=m_u, other=0.0)
    b_wide = b_q.to(tl.float32)
    b_s = tl.dot(tl.maximum(b_wide, 0.0).to(b_q.dtype), b_greatest, input_precision="ieee")
    b_s = tl.dot(tl.minimum(b_wide, 0.0).to(b_q.dtype), b_least, b_s, input_precision="ieee")
    b_mass = tl.where(m_p[None, :], b_s * scale + LOG_S, float("-inf"))
    p_out = masses + ((i_r * (Hkv * G) + o_h) * F)[:, None] + o_p[None, :]
    tl.store(p_out, b_mass, mask=m_h[:, None] & ((o_p < F) & (o_p != position // S))[None, :])
    if i_t == 0:
        store_own(
            masses, b_q, o_h, m_h, k, own, i_r, i_kv, position, F, scale, stride_kn, stride_kh, stride_ks, stride_or,
            stride_oh, Hkv * G, S, D, BLOCK_G, OWN_S, BLOCK_D,
        )  # fmt: skip
