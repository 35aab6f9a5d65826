"""Codes of pages that have just become full: their keys in a few bits per channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import op


class Codes(NamedTuple):
    """Keys of full pages, quantised between the bounds of their own page; a scan reads nothing else.

    Channel d of a page spans ``middle ± half``: its bounds times their scales. It is cut into ``2**bits`` cells of
    equal width; a key is the number of the cell that it lies in, and stands for that cell's middle. Bounds that follow
    the page keep cells small: 2 bits lose as little as 4 bits do over the range of the whole sequence.
    """

    levels: Tensor
    """[N, Hkv, W, S] int32: word w of a token holds channels ``w * n ... (w + 1) * n - 1``, n = 32 / bits, the first
    channel lowest; unused bits of the last word are 0."""
    bounds: Tensor
    """[N, Hkv, 2, D] int8: middle and half width of each channel."""
    scales: Tensor
    """[N, Hkv, 2] fp32, units of the bounds."""

    @property
    def bits(self) -> int:
        """Bits of a level: 4 if the words hold so many, else 2."""
        return 4 if 32 * self.levels.shape[-2] >= 4 * self.bounds.shape[-1] else 2


@op(native="keysift.kvcache.ops.encode.native:encode", triton="keysift.kvcache.ops.encode.triton:encode")
def encode(cache_k: Tensor, summaries: Tensor, frames: Tensor, codes: Codes) -> None:
    """Write the codes of the listed frames, in place.

    Bounds are rounded to the nearest multiple of their scale, half to even; keys beyond them take the outermost cell.

    Args:
        cache_k: [N, Hkv, S, D]
        summaries: [N, Hkv, 4, D], of which least and greatest key of these frames are written already.
        frames: [F] int64, full frames.
    """
    least, greatest = summaries[frames, :, 1].float(), summaries[frames, :, 2].float()  # [F, Hkv, D]
    bounds = torch.stack([(least + greatest) / 2, (greatest - least) / 2], dim=2)
    scales = bounds.abs().amax(-1) / 127  # [F, Hkv, 2]
    multiples = (bounds / scales.clamp(min=1e-30)[..., None]).round_().to(torch.int8)
    low, width = cells(multiples, scales, codes.bits)
    levels = ((cache_k[frames].float() - low) / width.clamp(min=1e-30)).floor_().clamp_(0, 2**codes.bits - 1)
    shifts = torch.arange(0, 32, codes.bits, device=levels.device)
    levels = torch.nn.functional.pad(levels, (0, codes.levels.shape[2] * len(shifts) - levels.shape[-1]))
    words = (torch.unflatten(levels.to(torch.int64), -1, (-1, len(shifts))) << shifts).sum(-1)  # [F, Hkv, S, W]
    codes.levels[frames] = words.transpose(2, 3).to(torch.int32)  # the highest bit becomes the sign
    codes.bounds[frames], codes.scales[frames] = multiples, scales


def decode(codes: Codes) -> Tensor:
    """The keys [*, Hkv, S, D] fp32 that codes [*, Hkv, ...] stand for."""
    shifts = torch.arange(0, 32, codes.bits, device=codes.levels.device)
    levels = (codes.levels.transpose(-1, -2)[..., None] >> shifts) & (2**codes.bits - 1)  # [*, Hkv, S, W, n]
    low, width = cells(codes.bounds, codes.scales, codes.bits)
    keys: Tensor = low + (levels.flatten(-2)[..., : codes.bounds.shape[-1]] + 0.5) * width
    return keys


def cells(bounds: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Lower end of the first cell and width of all, [..., 1, D] fp32 each, for bounds [..., 2, D]."""
    middle, half = (bounds.float() * scales[..., None]).unsqueeze(-2).unbind(-3)
    return middle - half, half * (2.0 / 2**bits)
