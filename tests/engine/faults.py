"""Fault injection: a tier that fails on demand, in the ways that real ones fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from keysift.engine import Engine, FinishReason, Output
from keysift.kvcache import BackingStore, DeviceTier, Frames, OffloadError, Selection, Step
from tests.engine.driver import finish_of, said

Act = Literal["write", "resident"]
Fault = Callable[[Act, int, Step], None]
"""Raises if the tier's operation on this layer in this step is to fail."""
ADDRESS_SPACE = 2**50
"""More bytes than any machine has."""


def exhausted() -> None:
    raise OffloadError("kv_offload: 4096 bytes needed, 0 are left", exhausted=True)


def broken() -> None:
    raise OffloadError("kv_offload: page 7 could not be read")


def python_memory() -> None:
    bytearray(ADDRESS_SPACE)


def torch_memory() -> None:
    torch.empty(ADDRESS_SPACE, dtype=torch.uint8)


KINDS: dict[str, Callable[[], None]] = {
    "store full": exhausted,
    "store broken": broken,
    "memory": python_memory,
    "memory of tensors": torch_memory,
}


class FaultyTier(DeviceTier):
    """Tier that calls `fault` before each operation; a failed write leaves garbage, as half a write does."""

    fault: Fault

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        try:
            self.fault("write", layer, step)
        except Exception:
            super().write(layer, torch.full_like(k, torch.nan), torch.full_like(v, torch.nan), step)
            raise
        super().write(layer, k, v, step)

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        self.fault("resident", layer, step)
        return super().resident(layer, selection, step)


class FaultyHome:
    """A store whose reads, writes and claims fail at random, half done."""

    def __init__(self, store: BackingStore, share: float, seed: int) -> None:
        self._store, self._share = store, share
        self._chance = random.Random(seed)
        self.failed = self.fetched = 0

    def claim(self, frames: Iterable[int]) -> None:
        self._store.claim(frames)
        self._maybe(0.2)

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        self._store.write(layer, frames[:-1], pages[:-1])
        self._maybe()
        self._store.write(layer, frames, pages)

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        self._maybe(spoilt=pages)
        self._store.read(layer, frames, pages)

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        self.fetched += int((loads >= 0).sum())
        self._maybe(4.0)
        self._store.fetch(layer, pool, loads, slots)

    def close(self) -> None:
        self._store.close()

    def _maybe(self, less: float = 1.0, spoilt: Tensor | None = None) -> None:
        if self._chance.random() >= self._share * less:
            return
        self.failed += 1
        if spoilt is not None:
            spoilt.fill_(float("nan"))
        KINDS[self._chance.choice(list(KINDS))]()


def install(engine: Engine, fault: Fault) -> None:
    """Install a failing tier in an engine that has not run yet."""
    tier = FaultyTier(engine.cache.spec, engine.cache.allocator.total, engine.cache.device)
    tier.fault = fault
    engine.cache.tier = tier


def holds(engine: Engine, step: Step, request_id: str) -> bool:
    """The request is in the step."""
    return any(
        sequence.request.request_id == request_id and sequence.handle in {span.sequence for span in step.spans}
        for sequence in engine.scheduler.running
    )


def check_said(outputs: list[Output], clean: list[Output], names: Sequence[str]) -> None:
    """Some requests failed and some did not; the tokens of all are a prefix of those without faults."""
    ends = {name: finish_of(outputs, name) for name in names}
    assert {end.reason for end in ends.values()} == {FinishReason.LENGTH, FinishReason.ERROR}
    for name, end in ends.items():
        text, whole = said(outputs, name), said(clean, name)
        assert text == (whole if end.reason is FinishReason.LENGTH else whole[: len(text)])
