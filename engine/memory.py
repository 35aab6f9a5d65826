"""How much memory the KV pages get."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from keysift.kvcache import CacheSpec, PagedCache

from .config import EngineConfig
from .errors import InvalidRequest
from .model import LoadedModel

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


def make_cache(config: EngineConfig, model: LoadedModel) -> PagedCache:
    """A cache of at most ``kv_memory`` bytes, and no larger than all running requests could fill.

    Raises:
        InvalidRequest: the bytes do not hold one page.
    """
    spec = cache_spec(config, model)
    wanted = spec.pages_for(model.max_model_len) * config.max_num_seqs
    budget = int(SHARE * free_memory(model.device)) if config.kv_memory is None else int(config.kv_memory)
    frames = min(budget // spec.page_bytes, wanted)
    if frames < 1:
        raise InvalidRequest("kv_memory", f"at least one page = {spec.page_bytes} bytes, got {budget}")
    return PagedCache(spec, frames, max_sequences=config.max_num_seqs, max_len=model.max_model_len, device=model.device)


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
