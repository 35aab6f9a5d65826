"""Where a model's weights go: one device, several, or a rank's part of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from keysift.kvcache import CacheSpec, MultiDeviceTier, Tier

from ..config import EngineConfig
from ..errors import Unsupported
from . import shards


def placed(config: EngineConfig, device: torch.device) -> dict[str, Any]:
    """What tells transformers where the weights go.

    As evenly as they come: "balanced" leaves every device room for the pages of its layers, where transformers' "auto"
    may be changed to fill the first ones.
    """
    return {"device_map": "balanced"} if config.device_map == "auto" else shards.placed(config, device)


def check_placed(module: nn.Module) -> None:
    """Raises `Unsupported` where transformers left some weights on the host."""
    where = {str(device) for device in getattr(module, "hf_device_map", {}).values()}
    if where & {"cpu", "disk"}:
        raise Unsupported("device_map: the weights do not fit on the CUDA devices together")


@contextmanager
def keeping(module: nn.Module, devices: Sequence[torch.device], last: Tensor) -> Iterator[dict[str, Any]]:
    """What has the model give logits of the tokens at indices last [B] alone.

    Layers on several devices end on one that a model's argument does not get to, so that tokens are picked there.
    """
    if not elsewhere(devices, last.device):
        yield {"logits_to_keep": last}
        return
    head: nn.Module = module.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, last.to(given[0].device)], *given[1:]))
    try:
        yield {}
    finally:
        hook.remove()


def elsewhere(devices: Sequence[torch.device], first: torch.device) -> bool:
    """Some layer attends on another device than the first, where steps are made."""
    return any((device.type, device.index or 0) != (first.type, first.index or 0) for device in devices)


def tier_of(spec: CacheSpec, num_frames: int, devices: Sequence[torch.device], first: torch.device) -> Tier | None:
    """Where pages live of a model whose layers are not all on its first device; None: a cache makes a tier of its own.

    With one frame more than there are, as a cache's own, for what padding writes.
    """
    return MultiDeviceTier(spec, num_frames + 1, devices) if elsewhere(devices, first) else None


def parts(spec: CacheSpec, devices: Sequence[torch.device]) -> dict[torch.device, int]:
    """Bytes of a page on each device."""
    return {
        device: replace(spec, num_layers=count, windows=()).page_bytes for device, count in Counter(devices).items()
    }
