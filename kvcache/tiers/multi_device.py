"""Tier of models whose layers are on several devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.encode import Codes
from ..selection import Selection
from ..spec import CacheSpec
from ..step import Step
from .base import Frames, InPlaceTier
from .device import DeviceTier


class _Place(NamedTuple):
    """Tier of a layer, and its number there."""

    tier: DeviceTier
    layer: int


class MultiDeviceTier(InPlaceTier):
    """A `DeviceTier` on each device for the layers that run there; a frame has a part on each of them.

    Every call for a layer takes a step whose tensors are on the layer's device: see `Step.on`.
    """

    def __init__(self, spec: CacheSpec, num_frames: int, devices: Sequence[torch.device]) -> None:
        """`devices`: the device of each layer."""
        counts = {device: devices.count(device) for device in devices}
        tiers = {
            device: DeviceTier(replace(spec, num_layers=count, windows=()), num_frames, device)
            for device, count in counts.items()
        }
        before = (devices[:layer].count(device) for layer, device in enumerate(devices))
        self._places = [_Place(tiers[device], layer) for device, layer in zip(devices, before, strict=True)]

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        tier, here = self._places[layer]
        tier.write(here, k, v, step)

    def resident(self, layer: int, selection: Selection, step: Step) -> Frames:
        tier, here = self._places[layer]
        return tier.resident(here, selection, step)

    def own(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        tier, here = self._places[layer]
        return tier.own(here, step)

    def parts(self, layer: int, selection: Selection, step: Step) -> Iterator[tuple[Selection, Frames]]:
        tier, here = self._places[layer]
        return tier.parts(here, selection, step)

    def summaries(self, layer: int) -> Tensor:
        tier, here = self._places[layer]
        return tier.summaries(here)

    def codes(self, layer: int) -> Codes:
        tier, here = self._places[layer]
        return tier.codes(here)
