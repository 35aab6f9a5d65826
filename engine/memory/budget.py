"""How much memory the KV pages get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from keysift.kvcache import CacheSpec, PagedCache, Tier

from .. import ranks as group
from ..config import EngineConfig
from ..errors import InvalidRequest
from ..model.loaded import LoadedModel
from ..model.placement import parts, tier_of
from .layout import lay_out, make_tier

CGROUP = Path("/sys/fs/cgroup")
SHARE = 0.4
"""Of the memory that is free once the model is loaded, the most that pages take unless ``kv_memory`` says otherwise."""


def cache_spec(config: EngineConfig, model: LoadedModel) -> CacheSpec:
    return CacheSpec(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim + model.bias_channels,
        bias_channels=model.bias_channels,
        page_size=config.page_size,
        dtype=model.dtype,
        scale=model.scale,
        windows=model.windows,
        code_bits=config.code_bits or None,
    )


def make_cache(
    config: EngineConfig,
    model: LoadedModel,
    report: Callable[[str], None],
    cache_type: type[PagedCache] = PagedCache,
) -> PagedCache:
    """A cache of at most ``kv_memory`` bytes, and no larger than all running requests could fill; and one page more,
    which belongs to nobody.

    The ranks of a team all have as many pages as the one that has the least room. With ``kv_offload`` these are the
    bytes of what is at hand, and `report` hears how they are spent.

    Raises:
        InvalidRequest: the bytes do not hold one page, or the home has no room.
    """
    spec = cache_spec(config, model)
    frames, tier = _room(config, model, spec, report)
    sizes = {"max_sequences": config.max_num_seqs, "max_len": model.max_model_len}
    return cache_type(spec, frames, **sizes, device=model.device, tier=tier)


def _room(
    config: EngineConfig, model: LoadedModel, spec: CacheSpec, report: Callable[[str], None]
) -> tuple[int, Tier | None]:
    """How many pages there are, and where they live; None: on the device."""
    free = free_memory(model.device)
    if config.kv_offload is not None:
        beside = free_memory(torch.device("cpu")) if model.device.type == "cuda" else None
        layout = lay_out(config, spec, model.max_model_len, free, SHARE, beside)
        report(str(layout))
        return layout.frames, make_tier(config, spec, layout, model.device)
    wanted = spec.pages_for(model.max_model_len) * config.max_num_seqs
    size = config.tensor_parallel_size
    sharing = size if model.device.type == "cpu" else 1
    if config.kv_memory is None:
        fitting = [int(SHARE * free_memory(d) / sharing) // page for d, page in parts(spec, model.devices).items()]
    else:
        fitting = [int(config.kv_memory) // spec.page_bytes]
    frames = group.least(min(*fitting, wanted), size)
    if frames < 1:
        given = int(SHARE * free / sharing) if config.kv_memory is None else int(config.kv_memory)
        raise InvalidRequest("kv_memory", f"at least one page = {spec.page_bytes} bytes, got {given}")
    return frames, tier_of(spec, frames, model.devices, model.device)


def free_memory(device: torch.device) -> float:
    """Bytes that the device could give now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _free_in_container())


def _free_in_container() -> float:
    """Bytes that the control group of this process leaves it; infinite where it has no limit."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - int(used)
