"""The CUDA twin of `column_scores`: one pass over the keys for each query's log-sum-exp, one for the masses."""
# mypy: allow-untyped-calls

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from keysift.kvcache.ops.triton import INTERPRETED, Tile, shared_memory_of

from . import ColumnScores
from .kernels import band_kernel, join_kernel, lse_kernel, mass_kernel

PIECE_TOKENS = 1024
HALVES_BYTES = 1 << 26
"""Bound of the scratch that the diagonal bands take, unless the queries of one probe and key head need more."""


def config(shared_memory: int, head_dim: int, dtype: torch.dtype, queries: int) -> Tile:
    """The tile for `queries` packed queries a probe on a device that grants a block `shared_memory` bytes.

    A table, as that of `paged_attention`; the keys of a tile are whole pages where pages are not larger.
    """
    wide = head_dim > 128
    stages = 3 if shared_memory > 200_000 else 2 if shared_memory > 65_536 else 1
    if dtype == torch.float32:  # exact products live in registers
        return Tile(16, 16, 4, 1) if wide else Tile(16 if queries <= 16 else 32, 16, 4, min(stages, 2))
    if queries <= 16:
        return Tile(16, 32 if wide else 64, 4, min(stages + 1, 3))
    return Tile(64, 32 if wide else 64, 4, stages)


def blocks(tile: Tile, group: int, page_size: int, head_dim: int) -> dict[str, int]:
    """How a tile's queries split into heads and tokens, and its keys into pages and slots; all powers of two."""
    heads = min(triton.next_power_of_2(group), tile.queries)
    slots = min(triton.next_power_of_2(page_size), tile.keys)
    return {
        "BLOCK_G": heads,
        "BLOCK_T": tile.queries // heads,
        "BLOCK_P": tile.keys // slots,
        "BLOCK_S": slots,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }


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
    """The twin of the reference of the same name, which documents it.

    The keys are cut into pieces of a fixed length and summed in their order: neither the other probes nor pages that
    nobody sees change a bit of a probe's result.
    """
    if not _supported(q, k):
        return NotImplemented  # type: ignore[no-any-return]
    positions = positions.contiguous()
    constants, options = _constants(q, k, queries_per_probe)
    call = Call(q, k, frames, positions, queries_per_probe, scale / math.log(2), constants, options)
    with torch.cuda.device_of(q):
        lse = _lse(call)
        return _bands(call, lse) if bands else ColumnScores(*_masses(call, lse), None)


class Call(NamedTuple):
    """What the kernels over keys share; `scale` is in base 2."""

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


def _supported(q: Tensor, k: Tensor) -> bool:
    return (
        (q.is_cuda or INTERPRETED)
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and q.dtype == k.dtype
        and q.shape[2] <= 256
        and q.stride(2) == k.stride(3) == 1
    )


def _constants(q: Tensor, k: Tensor, queries_per_probe: int) -> tuple[dict[str, int], dict[str, int]]:
    """The constants that the kernels over keys share, and how they are built."""
    (_, heads, dim), (_, kv_heads, page_size, _) = q.shape, k.shape
    group = heads // kv_heads
    tile = config(shared_memory_of(q.device), dim, q.dtype, queries_per_probe * triton.next_power_of_2(group))
    constants = {"Hq": heads, "G": group, "S": page_size, "D": dim} | blocks(tile, group, page_size, dim)
    return constants, {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _lse(call: Call) -> Tensor:
    """[B * m, Hq], in base 2; -inf for a query that is not there."""
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
    """All three; as many probes and key heads at a time as the bound of the scratch allows."""
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
    """The masses of some units; `halves` is written where there is one."""
    max_pages = call.frames.shape[2]
    tiles = len(units) * call.groups * triton.cdiv(max_pages, call.constants["BLOCK_P"])
    mass_kernel[(tiles,)](
        *(call.q, call.k, call.frames, call.positions, lse, mass, peak, mass if halves is None else halves),
        *(call.scale, call.queries, max_pages, units.start, *call.strides),
        BANDS=halves is not None,
        **call.constants,
        **call.options,
    )
