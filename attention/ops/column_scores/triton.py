"""The Triton twin of `column_scores`: one pass over the keys for each query's log-sum-exp, one for the masses."""
# mypy: allow-untyped-calls

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from keysift.kvcache.ops.dispatch import UnsupportedCall
from keysift.kvcache.ops.triton import FLOATS, Config, Tile, channels, runs_here, shared_memory_of, stages_of

from . import ColumnScores
from .kernels import band_kernel, join_kernel, lse_kernel, mass_kernel

PIECE_TOKENS = 1024
HALVES_BYTES = 1 << 26
"""Bound of the scratch memory of the diagonal bands, unless the queries of one probe and key head need more."""


def column_scores(
    q: Tensor,
    k: Tensor,
    frames: Tensor,
    positions: Tensor,
    *,
    queries_per_probe: int,
    scale: float,
    bands: bool = False,
) -> ColumnScores:
    """See the reference; `UnsupportedCall` for unequal dtypes and for head dims that do not fit.

    The keys are cut into pieces of a fixed length and summed in their order: neither the other probes nor pages that
    no query sees change a bit of a probe's result.
    """
    if not _supports(q, k):
        raise UnsupportedCall
    call = _call(q, k, frames, positions.contiguous(), queries_per_probe, scale)
    with torch.cuda.device_of(q):
        lse = _lse(call)
        return _bands(call, lse) if bands else ColumnScores(*_masses(call, lse), None)


def config(shared_memory: int, head_dim: int, dtype: torch.dtype, queries: int, group: int, page_size: int) -> Config:
    """For probes of `queries` queries of each head of a group, on a device that grants a block `shared_memory` bytes.

    A tile's queries split into heads and tokens, and its keys into pages and slots; all are powers of two.
    """
    tile = _tile(shared_memory, head_dim, dtype, queries * triton.next_power_of_2(group))
    heads = min(triton.next_power_of_2(group), tile.queries)
    slots = min(triton.next_power_of_2(page_size), tile.keys)
    blocks = {"BLOCK_G": heads, "BLOCK_T": tile.queries // heads, "BLOCK_P": tile.keys // slots, "BLOCK_S": slots}
    return Config(blocks | {"BLOCK_D": channels(head_dim)}, tile.options)


def _tile(shared_memory: int, head_dim: int, dtype: torch.dtype, queries: int) -> Tile:
    """A table, as that of `paged_attention`; the keys of a tile are whole pages unless pages are larger."""
    wide, stages = head_dim > 128, stages_of(shared_memory)
    if dtype == torch.float32:  # exact products live in registers
        return Tile(16 if wide or queries <= 16 else 32, 16, 4, min(stages, 2))
    if queries <= 16:
        return Tile(16, 32 if wide else 64, 4, min(stages + 1, 3))
    return Tile(64, 32 if wide else 64, 4, stages)


class Call(NamedTuple):
    """Arguments that the kernels over keys share; `scale` is in base 2."""

    q: Tensor
    k: Tensor
    frames: Tensor
    positions: Tensor
    queries: int
    scale: float
    constants: dict[str, int]
    options: dict[str, int]

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.q.stride()[:2], *self.k.stride()[:3], *self.frames.stride())

    @property
    def units(self) -> int:
        """Probes by key heads."""
        return self.frames.shape[0] * self.frames.shape[1]

    @property
    def groups(self) -> int:
        """Programs that share the query heads of a key head."""
        return triton.cdiv(self.constants["G"], self.constants["BLOCK_G"])  # type: ignore[no-any-return]


def _supports(q: Tensor, k: Tensor) -> bool:
    return (
        runs_here(q)
        and q.dtype in FLOATS
        and q.dtype == k.dtype
        and q.shape[2] <= 256
        and q.stride(2) == k.stride(3) == 1
    )


def _call(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, queries: int, scale: float) -> Call:
    (_, heads, dim), (_, kv_heads, page_size, _) = q.shape, k.shape
    group = heads // kv_heads
    chosen = config(shared_memory_of(q.device), dim, q.dtype, queries, group, page_size)
    constants = {"Hq": heads, "G": group, "S": page_size, "D": dim} | chosen.constants
    return Call(q, k, frames, positions, queries, scale / math.log(2), constants, chosen.options)


def _lse(call: Call) -> Tensor:
    """[B * m, Hq], in base 2; -inf for an absent query."""
    tokens, heads = call.q.shape[:2]
    pieces = max(1, triton.cdiv(call.frames.shape[2] * call.k.shape[2], PIECE_TOKENS))
    out = call.q.new_empty(pieces, tokens, heads, dtype=torch.float32)
    tiles = call.units * call.groups * triton.cdiv(call.queries, call.constants["BLOCK_T"])
    lse_kernel[(tiles, pieces)](
        *(call.q, call.k, call.frames, call.positions, out, call.scale, tokens, call.queries),
        *call.strides,
        PIECE=PIECE_TOKENS,
        **call.constants,
        **call.options,
    )
    if pieces == 1:
        return out[0]
    lse = torch.empty_like(out[0])
    join_kernel[(triton.cdiv(lse.numel(), 64),)](out, lse, lse.numel(), pieces, BLOCK=64, BLOCK_P=16)
    return lse


def _masses(call: Call, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and peak, [B, Hq, F] each."""
    mass, peak = (lse.new_empty(call.frames.shape[0], lse.shape[1], call.frames.shape[2]) for _ in range(2))
    _weigh(call, lse, mass, peak, None, range(call.units))
    return mass, peak


def _bands(call: Call, lse: Tensor) -> ColumnScores:
    """All three results; as many probes and key heads at a time as the bound of the scratch memory allows."""
    (num_probes, num_kv_heads, max_pages), group = call.frames.shape, call.constants["G"]
    mass, peak, bands = (lse.new_empty(num_probes, lse.shape[1], max_pages) for _ in range(3))
    unit_bytes = call.queries * group * 2 * max_pages * lse.itemsize
    width = min(call.units, max(1, HALVES_BYTES // max(1, unit_bytes)))
    halves = lse.new_empty(width, call.queries, group, 2, max_pages)
    for first in range(0, call.units, max(1, width)):
        units = range(first, min(first + width, call.units))
        _weigh(call, lse, mass, peak, halves, units)
        band_kernel[(len(units) * group * triton.cdiv(max_pages, 64),)](
            *(halves, call.positions, bands, call.queries, max_pages, first),
            **{"Hkv": num_kv_heads, "G": group, "S": call.k.shape[2], "BLOCK_T": 16, "BLOCK_F": 64},
        )
    return ColumnScores(mass, peak, bands)


def _weigh(call: Call, lse: Tensor, mass: Tensor, peak: Tensor, halves: Tensor | None, units: range) -> None:
    """Write the masses of some units, and `halves` unless it is None."""
    max_pages = call.frames.shape[2]
    tiles = len(units) * call.groups * triton.cdiv(max_pages, call.constants["BLOCK_P"])
    mass_kernel[(tiles,)](
        *(call.q, call.k, call.frames, call.positions, lse, mass, peak, mass if halves is None else halves),
        *(call.scale, call.queries, max_pages, units.start, *call.strides),
        BANDS=halves is not None,
        **call.constants,
        **call.options,
    )
