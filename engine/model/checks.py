"""Checks of a loaded model: attention calls, context length and rotary embeddings that the engine can serve."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import EngineConfig
from ..errors import InvalidRequest, Unsupported
from ..support import Facts, check
from .placement import check_placed
from .seam import ALIKE, AttentionCall
from .shards import check_split

LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_model(
    config: EngineConfig, module: nn.Module, calls: list[AttentionCall], max_model_len: int, *, biased: bool
) -> None:
    """Raises `Unsupported` naming what cannot be served; `biased`: the checkpoint has a key bias."""
    text = module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    check_calls(calls, text)
    check_rotary(module, max_model_len)
    check_placed(module)
    check_split(calls[0], text, config.tensor_parallel_size)
    check(config, Facts(key_bias=biased, devices=len({call.device for call in calls})))


def check_calls(calls: list[AttentionCall], text: Any) -> None:
    """Raises `Unsupported` unless there is one call per layer, alike in all that the layers of a paged cache share."""
    if [call.layer for call in calls] != list(range(text.num_hidden_layers)):
        raise Unsupported(f"{text.model_type}: {len(calls)} attention calls for {text.num_hidden_layers} layers")
    for name in ALIKE:
        if len(values := sorted({getattr(call, name) for call in calls})) > 1:
            raise Unsupported(f"{text.model_type}: layers differ in {name}: {', '.join(map(str, values))}")
    kinds = getattr(text, "layer_types", None) or [None] * len(calls)
    if unknown := {kind for kind in kinds if kind is not None} - LAYER_TYPES:
        raise Unsupported(f"{text.model_type}: layer type {', '.join(sorted(unknown))}")
    if any(
        kind is not None and (kind == "sliding_attention") != bool(call.window)
        for call, kind in zip(calls, kinds, strict=True)
    ):
        raise Unsupported(f"{text.model_type}: its sliding layers do not pass attention their window")


def served_length(asked: int | None, text: Any) -> int:
    """Longest prompt + completion in tokens: `asked`, or the model's own limit. Raises `InvalidRequest` beyond that."""
    limit: int | None = getattr(text, "max_position_embeddings", None)
    chosen = limit if asked is None else asked
    if chosen is None:
        raise InvalidRequest("max_model_len", "the model states no limit, so a number is needed, got none")
    if limit is not None and chosen > limit:
        raise InvalidRequest(
            "max_model_len",
            f"at most {limit}, the model's max_position_embeddings, unless rope_scaling stretches them, got {asked}",
        )
    return chosen


def check_rotary(module: nn.Module, max_model_len: int) -> None:
    """Raises `Unsupported` where frequencies of a rotary embedding change within `max_model_len` tokens.

    Such a change follows the longest position of a step, not of a sequence, so a token's key would depend on how its
    prompt was cut and on the other sequences of the step. Below the change frequencies are constant.
    """
    for rotary in module.modules():
        kinds = getattr(rotary, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            limit = _constant_until(rotary, layer_type, kind)
            if limit is not None and max_model_len > limit:
                raise Unsupported(
                    f"rope_type {kind}: changes its frequencies beyond {limit} tokens; max_model_len must be at most "
                    f"{limit}, got {max_model_len}"
                )


def _constant_until(rotary: Any, layer_type: str | None, kind: str | None) -> int | None:
    """Tokens for which the frequencies are constant; None: any number."""
    if kind == "longrope":
        parameters = rotary.config.rope_parameters
        chosen = parameters if layer_type is None else parameters[layer_type]
        return int(chosen["original_max_position_embeddings"])
    return int(rotary.max_seq_len_cached) if kind and "dynamic" in kind else None
