"""Placement of a model's weights and pages: on one device, on several, or a rank's part of them."""

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
    """Arguments of `from_pretrained` that place the weights.

    Layers are spread evenly: "balanced" leaves every device room for the pages of its layers, whereas transformers'
    "auto" may be changed to fill the first ones.
    """
    return {"device_map": "balanced"} if config.device_map == "auto" else shards.placed(config, device)


def check_placed(module: nn.Module) -> None:
    """Raises `Unsupported` where transformers left some weights on the host."""
    where = {str(device) for device in getattr(module, "hf_device_map", {}).values()}
    if where & {"cpu", "disk"}:
        raise Unsupported("device_map: the weights do not fit on the CUDA devices together")


@contextmanager
def keep_logits(module: nn.Module, devices: Sequence[torch.device], last: Tensor) -> Iterator[dict[str, Any]]:
    """Arguments of the model's forward that limit its logits to the tokens at indices last [B].

    With layers on several devices a hook on the output embeddings selects the tokens instead, as the argument stays on
    the first device.
    """
    if not is_spread(devices, last.device):
        yield {"logits_to_keep": last}
        return
    head: nn.Module = module.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, last.to(given[0].device)], *given[1:]))
    try:
        yield {}
    finally:
        hook.remove()


def is_spread(devices: Sequence[torch.device], first: torch.device) -> bool:
    """Some layer's attention is on another device than `first`, where steps are made."""
    return any((device.type, device.index or 0) != (first.type, first.index or 0) for device in devices)


def tier_of(spec: CacheSpec, num_frames: int, devices: Sequence[torch.device], first: torch.device) -> Tier | None:
    """Tier of a model whose layers are on several devices; None: the cache makes one on its device.

    It has one more frame, which padding writes to, like a cache's own tier.
    """
    return MultiDeviceTier(spec, num_frames + 1, devices) if is_spread(devices, first) else None


def page_bytes(spec: CacheSpec, devices: Sequence[torch.device]) -> dict[torch.device, int]:
    """Bytes of a page on each device."""
    return {
        device: replace(spec, num_layers=count, windows=()).page_bytes for device, count in Counter(devices).items()
    }
