"""Queries, keys and values whose attention looks like that of trained heads: random ones have no structure to find.

Every head has a background of topics, log-normal over the keys, and on top of it what its kind of head looks at: the
first tokens, the neighbourhood, tokens at fixed distances (diagonals), a few heavy tokens (columns), the piece of text
that its queries search (needles). Heights are set so that a query halfway through the prompt spends the stated shares
of its attention on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 16
"""Tokens over which the neighbourhood and a diagonal fade."""
TOPIC = 256
"""Tokens that share a topic."""
NEEDLES, NEEDLE = 8, 32
"""Searched pieces of text, and tokens of each."""
SPREAD = 2.0
"""Standard deviation of the background's scores."""
KEY_NORM = 4.0


@dataclass(frozen=True, slots=True)
class Kind:
    """Shares of a query's attention; the rest is background."""

    sink: float
    local: float
    diagonals: float = 0.0
    columns: float = 0.0
    needles: float = 0.0

    @property
    def background(self) -> float:
        return 1.0 - self.sink - self.local - self.diagonals - self.columns - self.needles


STREAMING = Kind(sink=0.62, local=0.34, columns=0.02)
SLASHED = Kind(sink=0.42, local=0.23, diagonals=0.15, columns=0.16)
SEARCHING = Kind(sink=0.47, local=0.18, columns=0.08, needles=0.23)
DIFFUSE = Kind(sink=0.35, local=0.20, columns=0.15)
MIX = (STREAMING, STREAMING, SLASHED, SEARCHING, SLASHED, STREAMING, SEARCHING, DIFFUSE)


@dataclass(frozen=True, slots=True)
class Features:
    """Blocks of channels that scores are sums over."""

    position: Tensor  # [T, 2 W], inner products fall off with distance
    frequencies: Tensor  # [W]
    sink: Tensor  # [T, 1]
    column: Tensor  # [T, 1]
    code: Tensor  # [T, C]
    codes: Tensor  # [NEEDLES, C]
    topic: Tensor  # [T, rest]


def structured(tokens: int, heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q [T, Hq, D], k and v [T, Hkv, D] in `dtype`, from torch's own random numbers."""
    q, k = torch.empty(tokens, heads, dim, dtype=dtype), torch.empty(tokens, num_kv_heads, dim, dtype=dtype)
    group = heads // num_kv_heads
    for kv_head in range(num_kv_heads):
        features = _features(tokens, dim)
        k[:, kv_head] = (_key(features) * KEY_NORM).to(dtype)
        for head in range(kv_head * group, (kv_head + 1) * group):
            q[:, head] = (_query(features, MIX[head % len(MIX)]) * math.sqrt(dim) / KEY_NORM).to(dtype)
    return q, k, torch.randn(tokens, num_kv_heads, dim).to(dtype)


def _features(tokens: int, dim: int) -> Features:
    waves, code = 3 * dim // 8, dim // 8
    frequencies = torch.randn(waves).double() / WIDTH
    sink, column, codes = torch.zeros(tokens, 1), torch.zeros(tokens, 1), torch.zeros(tokens, code)
    sink[:4, 0] = torch.tensor([1.0, 0.6, 0.6, 0.6])
    column[4 + torch.randint(tokens - 4, (_columns(tokens),))] = 1.0
    needles = torch.nn.functional.normalize(torch.randn(NEEDLES, code), dim=-1)
    for start, needle in zip(torch.randint(4, int(0.7 * tokens), (NEEDLES,)).tolist(), needles, strict=True):
        codes[start : start + NEEDLE] = needle
    rest = dim - 2 * waves - 2 - code
    shared = torch.randn(-(-tokens // TOPIC), rest).repeat_interleave(TOPIC, 0)[:tokens]
    topic = (0.87 * shared + 0.5 * torch.randn(tokens, rest)) / math.sqrt(rest)
    topic[:4] = 0.0
    return Features(_waves(tokens, frequencies, 0), frequencies, sink, column, codes, needles, topic)


def _waves(tokens: int, frequencies: Tensor, back: int) -> Tensor:
    """[T, 2 W]: random Fourier features of each position less `back`."""
    angles = (torch.arange(tokens, dtype=torch.float64)[:, None] - back) * frequencies.abs()
    return (torch.cat([angles.cos(), angles.sin()], -1) / math.sqrt(len(frequencies))).float()


def _key(features: Features) -> Tensor:
    return torch.cat([features.position, features.sink, features.column, features.code, features.topic], -1)


def _query(features: Features, kind: Kind) -> Tensor:
    tokens = len(features.sink)
    unit = tokens / 2 * math.exp(SPREAD**2 / 2) / kind.background  # all of a query's mass, where a score of 0 counts 1
    rest = features.topic.shape[-1]
    position = _amplitude(features, kind.local * unit) * features.position
    if kind.diagonals:
        height = _amplitude(features, kind.diagonals / 2 * unit)
        for back in (8 * WIDTH + torch.randint(tokens // 3, (2,))).tolist():
            position = position + height * _waves(tokens, features.frequencies, back)
    searched = features.codes[torch.randint(NEEDLES, (-(-tokens // 64),)).repeat_interleave(64)[:tokens]]
    return torch.cat(
        [
            position,
            torch.full((tokens, 1), _height(kind.sink * unit, 1.2)),
            torch.full((tokens, 1), _height(kind.columns * unit, _columns(tokens))),
            searched * (_height(kind.needles * unit, NEEDLE) if kind.needles else 0.0),
            torch.randn(-(-tokens // TOPIC), rest).repeat_interleave(TOPIC, 0)[:tokens] * SPREAD,
        ],
        -1,
    )


def _columns(tokens: int) -> int:
    return max(8, tokens // 512)


def _height(mass: float, keys: float) -> float:
    """The score at which so many keys hold this mass."""
    return math.log(max(mass / keys, 1.0))


def _amplitude(features: Features, mass: float) -> float:
    """The height of a bump of positions that holds this mass."""
    bump = features.position[: 8 * WIDTH] @ features.position[0]
    low, high = 0.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.exp(middle * bump.double()).sum()) < mass else (low, middle)
    return low
