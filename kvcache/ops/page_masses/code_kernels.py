"""The Triton kernels of `code_masses`: a first look at the bounds of all pages, and the scan of their codes.

Bounds are whole numbers times a scale that their page shares. Products with them are made of the whole numbers, which
16-bit floats hold exactly, and multiplied by the scale in fp32: the queries' dtype costs next to nothing.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import LN2, LOG2E, join, load_heads, store_own, unit


@triton.jit(do_not_specialize=["F"])
def centres_kernel(
    q, k, own, bounds, scales, frames, positions, masses, promises, scale, slack, F,
    stride_qr, stride_qh, stride_kn, stride_kh, stride_ks, stride_bn, stride_bh, stride_bi, stride_cn, stride_ch,
    stride_fr, stride_fh, stride_fp, stride_or, stride_oh,
    Hkv: tl.constexpr, G: tl.constexpr, S: tl.constexpr, LOG_S: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, OWN_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pages by their middles, and how high a key within their bounds may score; the row's own page exactly."""
    i_t, i_r, i_kv, i_g = unit(tl.cdiv(F, BLOCK_P), Hkv, G, BLOCK_G)
    o_h, m_h, b_q = load_heads(q, i_r, i_kv, i_g, stride_qr, stride_qh, G, D, BLOCK_G, BLOCK_D)
    o_p = i_t * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    position = tl.load(positions + i_r)
    p_frames = frames + i_r * stride_fr + i_kv * stride_fh
    m_p = o_p < position // S
    b_frame = tl.load(p_frames + o_p * stride_fp, mask=m_p, other=0).to(tl.int64)
    p_b = (bounds + i_kv * stride_bh + b_frame * stride_bn)[None, :] + o_d[:, None]
    m_b = m_p[None, :] & (o_d < D)[:, None]
    b_middle = tl.load(p_b, mask=m_b, other=0).to(tl.float32).to(b_q.dtype)  # [BLOCK_D, BLOCK_P]
    b_half = tl.load(p_b + stride_bi, mask=m_b, other=0).to(tl.float32).to(b_q.dtype)
    p_c = scales + i_kv * stride_ch + b_frame * stride_cn
    b_unit = tl.load(p_c, mask=m_p, other=0.0) * scale
    b_slack = tl.load(p_c + 1, mask=m_p, other=0.0) * (scale * slack)
    b_abs = tl.abs(b_q.to(tl.float32)).to(b_q.dtype)
    b_centre = tl.dot(b_q, b_middle, input_precision="ieee") * b_unit[None, :]  # [BLOCK_G, BLOCK_P]
    b_promise = b_centre + tl.dot(b_abs, b_half, input_precision="ieee") * b_slack[None, :]
    o_out = ((i_r * (Hkv * G) + o_h) * F)[:, None] + o_p[None, :]
    m_out = m_h[:, None] & (o_p < F)[None, :]
    tl.store(promises + o_out, tl.where(m_p[None, :], b_promise, float("-inf")), mask=m_out)
    m_out = m_out & (o_p != position // S)[None, :]
    tl.store(masses + o_out, tl.where(m_p[None, :], b_centre + LOG_S, float("-inf")), mask=m_out)
    if i_t == 0:
        store_own(
            masses, b_q, o_h, m_h, k, own, i_r, i_kv, position, F, scale, stride_kn, stride_kh, stride_ks, stride_or,
            stride_oh, Hkv * G, S, D, BLOCK_G, OWN_S, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["F", "P"])
def codes_kernel(
    q, k, own, levels, bounds, scales, frames, positions, pages, masses, scale, F, P,
    stride_qr, stride_qh, stride_kn, stride_kh, stride_ks, stride_wn, stride_wh, stride_ww,
    stride_bn, stride_bh, stride_bi, stride_cn, stride_ch, stride_fr, stride_fh, stride_fp,
    stride_or, stride_oh,
    Hkv: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    LISTED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, OWN_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_P of the P pages in the list of a row and KV head by their codes, and nothing else.

    Without LISTED the pages are 0 ... P - 1, those that hold no full page get -inf, and the row's own page is exact.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    BLOCK_W: tl.constexpr = BLOCK_D // PER_WORD
    i_t, i_r, i_kv, i_g = unit(tl.cdiv(P, BLOCK_P), Hkv, G, BLOCK_G)
    o_h, m_h, b_q = load_heads(q, i_r, i_kv, i_g, stride_qr, stride_qh, G, D, BLOCK_G, BLOCK_D)
    position = tl.load(positions + i_r)
    p_frames = frames + i_r * stride_fr + i_kv * stride_fh
    b_page = i_t * BLOCK_P + tl.arange(0, BLOCK_P)
    m_out = b_page < P
    if LISTED:
        b_page = tl.load(pages + (i_r * Hkv + i_kv) * P + b_page, mask=m_out, other=-1)
    m_p = m_out & (b_page >= 0) & (b_page < position // S)
    b_mass = tl.full([BLOCK_G, BLOCK_P], float("-inf"), tl.float32)
    if tl.max(m_p.to(tl.int32), 0) > 0:
        b_frame = tl.load(p_frames + b_page * stride_fp, mask=m_p, other=0).to(tl.int64)
        o_d = tl.arange(0, BLOCK_D)
        p_b = (bounds + i_kv * stride_bh + b_frame * stride_bn)[None, :] + o_d[:, None]
        m_b = m_p[None, :] & (o_d < D)[:, None]
        b_middle = tl.load(p_b, mask=m_b, other=0).to(tl.float32).to(b_q.dtype)  # [BLOCK_D, BLOCK_P]
        b_half = tl.load(p_b + stride_bi, mask=m_b, other=0).to(tl.float32)
        b_half = tl.reshape(b_half, [BLOCK_W, PER_WORD, BLOCK_P, 1])
        p_c = scales + i_kv * stride_ch + b_frame * stride_cn
        b_unit = tl.load(p_c, mask=m_p, other=0.0) * (scale * LOG2E)
        b_step = tl.load(p_c + 1, mask=m_p, other=0.0) * (scale * LOG2E)
        b_centre = tl.dot(b_q, b_middle, input_precision="ieee") * b_unit[None, :]  # [BLOCK_G, BLOCK_P]

        o_w = tl.arange(0, BLOCK_W)[:, None, None]
        p_w = (levels + i_kv * stride_wh + b_frame * stride_wn)[None, :, None] + o_w * stride_ww
        b_shift = (tl.arange(0, PER_WORD) * BITS)[None, :, None, None]
        b_top = tl.full([BLOCK_G, BLOCK_P], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
        for i_s in range(0, S, BLOCK_S):
            o_s = i_s + tl.arange(0, BLOCK_S)[None, None, :]
            m_w = (o_w < W) & m_p[None, :, None] & (o_s < S)
            b_word = tl.load(p_w + o_s, mask=m_w, other=0)[:, None, :, :]  # [BLOCK_W, 1, BLOCK_P, BLOCK_S]
            b_level = (b_word >> b_shift) & (2**BITS - 1)
            # The level in the first bits of a float's mantissa is 1 + level / cells: no conversion, which is slow.
            b_cell = (b_level << (23 - BITS) | 0x3F800000).to(tl.float32, bitcast=True)
            b_key = b_half * (b_cell * 2.0 - (3.0 - 0.5**BITS))  # from the middle, in steps of the half width's scale
            b_key = tl.reshape(b_key, [BLOCK_D, BLOCK_P * BLOCK_S]).to(b_q.dtype)
            b_s = tl.reshape(tl.dot(b_q, b_key, input_precision="ieee"), [BLOCK_G, BLOCK_P, BLOCK_S])
            b_s = b_s * b_step[None, :, None] + b_centre[:, :, None]
            b_top, b_sum = join(b_top, b_sum, tl.where(m_p[None, :, None] & (o_s < S), b_s, float("-inf")))
        b_mass = (b_top + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum))) * LN2

    m_out = m_p if LISTED else m_out & (b_page != position // S)
    p_out = masses + ((i_r * (Hkv * G) + o_h) * F)[:, None] + b_page[None, :]
    tl.store(p_out, b_mass, mask=m_h[:, None] & m_out[None, :])
    if not LISTED:  # noqa: SIM102 - a constant is no part of a condition
        if i_t == 0:
            store_own(
                masses, b_q, o_h, m_h, k, own, i_r, i_kv, position, F, scale, stride_kn, stride_kh, stride_ks,
                stride_or, stride_oh, Hkv * G, S, D, BLOCK_G, OWN_S, BLOCK_D,
            )  # fmt: skip
