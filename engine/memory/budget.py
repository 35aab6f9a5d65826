"""Memory budget of the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import torch

from keysift.kvcache import CacheSpec, OffloadTier, PagedCache, Tier

from .. import ranks
from ..config import EngineConfig
from ..errors import InvalidRequest
from ..model.loaded import LoadedModel
from ..model.placement import page_bytes, tier_of
from .index_memory import index_bytes, left_for_pages
from .layout import lay_out, make_tier

CGROUP = Path("/sys/fs/cgroup")
SHARE = 0.4
"""Largest share of the memory that is free after loading that pages take by default, without ``kv_memory``."""


def cache_spec(config: EngineConfig, model: LoadedModel) -> CacheSpec:
    """Shape of the model's KV cache."""
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
    """A cache of at most ``kv_memory`` bytes, no larger than all running requests can fill, plus one padding page.

    What indexes build counts too, up to ``index_memory``, if the engine's own strategy has such an index.

    All ranks have as many pages as the one with the least room. With ``kv_offload`` the bytes are those of the pool,
    and `report` receives the layout.

    Raises:
        InvalidRequest: the bytes do not hold one page, or the backing store has no room.
    """
    spec = cache_spec(config, model)
    frames, tier = _allocate(config, model, spec, report)
    pages = tier.size.bytes(spec) if isinstance(tier, OffloadTier) else frames * spec.page_bytes
    sizes = {"max_sequences": config.max_num_seqs, "max_len": model.max_model_len}
    beside = index_bytes(config, pages)
    return cache_type(spec, frames, **sizes, device=model.device, tier=tier, index_bytes=beside)


def _allocate(
    config: EngineConfig, model: LoadedModel, spec: CacheSpec, report: Callable[[str], None]
) -> tuple[int, Tier | None]:
    """Number of pages, and the tier that holds them; None: the cache makes one on its device."""
    if config.kv_offload is not None:
        free = free_memory(model.device)
        host = free_memory(torch.device("cpu")) if model.device.type == "cuda" else None
        layout = lay_out(config, spec, model.max_model_len, free, SHARE, host)
        report(str(layout))
        return layout.frames, make_tier(config, spec, layout, model.device)
    wanted = spec.pages_for(model.max_model_len) * config.max_num_seqs
    ranks_here = config.tensor_parallel_size
    sharing = ranks_here if model.device.type == "cpu" else 1
    if config.kv_memory is None:
        pages = page_bytes(spec, model.devices)
        given = [(int(SHARE * free_memory(device) / sharing), page) for device, page in pages.items()]
    else:
        given = [(int(config.kv_memory), spec.page_bytes)]
    fitting = [left_for_pages(config, spec, size) // page for size, page in given]
    frames = ranks.smallest(min(*fitting, wanted), ranks_here)
    if frames < 1:
        got = min(left_for_pages(config, spec, size) for size, _ in given)
        raise InvalidRequest("kv_memory", f"at least one page = {spec.page_bytes} bytes, got {got}")
    _check_free(frames, page_bytes(spec, model.devices), sharing)
    return frames, tier_of(spec, frames, model.devices, model.device)


def _check_free(frames: int, pages: Mapping[torch.device, int], sharing: int) -> None:
    """Raises `InvalidRequest` for more than is free: memory of a CPU is taken when it is used, long after the start."""
    for device, page in pages.items():
        if frames * page * sharing > (free := free_memory(device)):
            raise InvalidRequest(
                "kv_memory", f"at most the {int(free)} bytes that are free on {device}, got {frames * page * sharing}"
            )


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _free_in_container())


def _free_in_container() -> float:
    """Bytes left to the control group of this process; infinite without a limit."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - int(used)
