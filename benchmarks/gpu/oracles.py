"""Float64 oracles for the ops of `correctness`, and their problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Selection
from keysift.kvcache.ops import use_backend
from keysift.kvcache.ops.encode import Codes, encode
from keysift.kvcache.ops.summarize import summarize

SIZE = 16
"""Tokens of a page."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Sequences in scattered frames with a query after each; slots without a token are NaN."""

    q: Tensor  # [B, Hq, D]
    k: Tensor  # [N, Hkv, S, D]
    v: Tensor
    frames: Tensor  # [B, Hkv, F] int32
    lengths: Tensor  # [B] int64
    keys: Tensor  # [B, Hkv, F * S, D] float64, contiguous; 0 after the end
    values: Tensor

    @classmethod
    def make(
        cls, shape: tuple[int, int, int], lengths: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Pages:
        heads, kv_heads, dim = shape
        batch, pages = len(lengths), -(-max(lengths) // SIZE)
        with torch.device(device):
            order = torch.randperm(batch * pages + 3)[: batch * pages].view(batch, pages)
            ends = torch.tensor(lengths)
            present = torch.arange(pages * SIZE) < ends[:, None]  # [B, F * S]
            channels = torch.randn(kv_heads, 1, dim)  # some channels are far from 0, as keys' are
            packed = [torch.randn(batch, kv_heads, pages * SIZE, dim) for _ in range(2)]
            rows = [x.to(dtype).masked_fill(~present[:, None, :, None], 0.0) for x in (packed[0] + channels, packed[1])]
            frames = [torch.full((batch * pages + 3, kv_heads, SIZE, dim), torch.nan, dtype=dtype) for _ in range(2)]
            for pool, row in zip(frames, rows, strict=True):
                hidden = row.masked_fill(~present[:, None, :, None], torch.nan)
                pool[order] = torch.unflatten(hidden, 2, (pages, SIZE)).transpose(1, 2)
            q = torch.randn(batch, heads, dim).to(dtype)
        table = order.int()[:, None].expand(-1, kv_heads, -1)
        return cls(q, frames[0], frames[1], table, ends, rows[0].double(), rows[1].double())

    @property
    def lasts(self) -> Tensor:
        """[B] int32, position of each query."""
        return (self.lengths - 1).int()

    @property
    def own(self) -> Tensor:
        """[B, Hkv] int32, frame of each query's own page."""
        last = (self.lasts.long() // SIZE)[:, None, None].expand(-1, self.frames.shape[1], 1)
        return self.frames.gather(2, last)[..., 0]

    @property
    def full(self) -> Tensor:
        """[n] int64, frames of all full pages."""
        here = torch.arange(self.frames.shape[2], device=self.q.device) < (self.lengths // SIZE)[:, None]
        return self.frames[:, 0][here].long()

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    def listed(self, lasts: Tensor, first: Tensor, heads: int) -> Tensor:
        """[R, H, P] int32: about half of the pages up to those of the row's last query, and all from its first."""
        pages = torch.arange(self.frames.shape[2], device=lasts.device)
        seen, own = pages <= (lasts // SIZE)[:, None], pages >= (first // SIZE)[:, None]
        drawn = torch.rand(len(lasts), heads, len(pages), device=lasts.device) < 0.5
        return Selection.from_mask((drawn | own[:, None]) & seen[:, None]).pages

    def described(self) -> tuple[Tensor, Codes]:
        """Summaries and codes of the full pages, by the references; NaN and the worst codes elsewhere."""
        count, kv_heads, _, dim = self.k.shape
        summaries = torch.full((count, kv_heads, 4, dim), torch.nan, dtype=self.k.dtype, device=self.k.device)
        codes = empty_codes(self.k)
        with use_backend("reference"):
            summarize(summaries, self.k, self.v, self.full)
            encode(self.k, summaries, self.full, codes)
        return summaries, codes


def empty_codes(k: Tensor) -> Codes:
    """For keys [N, Hkv, S, D], in 2 bits."""
    count, kv_heads, _, dim = k.shape
    levels = torch.full((count, kv_heads, -(-2 * dim // 32), SIZE), -1, dtype=torch.int32, device=k.device)
    bounds = torch.full((count, kv_heads, 2, dim), -128, dtype=torch.int8, device=k.device)
    return Codes(levels, bounds, torch.full((count, kv_heads, 2), torch.nan, device=k.device))


def attention(
    q: Tensor, pages: Pages, sequences: Sequence[int], chosen: Tensor, starts: Tensor, width: int, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq] of rows of `width` queries, each row of one of the sequences.

    With a window a query sees so many tokens, itself included.
    """
    outs, lses = [], []
    for row, sequence in enumerate(sequences):
        here = q[row * width : (row + 1) * width].double()
        where = int(starts[row]) + torch.arange(len(here), device=q.device)
        mask = Selection(chosen[row : row + 1]).mask(pages.frames.shape[2])[0]  # [H, F]
        scores = _scores(here, pages.keys[sequence]) * pages.scale  # [M, Hkv, G, J]
        ages = where[:, None] - torch.arange(scores.shape[3], device=q.device)
        hidden = (ages < 0) | (ages >= (window or ages.shape[1]))
        lists = mask.repeat_interleave(here.shape[1] // len(mask), 0).repeat_interleave(SIZE, 1)  # [Hq, J]
        seen = torch.unflatten(lists, 0, scores.shape[1:3])[None] & ~hidden[:, None, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        lses.append(scores.logsumexp(-1).flatten(1))
        outs.append(torch.einsum("mkgj,kjd->mkgd", scores.softmax(-1), pages.values[sequence]).flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """q [M, Hq, D] over keys [Hkv, J, D] -> [M, Hkv, G, J]"""
    return torch.einsum("mkgd,kjd->mkgj", torch.unflatten(q.double(), 1, (len(keys), -1)), keys)


def columns(q: Tensor, pages: Pages, positions: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, peak and bands [B, Hq, F] of `count` queries of each sequence; -1 as a position: there is none."""
    found = []
    for sequence in range(len(pages.lengths)):
        here, where = (x[sequence * count : (sequence + 1) * count] for x in (q, positions.long()))
        token = torch.arange(pages.keys.shape[2], device=q.device)
        scores = (_scores(here, pages.keys[sequence]) * pages.scale).flatten(1, 2)
        weights = scores.masked_fill((token > where[:, None])[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        by_page = torch.unflatten(weights, -1, (-1, SIZE)).sum(-1)  # [m, Hq, F]
        band = ((where[:, None] - token).clamp(min=0) // SIZE)[:, None].expand(weights.shape)
        bands = torch.zeros_like(by_page).scatter_add_(-1, band, weights)
        queries = max(int((where >= 0).sum()), 1)
        found.append((by_page.sum(0) / queries, by_page.amax(0), bands.sum(0) / queries))
    mass, peak, bands = (torch.stack(parts) for parts in zip(*found, strict=True))
    return mass, peak, bands


def exact_masses(pages: Pages, keys: Tensor | None = None) -> Tensor:
    """[B, Hq, F], log masses of the tokens that each query sees; by other keys than its own where they are given."""
    keys = pages.keys if keys is None else keys
    scores = torch.stack([_scores(q[None], k)[0].flatten(0, 1) for q, k in zip(pages.q, keys, strict=True)])
    hidden = torch.arange(scores.shape[2], device=scores.device) > pages.lasts[:, None]
    scores = (scores * pages.scale).masked_fill(hidden[:, None], -torch.inf)
    return torch.unflatten(scores, -1, (-1, SIZE)).logsumexp(-1)


def code_scores(pages: Pages, codes: Codes) -> Tensor:
    """[B, Hq, F], log masses by the codes of full pages; a query's own page is exact."""
    shifts = torch.arange(0, 32, codes.bits, device=codes.levels.device)
    levels = (codes.levels.transpose(-1, -2)[..., None] >> shifts) & (2**codes.bits - 1)  # [N, Hkv, S, W, n]
    middle, half = (codes.bounds.double() * codes.scales.double()[..., None]).unsqueeze(-2).unbind(-3)
    width = half * (2.0 / 2**codes.bits)
    stand_ins = middle - half + (levels.flatten(-2)[..., : codes.bounds.shape[-1]] + 0.5) * width
    keys = stand_ins[pages.frames[:, 0].long()].transpose(1, 2).flatten(2, 3)  # [B, Hkv, F * S, D]
    ended = torch.arange(keys.shape[2], device=keys.device) >= (pages.lasts // SIZE * SIZE)[:, None]
    return exact_masses(pages, torch.where(ended[:, None, :, None], pages.keys, keys))


def bounds(pages: Pages, summaries: Tensor) -> Tensor:
    """[B, Hq, F], the most that each full page's log mass can be; a query's own page is exact."""
    here = summaries[pages.frames[:, 0].long()].double().transpose(1, 2)  # [B, Hkv, F, 4, D]
    q = torch.unflatten(pages.q.double(), 1, (here.shape[1], -1))
    best = [torch.einsum("bkgd,bkfd->bkgf", part, here[..., which, :]) for part, which in _halves(q)]
    most = (best[0] + best[1]).flatten(1, 2) * pages.scale + math.log(SIZE)
    last = (pages.lasts // SIZE)[:, None, None]
    page = torch.arange(most.shape[2], device=most.device)
    return torch.where(page < last, most, exact_masses(pages))


def _halves(q: Tensor) -> list[tuple[Tensor, int]]:
    """Positive and negative parts, and which summary each is largest with."""
    return [(q.clamp(min=0), 2), (q.clamp(max=0), 1)]


def summary(pages: Pages) -> Tensor:
    """[n, Hkv, 4, D] of the full frames."""
    keys, values = pages.k[pages.full].double(), pages.v[pages.full].double()
    return torch.stack([keys.mean(2), keys.amin(2), keys.amax(2), values.mean(2)], 2)
