"""The Triton twins of `page_masses`, `code_masses` and `page_bounds`."""
# mypy: allow-untyped-calls

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dispatch import UnsupportedCall
from ..encode import Codes
from ..heaviest.triton import fits, heaviest
from ..triton import FLOATS, NO_SPILLS, Config, channels, runs_here
from .code_kernels import centres_kernel, codes_kernel
from .kernels import bounds_kernel, masses_kernel

AMD = torch.version.hip is not None
BLOCK_G = 16
"""Query heads of a program, as a matrix unit multiplies at once, present or not."""
WIDEST = 128
"""Most fp32 channels of kernels with several products: exact ones miss NVIDIA's tensor cores and live in registers."""


def page_masses(q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, *, scale: float) -> Tensor:
    """See the reference; `UnsupportedCall` for unequal dtypes and for head dims that do not fit."""
    call = Call(q, k, frames, positions, scale)
    if not call.supported():
        raise UnsupportedCall
    masses, max_pages = call.empty(), frames.shape[2]
    chosen = masses_config(q.shape[2], k.shape[2], q.dtype)
    if masses.numel():
        with torch.cuda.device_of(q):
            masses_kernel[call.grid(max_pages, chosen)](
                *(q, k, frames, positions, masses, scale, max_pages, *call.strides, *frames.stride()),
                **call.shape,
                **chosen.all,
            )
    return masses


def code_masses(
    q: Tensor,
    k: Tensor,
    own: Tensor,
    codes: Codes,
    frames: Tensor,
    positions: Tensor,
    *,
    scale: float,
    candidates: int,
    slack: float = 0.35,
) -> Tensor:
    """See the reference; `UnsupportedCall` as `page_masses`, and for fp32 head dims above 128.

    Three launches: the bounds of all pages, the candidates, their codes; six beyond 8,192 pages, and one if every page
    is a candidate. If there are too many candidates for a program, torch sorts the pages, without waiting for the
    device either.
    """
    call, max_pages = Call(q, k, frames, positions, scale), frames.shape[2]
    everything, in_rows = candidates >= max_pages, all(part.stride(-1) == 1 for part in codes)
    if not (call.supported(WIDEST) and in_rows):
        raise UnsupportedCall
    masses = call.empty()
    if masses.numel():
        with torch.cuda.device_of(q):
            if everything:
                _scan(call, own, codes, None, masses)
            else:
                promises = _centres(call, own, codes, slack, masses)
                _scan(call, own, codes, _candidates(promises, k.shape[1], candidates), masses)
    return masses


def page_bounds(
    q: Tensor, k: Tensor, own: Tensor, summaries: Tensor, frames: Tensor, positions: Tensor, *, scale: float
) -> Tensor:
    """See the reference; `UnsupportedCall` as `code_masses`."""
    call, max_pages = Call(q, k, frames, positions, scale), frames.shape[2]
    if not call.supported(WIDEST) or summaries.dtype != q.dtype or summaries.stride(3) != 1:
        raise UnsupportedCall
    masses = call.empty()
    chosen = bounds_config(q.shape[2], k.shape[2], q.dtype)
    if masses.numel():
        with torch.cuda.device_of(q):
            bounds_kernel[call.grid(max_pages, chosen)](
                *(q, k, own, summaries, frames, positions, masses, scale, max_pages),
                *(*call.strides, *summaries.stride()[:3], *frames.stride(), *own.stride()),
                LOG_S=math.log(k.shape[2]),
                **call.shape,
                **chosen.all,
            )
    return masses


def masses_config(dim: int, page_size: int, dtype: torch.dtype) -> Config:
    """For exact masses of pages."""
    return Config(_blocks(dim, page_size, dtype), {"num_warps": 8})


def codes_config(dim: int, page_size: int, dtype: torch.dtype, amd: bool = AMD) -> Config:
    """For masses of pages by their codes; OWN_S slots of the row's own page are read at once."""
    blocks = _blocks(dim, page_size, dtype)
    options = _warps(dtype, amd) | (NO_SPILLS if dim > 128 and not amd else {})
    return Config(blocks | {"OWN_S": max(16, blocks["BLOCK_S"])}, options)


def bounds_config(dim: int, page_size: int, dtype: torch.dtype, amd: bool = AMD) -> Config:
    """For kernels with two vectors of each page; only of the row's own page they read every slot."""
    blocks = _blocks(dim, 1, dtype)
    del blocks["BLOCK_S"]
    own = max(16, _blocks(dim, page_size, dtype)["BLOCK_S"])
    return Config(blocks | {"BLOCK_P": min(32, blocks["BLOCK_P"]), "OWN_S": own}, _warps(dtype, amd))


