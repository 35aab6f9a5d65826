"""A rank's part of a model: transformers splits the weights by the plan that comes with the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..config import EngineConfig
from ..errors import InvalidRequest, ModelNotFound, Unsupported
from .seam import AttentionCall
from .source import Source


def placed(config: EngineConfig, device: torch.device) -> dict[str, Any]:
    """What tells transformers where the weights go: all of them to the device, or this rank's part to its own."""
    ranks = config.tensor_parallel_size
    if ranks == 1:
        return {"device_map": None if device.type == "cpu" else {"": device}}
    try:
        from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]
    except ImportError:
        raise InvalidRequest("tensor_parallel_size", f"1 with this transformers, got {ranks}; 5.23 can do it") from None
    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def check_split(call: AttentionCall, text: Any, ranks: int, *, biased: bool) -> None:
    """Raises `Unsupported` where a rank has other heads than its even share, or would need those of others."""
    if ranks == 1:
        return
    queries = text.num_attention_heads
    kept = getattr(text, "num_key_value_heads", None) or queries
    if (call.num_query_heads * ranks, call.num_kv_heads * ranks) != (queries, kept):
        raise Unsupported(f"{text.model_type}: its tensor parallel plan does not split attention by heads")
    if biased:
        raise Unsupported("a checkpoint with a bias of its keys, which mixes all KV heads: takes one process")


def own(parameter: Tensor) -> Tensor:
    """This rank's part of it."""
    to_local = getattr(parameter, "to_local", None)  # a DTensor, which one process does not even import
    return parameter if to_local is None else to_local()


def check_heads(config: EngineConfig, source: Source) -> None:
    """Raises `InvalidRequest` where the ranks cannot have equal numbers of heads."""
    size, text = config.tensor_parallel_size, _text_config(config, source)
    queries = getattr(text, "num_attention_heads", None)
    kept = getattr(text, "num_key_value_heads", None) or queries
    for count, kind in ((kept, "KV heads"), (queries, "query heads")):
        if isinstance(count, int) and count % size:
            raise InvalidRequest("tensor_parallel_size", f"a divisor of the model's {count} {kind}, got {size}")


def _text_config(config: EngineConfig, source: Source) -> Any:
    try:
        found = AutoConfig.from_pretrained(
            source.path, gguf_file=source.gguf_file, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{source.name}: {error}") from error
    return found.get_text_config(decoder=True)
