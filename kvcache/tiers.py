"""Where pages physically are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .ops.encode import Codes, encode
from .ops.store import store
from .ops.summarize import summarize
from .selection import Selection
from .spec import SUMMARIES, CacheSpec
from .step import Step


@dataclass(frozen=True, slots=True)
class Frames:
    """Keys and values that an op can read, and where each page of each row is in them."""

    k: Tensor
    """[N, Hkv, S, D]"""
    v: Tensor
    """[N, Hkv, S, D]"""
    table: Tensor
    """[R, Hkv, F] int32, page -> frame."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What reading and writing pages has moved between memories."""

    hits: int = 0
    """Pages of one layer and KV head that were where an op could read them."""
    misses: int = 0
    """The same that had to be fetched first."""
    fetched: int = 0
    """Bytes that came from the pages' home."""
    written: int = 0
    """Bytes that went there."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))

    def __floordiv__(self, parts: int) -> Traffic:
        return Traffic(*(getattr(self, name) // parts for name in self.__slots__))


class Tier(Protocol):
    """Holds the pages of all layers and brings those that a selection names where an op can read them."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Put the step's keys and values [T, Hkv, D] into their slots; summarise and encode pages that become full."""

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        """The selected pages, readable now."""

    def summaries(self, layer: int) -> Tensor:
        """[N, Hkv, 4, D]: mean, least and greatest key and mean value of each full frame."""

    def codes(self, layer: int) -> Codes:
        """The keys of each full frame in a few bits; without a word where the spec has no codes."""

    @property
    def traffic(self) -> Traffic:
        """What has moved since the start; may wait for the device."""


class DeviceTier:
    """Every page stays on the compute device; nothing moves."""

    traffic = Traffic()

    def __init__(self, spec: CacheSpec, num_frames: int, device: torch.device) -> None:
        shape = (spec.num_layers, num_frames, spec.num_kv_heads)
        self.k = torch.empty(*shape, spec.page_size, spec.head_dim, dtype=spec.dtype, device=device)
        self.v = torch.empty_like(self.k)
        self._summaries = torch.empty(*shape, SUMMARIES, spec.head_dim, dtype=spec.dtype, device=device)
        self._codes = _empty_codes(shape, spec, device)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        store(self.k[layer], self.v[layer], k, v, step.slots)
        if step.filled.shape[0]:
            summarize(self._summaries[layer], self.k[layer], self.v[layer], step.filled)
            if self._codes.levels.numel():
                encode(self.k[layer], self._summaries[layer], step.filled, self.codes(layer))

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        return Frames(self.k[layer], self.v[layer], step.table)

    def summaries(self, layer: int) -> Tensor:
        return self._summaries[layer]

    def codes(self, layer: int) -> Codes:
        return Codes(*(part[layer] for part in self._codes))


def _empty_codes(shape: tuple[int, int, int], spec: CacheSpec, device: torch.device) -> Codes:
    dim = spec.head_dim if spec.code_bits else 0
    return Codes(
        torch.empty(*shape, spec.code_words, spec.page_size, dtype=torch.int32, device=device),
        torch.empty(*shape, 2, dim, dtype=torch.int8, device=device),
        torch.empty(*shape, 2, dtype=torch.float32, device=device),
    )