def _blocks(dim: int, page_size: int, dtype: torch.dtype) -> dict[str, int]:
    """A program's pages and slots: as many vectors as fit every kind of GPU besides the queries.

    `tests/compile_kernels.py` holds that.
    """
    vectors = 16 if dtype == torch.float32 or dim > 128 else 64
    slots = min(triton.next_power_of_2(page_size), vectors)
    return {"BLOCK_G": BLOCK_G, "BLOCK_D": channels(dim), "BLOCK_P": vectors // slots, "BLOCK_S": slots}


def _warps(dtype: torch.dtype, amd: bool) -> dict[str, int]:
    """Warps of a program; those of AMD have 64 threads."""
    return {"num_warps": 8 if dtype == torch.float32 and not amd else 4}


class Call(NamedTuple):
    """Arguments that all three share."""

    q: Tensor
    k: Tensor
    frames: Tensor
    positions: Tensor
    scale: float

    def supported(self, widest: int = 256) -> bool:
        q, k = self.q, self.k
        return (
            runs_here(q)
            and q.dtype in FLOATS
            and q.dtype == k.dtype
            and q.shape[2] <= (widest if q.dtype == torch.float32 else 256)
            and q.stride(2) == k.stride(3) == self.positions.stride(0) == 1
        )

    @property
    def shape(self) -> dict[str, int]:
        """The constants that all kernels share."""
        (_, heads, dim), (_, kv_heads, page_size, _) = self.q.shape, self.k.shape
        return {"Hkv": kv_heads, "G": heads // kv_heads, "S": page_size, "D": dim}

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.q.stride()[:2], *self.k.stride()[:3])

    def empty(self) -> Tensor:
        """[R, Hq, F]"""
        return self.q.new_empty(*self.q.shape[:2], self.frames.shape[2], dtype=torch.float32)

    def grid(self, pages: int, chosen: Config) -> tuple[int]:
        """Programs for the query heads of every row and KV head over so many pages."""
        groups = triton.cdiv(self.q.shape[1] // self.k.shape[1], chosen.constants["BLOCK_G"])
        tiles = triton.cdiv(pages, chosen.constants["BLOCK_P"])
        return (self.frames.shape[0] * self.frames.shape[1] * groups * tiles,)


def _candidates(promises: Tensor, lists: int, count: int) -> Tensor:
    """[R, Hkv, P] int32, the heaviest pages by promises [R, Hq, F], -1 pads the end."""
    max_pages = promises.shape[2]
    if fits(max_pages, count):
        return heaviest(promises, None, lists=lists, width=count, budget=count)[0]
    shares = torch.unflatten(promises.softmax(-1).nan_to_num(0.0), 1, (lists, -1)).sum(2)  # [R, Hkv, F]
    found = torch.unflatten(promises > -torch.inf, 1, (lists, -1)).any(2)
    best = shares.masked_fill(~found, -1.0).sort(dim=-1, descending=True, stable=True)
    pages = best.indices[..., :count].masked_fill(best.values[..., :count] < 0, max_pages).sort(-1).values
    return pages.masked_fill(pages == max_pages, -1).int()


def _centres(call: Call, own: Tensor, codes: Codes, slack: float, masses: Tensor) -> Tensor:
    """Write the masses of all pages but those of candidates; return the scores that rank them, [R, Hq, F]."""
    (_, _, page_size, dim), max_pages = call.k.shape, call.frames.shape[2]
    promises = torch.empty_like(masses)
    chosen = bounds_config(dim, page_size, call.q.dtype)
    centres_kernel[call.grid(max_pages, chosen)](
        *(call.q, call.k, own, codes.bounds, codes.scales, call.frames, call.positions, masses, promises),
        *(call.scale, slack, max_pages, *call.strides),
        *(*codes.bounds.stride()[:3], *codes.scales.stride()[:2], *call.frames.stride(), *own.stride()),
        LOG_S=math.log(page_size),
        **call.shape,
        **chosen.all,
    )
    return promises


def _scan(call: Call, own: Tensor, codes: Codes, pages: Tensor | None, masses: Tensor) -> None:
    """Write the masses by codes of the pages [R, Hkv, P]; None: of all, and that of the row's own page."""
    (_, _, page_size, dim), max_pages = call.k.shape, call.frames.shape[2]
    width = max_pages if pages is None else pages.shape[2]
    chosen = codes_config(dim, page_size, call.q.dtype)
    if not width:
        return
    codes_kernel[call.grid(width, chosen)](
        *(call.q, call.k, own, *codes, call.frames, call.positions, call.frames if pages is None else pages, masses),
        *(call.scale, max_pages, width, *call.strides, *codes.levels.stride()[:3]),
        *(*codes.bounds.stride()[:3], *codes.scales.stride()[:2], *call.frames.stride(), *own.stride()),
        W=codes.levels.shape[2],
        BITS=codes.bits,
        LISTED=pages is not None,
        **call.shape,
        **chosen.all,
    )
