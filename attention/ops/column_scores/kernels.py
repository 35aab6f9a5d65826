"""Triton kernels of `column_scores`, launched by `triton`."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_queries(
    q, positions, i_b, i_t, i_kv, i_g, M, stride_qt, stride_qh, G: tl.constexpr, D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_T queries of probe i_b by BLOCK_G heads of a group, heads outermost: the packed rows of a tile.

    Their numbers in the call, heads, positions (-1: not there), and values [BLOCK_G * BLOCK_T, BLOCK_D].
    """
    o_m = tl.arange(0, BLOCK_G * BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    o_t = i_t + o_m % BLOCK_T
    o_g = i_g * BLOCK_G + o_m // BLOCK_T
    m_m = (o_t < M) & (o_g < G)
    o_q = i_b * M + o_t
    o_h = i_kv * G + o_g
    b_position = tl.load(positions + o_q, mask=m_m, other=-1)
    p_q = q + o_q[:, None] * stride_qt + o_h[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=(b_position >= 0)[:, None] & (o_d < D)[None, :], other=0.0)
    return o_q, o_h, b_position, b_q


@triton.jit
def presence(positions, M):
    """The last position among a probe's M, and how many queries are there."""
    last = -1
    count = 0
    for i_t in range(0, M, 128):
        o_t = i_t + tl.arange(0, 128)
        b_position = tl.load(positions + o_t, mask=o_t < M, other=-1)
        last = tl.maximum(last, tl.max(b_position, 0))
        count += tl.sum((b_position >= 0).to(tl.int32), 0)
    return last, count


@triton.jit
def scores(
    b_q, b_position, p_k, p_frames, b_page, b_slot, m_n, scale, stride_kn, stride_ks, stride_fp,
    S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile's queries against these slots of these pages, in base 2; -inf where a query must not see."""
    o_d = tl.arange(0, BLOCK_D)
    b_frame = tl.load(p_frames + b_page * stride_fp, mask=m_n, other=0).to(tl.int64)  # [BLOCK_N]
    p_k = p_k + b_frame * stride_kn + b_slot * stride_ks
    b_k = tl.load(p_k[None, :] + o_d[:, None], mask=m_n[None, :] & (o_d < D)[:, None], other=0.0)  # [BLOCK_D, BLOCK_N]
    b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
    m_s = m_n[None, :] & ((b_page * S + b_slot)[None, :] <= b_position[:, None])
    return tl.where(m_s, b_s, float("-inf"))


@triton.jit(do_not_specialize=["T", "M"])
def lse_kernel(
    q, k, frames, positions, pieces, scale, T, M,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_ks, stride_fb, stride_fh, stride_fp,
    Hq: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The base 2 log-sum-exp of a tile's queries over PIECE keys; -inf where a query sees none of them."""
    BLOCK_N: tl.constexpr = BLOCK_P * BLOCK_S
    GROUPS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    BLOCKS = tl.cdiv(M, BLOCK_T)
    i_t = tl.program_id(0) % BLOCKS * BLOCK_T
    i_g = tl.program_id(0) // BLOCKS % GROUPS
    i_u = (tl.program_id(0) // (BLOCKS * GROUPS)).to(tl.int64)
    i_b, i_kv = i_u // (Hq // G), i_u % (Hq // G)
    o_q, o_h, b_position, b_q = load_queries(
        q, positions, i_b, i_t, i_kv, i_g, M, stride_qt, stride_qh, G, D, BLOCK_G, BLOCK_T, BLOCK_D
    )
    p_k = k + i_kv * stride_kh
    p_frames = frames + i_b * stride_fb + i_kv * stride_fh

    b_top = tl.full([BLOCK_G * BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_G * BLOCK_T], tl.float32)
    start = tl.program_id(1) * PIECE
    end = tl.minimum(start + PIECE, tl.max(b_position, 0) + 1)
    for i_n in range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        b_s = scores(
            b_q, b_position, p_k, p_frames, o_n // S, o_n % S, m_n, scale,
            stride_kn, stride_ks, stride_fp, S, D, BLOCK_D,
        )  # fmt: skip
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_top - b_base) + tl.sum(tl.exp2(b_s - b_base[:, None]), 1)
        b_top = b_new
    b_lse = b_top + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum))
    o_lse = (tl.program_id(1).to(tl.int64) * T + o_q) * Hq + o_h
    tl.store(pieces + o_lse, b_lse, mask=(o_q < (i_b + 1) * M) & (o_h < (i_kv + 1) * G))


@triton.jit(do_not_specialize=["N", "PIECES"])
def join_kernel(pieces, lse, N, PIECES, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """The log-sum-exp of N queries over all pieces [PIECES, N]; a piece that a query does not see changes no bit."""
    o_n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_n = o_n < N
    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_p in range(0, PIECES, BLOCK_P):
        o_p = (i_p + tl.arange(0, BLOCK_P)).to(tl.int64)
        m_pn = (o_p < PIECES)[:, None] & m_n[None, :]
        b_lse = tl.load(pieces + o_p[:, None] * N + o_n[None, :], mask=m_pn, other=float("-inf"))  # [BLOCK_P, BLOCK]
        b_new = tl.maximum(b_top, tl.max(b_lse, 0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_top - b_base) + tl.sum(tl.exp2(b_lse - b_base[None, :]), 0)
        b_top = b_new
    tl.store(lse + o_n, b_top + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)), mask=m_n)


@triton.jit(do_not_specialize=["M", "F", "FIRST"])
def mass_kernel(
    q, k, frames, positions, lse, mass, peak, halves, scale, M, F, FIRST,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_ks, stride_fb, stride_fh, stride_fp,
    Hq: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BANDS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pages under all queries of one probe and BLOCK_G heads of one group; the first probe and group is FIRST.

    With BANDS, each query's page sums too, in two halves [*, M, G, 2, F]: up to the slot where the query stands in its
    own page, and past it. All keys of a half lie in the same diagonal band of the query.
    """
    BLOCK_M: tl.constexpr = BLOCK_G * BLOCK_T
    GROUPS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    BLOCKS = tl.cdiv(F, BLOCK_P)
    i_p = tl.program_id(0) % BLOCKS * BLOCK_P
    i_g = tl.program_id(0) // BLOCKS % GROUPS
    i_u = (tl.program_id(0) // (BLOCKS * GROUPS)).to(tl.int64)
    i_b, i_kv = (FIRST + i_u) // (Hq // G), (FIRST + i_u) % (Hq // G)
    last, count = presence(positions + i_b * M, M)
    p_k = k + i_kv * stride_kh
    p_frames = frames + i_b * stride_fb + i_kv * stride_fh
    o_p = i_p + tl.arange(0, BLOCK_P)
    m_p = o_p < F
    o_n = tl.arange(0, BLOCK_P * BLOCK_S)

    b_mass = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
    b_peak = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
    for i_t in range(0, tl.where(i_p * S <= last, M, 0), BLOCK_T):
        o_q, o_h, b_position, b_q = load_queries(
            q, positions, i_b, i_t, i_kv, i_g, M, stride_qt, stride_qh, G, D, BLOCK_G, BLOCK_T, BLOCK_D
        )
        m_m = b_position >= 0
        b_lse = tl.load(lse + o_q * Hq + o_h, mask=m_m, other=0.0)
        b_pages = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
        b_near = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
        b_far = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
        for i_s in range(0, S, BLOCK_S):
            b_page = i_p + o_n // BLOCK_S
            b_slot = i_s + o_n % BLOCK_S
            m_n = (b_slot < S) & (b_page * S + b_slot <= last)
            b_s = scores(
                b_q, b_position, p_k, p_frames, b_page, b_slot, m_n, scale,
                stride_kn, stride_ks, stride_fp, S, D, BLOCK_D,
            )  # fmt: skip
            b_w = tl.exp2(b_s - b_lse[:, None])  # [BLOCK_M, BLOCK_N]
            b_pages += tl.sum(tl.reshape(b_w, [BLOCK_M, BLOCK_P, BLOCK_S]), 2)
            if BANDS:
                m_near = b_slot[None, :] <= (b_position % S)[:, None]
                b_near += tl.sum(tl.reshape(tl.where(m_near, b_w, 0.0), [BLOCK_M, BLOCK_P, BLOCK_S]), 2)
                b_far += tl.sum(tl.reshape(tl.where(m_near, 0.0, b_w), [BLOCK_M, BLOCK_P, BLOCK_S]), 2)
        b_each = tl.reshape(b_pages, [BLOCK_G, BLOCK_T, BLOCK_P])
        b_mass += tl.sum(b_each, 1)
        b_peak = tl.maximum(b_peak, tl.max(b_each, 1))
        if BANDS:
            o_row = (i_u * M + o_q - i_b * M) * G + o_h - i_kv * G
            p_halves = halves + o_row[:, None] * (2 * F) + o_p[None, :]
            tl.store(p_halves, b_near, mask=m_m[:, None] & m_p[None, :])
            tl.store(p_halves + F, b_far, mask=m_m[:, None] & m_p[None, :])

    o_g = i_g * BLOCK_G + tl.arange(0, BLOCK_G)
    o_out = (i_b * Hq + i_kv * G + o_g)[:, None] * F + o_p[None, :]
    m_out = (o_g < G)[:, None] & m_p[None, :]
    tl.store(mass + o_out, b_mass / tl.maximum(count, 1), mask=m_out)
    tl.store(peak + o_out, tl.where(b_mass == b_mass, b_peak, b_mass), mask=m_out)  # a maximum drops NaN


@triton.jit(do_not_specialize=["M", "F", "FIRST"])
def band_kernel(
    halves, positions, bands, M, F, FIRST,
    Hkv: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """BLOCK_F diagonal bands of one probe and head: the halves [*, M, G, 2, F] that each query has there, summed."""
    BLOCKS = tl.cdiv(F, BLOCK_F)
    o_f = tl.program_id(0) % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    i_g = tl.program_id(0) // BLOCKS % G
    i_u = (tl.program_id(0) // (BLOCKS * G)).to(tl.int64)
    i_b, i_kv = (FIRST + i_u) // Hkv, (FIRST + i_u) % Hkv
    _, count = presence(positions + i_b * M, M)
    b_sum = tl.zeros([BLOCK_F], tl.float32)
    for i_t in range(0, M, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        b_position = tl.load(positions + i_b * M + o_t, mask=o_t < M, other=-1)
        b_page = (b_position // S)[:, None] - o_f[None, :]  # of the near half; the far one is in the page before
        m_page = (b_position >= 0)[:, None] & (o_f < F)[None, :]
        p_halves = halves + ((i_u * M + o_t) * G + i_g)[:, None] * (2 * F) + b_page
        b_near = tl.load(p_halves, mask=m_page & (b_page >= 0), other=0.0)  # [BLOCK_T, BLOCK_F]
        b_far = tl.load(p_halves + (F - 1), mask=m_page & (b_page >= 1), other=0.0)
        b_sum += tl.sum(b_near + b_far, 0)
    tl.store(bands + (i_b * Hkv * G + i_kv * G + i_g) * F + o_f, b_sum / tl.maximum(count, 1), mask=o_f < F)
