"""Backing store that fails at random."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from random import Random

import torch
from torch import Tensor

from keysift.kvcache import BackingStore, CacheSpec, OffloadError


class Failing:
    """A store whose calls fail at a given rate, half done; frames that were claimed and not written are NaN."""

    def __init__(self, store: BackingStore, spec: CacheSpec, rate: float, seed: int) -> None:
        self.store, self.spec, self.rate = store, spec, rate
        self.claimed: set[int] = set()
        self._main = threading.current_thread()
        self._dice, self._worker_dice = Random(seed), Random(seed + 1)

    def _fails(self) -> bool:
        dice = self._dice if threading.current_thread() is self._main else self._worker_dice
        return dice.random() < self.rate

    def claim(self, frames: Iterable[int]) -> None:
        frames = list(frames)
        if self._fails():
            raise OffloadError("full", exhausted=True)
        self.store.claim(frames)
        fresh = [frame for frame in frames if frame not in self.claimed]
        self.claimed.update(fresh)
        self.poison(fresh)

    def poison(self, frames: Sequence[int]) -> None:
        spec = self.spec
        pages = torch.full(
            (len(frames), spec.num_kv_heads, 2, spec.page_size, spec.head_dim), torch.nan, dtype=spec.dtype
        )
        for layer in range(spec.num_layers):
            self.store.write(layer, frames, pages)

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        if self._fails():
            self.store.write(layer, frames[: len(frames) // 2], pages[: len(frames) // 2])
            raise OffloadError("no write")
        self.store.write(layer, frames, pages)

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        if self._fails():
            self.store.read(layer, frames[: len(frames) // 2], pages[: len(frames) // 2])
            pages[len(frames) // 2 :] = torch.nan
            raise OffloadError("no read")
        self.store.read(layer, frames, pages)

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        if threading.current_thread() is not self._main:
            time.sleep(0.002 * self._worker_dice.random())
        if self._fails():
            for head, targets in enumerate(slots.tolist()):
                pool[[slot for slot in targets if slot >= 0], head] = torch.nan
            raise OffloadError("no fetch")
        self.store.fetch(layer, pool, loads, slots)

    def close(self) -> None:
        self.store.close()
