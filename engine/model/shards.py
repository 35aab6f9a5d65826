"""Tensor-parallel parts of a model: transformers splits the weights by the plan that comes with the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig
from ..errors import InvalidRequest, ModelNotFound, Unsupported
from .seam import AttentionCall
from .source import Source


def splits_weights() -> bool:
    """This transformers can load a rank's part of the weights."""
    try:
        from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]  # noqa: F401
    except ImportError:
        return False
    return True


def placed(config: EngineConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put all weights on the device, or this rank's part on its own."""
    ranks = config.tensor_parallel_size
    if ranks == 1:
        return {"device_map": None if device.type == "cpu" else {"": device}}
    from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]

    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def check_split(call: AttentionCall, text: Any, ranks: int) -> None:
    """Raises `Unsupported` where a rank has other heads than its even share."""
    if ranks == 1:
        return
    queries = text.num_attention_heads
    kept = getattr(text, "num_key_value_heads", None) or queries
    if (call.num_query_heads * ranks, call.num_kv_heads * ranks) != (queries, kept):
        raise Unsupported(f"{text.model_type}: its tensor parallel plan does not split attention by heads")


def own(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    to_local = getattr(parameter, "to_local", None)  # of a DTensor, a class that one process does not import
    return parameter if to_local is None else to_local()


def check_heads(config: EngineConfig, source: Source) -> None:
    """Raises `InvalidRequest` where the heads cannot be divided evenly among the ranks."""
    size, text = config.tensor_parallel_size, _text_config(config, source)
    queries = getattr(text, "num_attention_heads", None)
    kept = getattr(text, "num_key_value_heads", None) or queries
    for count, kind in ((kept, "KV heads"), (queries, "query heads")):
        if isinstance(count, int) and count % size:
            raise InvalidRequest("tensor_parallel_size", f"a divisor of the model's {count} {kind}, got {size}")


def _text_config(config: EngineConfig, source: Source) -> Any:
    try:
        found = source.read_config(config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{source.name}: {error}") from error
    return found.get_text_config(decoder=True)
