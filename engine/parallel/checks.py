"""What several processes cannot do yet, refused before any is started."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from ..config import EngineConfig
from ..errors import InvalidRequest, ModelNotFound
from ..model import choose_device
from ..source import Source

FIELD = "tensor_parallel_size"


def check(config: EngineConfig, source: Source) -> torch.device:
    """The kind of device that the ranks run on; raises `InvalidRequest` naming what cannot be had by several."""
    _check_options(config)
    device = _check_device(config)
    _check_heads(config.tensor_parallel_size, _text_config(config, source))
    _check_process()
    return device


def _check_options(config: EngineConfig) -> None:
    size = config.tensor_parallel_size
    if config.quantization != "none":
        raise InvalidRequest("quantization", f"none with {FIELD} {size}, got {config.quantization}")
    if config.cuda_graphs:
        raise InvalidRequest("cuda_graphs", f"false with {FIELD} {size}, got true")
    if config.kv_home is not None:
        raise InvalidRequest("kv_home", f"none with {FIELD} {size}, got {config.kv_home!r}")


def _check_device(config: EngineConfig) -> torch.device:
    size, device = config.tensor_parallel_size, choose_device(config.device)
    if device.index is not None:
        raise InvalidRequest("device", f"cuda with {FIELD} {size}, as each rank has its own, got {config.device!r}")
    if device.type == "cpu" and torch.cuda.is_available():
        raise InvalidRequest(
            "device", f"cuda with {FIELD} {size} where there are GPUs; hide them (CUDA_VISIBLE_DEVICES=) for cpu"
        )
    if device.type == "cuda" and size > (count := torch.cuda.device_count()):
        raise InvalidRequest(FIELD, f"at most {count}, the CUDA devices here, got {size}")
    return device


def _check_process() -> None:
    if not dist.is_available():
        raise InvalidRequest(FIELD, "1, as this torch was built without torch.distributed")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidRequest(FIELD, "1 under torchrun: the engine starts its processes itself")
    if dist.is_initialized():
        raise InvalidRequest(FIELD, "1, as this process is in a process group already, of another engine perhaps")


def _text_config(config: EngineConfig, source: Source) -> Any:
    try:
        found = AutoConfig.from_pretrained(
            source.path, gguf_file=source.gguf_file, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{source.name}: {error}") from error
    return found.get_text_config(decoder=True)


def _check_heads(size: int, text: Any) -> None:
    queries = getattr(text, "num_attention_heads", None)
    kept = getattr(text, "num_key_value_heads", None) or queries
    for count, kind in ((kept, "KV heads"), (queries, "query heads")):
        if isinstance(count, int) and count % size:
            raise InvalidRequest(FIELD, f"a divisor of the model's {count} {kind}, got {size}")
