"""Queries, keys and values whose attention looks like that of trained heads: random ones have no structure to find.

Every head has a background of topics, log-normal over the keys, and on top of it what its kind of head looks at: the
first tokens, the neighbourhood, tokens at fixed distances (diagonals), a few heavy tokens (columns), the piece of text
that its queries search (needles). Heights are set so that queries in the middle of the prompt spend about the stated
shares of their attention on them; `python -m benchmarks.lib.structured` prints the shares that they really spend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cli

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


PARTS = ("sink", "local", "diagonals", "columns", "needles")
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
            q[:, head] = (_drawn(features, MIX[head % len(MIX)])[1] * math.sqrt(dim) / KEY_NORM).to(dtype)
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
    topic = _topics(tokens, dim - 2 * waves - 2 - code) / math.sqrt(dim - 2 * waves - 2 - code)
    topic[(sink + column + codes.abs().sum(-1, keepdim=True) > 0)[:, 0]] = 0.0  # their height is what is set below
    return Features(_waves(tokens, frequencies, 0), frequencies, sink, column, codes, needles, topic)


def _topics(tokens: int, channels: int) -> Tensor:
    """[T, channels] of unit variance, three quarters of it shared by the tokens of a topic."""
    shared = torch.randn(-(-tokens // TOPIC), channels).repeat_interleave(TOPIC, 0)[:tokens]
    return math.sqrt(0.75) * shared + 0.5 * torch.randn(tokens, channels)


def _waves(tokens: int, frequencies: Tensor, back: int) -> Tensor:
    """[T, 2 W]: random Fourier features of each position less `back`."""
    angles = (torch.arange(tokens, dtype=torch.float64)[:, None] - back) * frequencies.abs()
    return (torch.cat([angles.cos(), angles.sin()], -1) / math.sqrt(len(frequencies))).float()


def _key(features: Features) -> Tensor:
    return torch.cat([features.position, features.sink, features.column, features.code, features.topic], -1)


@dataclass(frozen=True, slots=True)
class Draw:
    """Random choices of one head."""

    backs: list[int]  # distances of its diagonals
    searched: Tensor  # [T, C], codes
    topic: Tensor  # [T, rest]


def _drawn(features: Features, kind: Kind) -> tuple[Draw, Tensor]:
    """Random choices of a head, and its queries [T, D], corrected until their attention has the stated shares."""
    tokens = len(features.sink)
    draw = Draw(
        (8 * WIDTH + torch.randint(tokens // 3, (2,))).tolist() if kind.diagonals else [],
        features.codes[torch.randint(NEEDLES, (-(-tokens // 64),)).repeat_interleave(64)[:tokens]],
        _topics(tokens, features.topic.shape[-1]) * SPREAD,
    )
    unit = tokens / 2 * math.exp(SPREAD**2 / 2) / kind.background  # all of a query's mass, where a score of 0 counts 1
    masses = {part: getattr(kind, part) * unit for part in PARTS if getattr(kind, part)}
    for _ in range(6):
        query = _assemble(features, draw, masses)
        spent = shares(features, draw, query)
        masses = {part: mass * (getattr(kind, part) / max(spent[part], 1e-3)) ** 0.8 for part, mass in masses.items()}
    return draw, query


def _assemble(features: Features, draw: Draw, masses: dict[str, float]) -> Tensor:
    """Queries on which each part of the keys holds about so much mass."""
    tokens = len(features.sink)
    position = _amplitude(features, masses["local"]) * features.position
    for back in draw.backs:
        height = _amplitude(features, masses["diagonals"] / len(draw.backs))
        position = position + height * _waves(tokens, features.frequencies, back)
    return torch.cat(
        [
            position,
            torch.full((tokens, 1), _height(masses["sink"], 1.2)),
            torch.full((tokens, 1), _height(masses["columns"], _columns(tokens))),
            draw.searched * (_height(masses["needles"], NEEDLE) if "needles" in masses else 0.0),
            draw.topic,
        ],
        -1,
    )


def shares(features: Features, draw: Draw, query: Tensor) -> dict[str, float]:
    """Shares of attention that queries in the middle of the prompt spend on each part."""
    tokens = len(features.sink)
    where = torch.linspace(0.4 * tokens, 0.6 * tokens, 48).long()
    distance = where[:, None] - torch.arange(tokens)
    weights = (query[where] @ _key(features).T).masked_fill(distance < 0, -math.inf).softmax(-1)
    off = torch.stack([(distance - back).abs() < 4 * WIDTH for back in draw.backs or [10 * tokens]]).any(0)
    parts = {
        "sink": (torch.arange(tokens) < 4).expand_as(weights),
        "local": distance < 4 * WIDTH,
        "diagonals": off,
        "columns": (features.column[:, 0] > 0).expand_as(weights),
        "needles": (draw.searched[where] @ features.code.T) > 0.99,
    }
    return {part: float((weights * held).sum(-1).mean()) for part, held in parts.items()}


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


def main() -> None:
    """Print the shares of attention that each kind of head spends, and the stated ones."""
    cli.parser("benchmarks.lib.structured", __doc__).parse_args()
    torch.manual_seed(0)
    features = _features(8192, 128)
    for name, kind in {"streaming": STREAMING, "slashed": SLASHED, "searching": SEARCHING, "diffuse": DIFFUSE}.items():
        spent = shares(features, *_drawn(features, kind))
        print(name, ", ".join(f"{part} {spent[part]:.2f} (stated {getattr(kind, part):.2f})" for part in PARTS))


if __name__ == "__main__":
    main()
