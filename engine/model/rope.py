"""Stretched rotary embeddings, for contexts beyond the length that a model was made for."""

from __future__ import annotations

from typing import Any

from ..config import EngineConfig, RopeScaling
from ..errors import InvalidRequest
from .source import Source

FULL = "full_attention"
"""Key of the embedding of layers without a window, where layers have different ones."""


def stretched(source: Source, config: EngineConfig) -> Any:
    """The model's own configuration with its rotary embedding stretched; None without ``rope_scaling``."""
    if config.rope_scaling is None or config.max_model_len is None:
        return None
    found = source.read_config(config.trust_remote_code)
    stretch(found, config.rope_scaling, config.max_model_len)
    return found


def stretch(config: Any, scaling: RopeScaling, max_model_len: int) -> None:
    """Stretch the rotary embedding in a transformers configuration to `max_model_len` tokens, in place.

    Distances shrink by max_model_len / limit; ``yarn`` preserves the short ones, which the model knows best. Layers
    with a sliding window see short distances only and stay as they are, where they have an embedding of their own.

    Raises `InvalidRequest` naming ``rope_scaling`` where there is nothing to stretch, or too much is stretched already.
    """
    text = config.get_text_config(decoder=True)
    limit: int | None = getattr(text, "max_position_embeddings", None)
    if limit is None or max_model_len <= limit:
        return
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    full = parameters.get(FULL, parameters)
    if not full or "rope_theta" not in full:
        raise InvalidRequest("rope_scaling", f"a model with a rotary embedding, got {text.model_type}, which has none")
    if (kind := full.get("rope_type", "default")) != "default":
        raise InvalidRequest(
            "rope_scaling",
            f"a model whose rotary embedding is plain, got {text.model_type} with rope_type {kind}, which is scaled "
            f"for {limit} tokens already; max_model_len must be at most {limit}, got {max_model_len}",
        )
    scaled = {**full, "rope_type": scaling, "factor": max_model_len / limit}
    scaled.pop("type", None)
    if scaling == "yarn":
        scaled["original_max_position_embeddings"] = limit
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = limit  # some models' own field, which wins over the parameter
    text.rope_parameters = {**parameters, FULL: scaled} if FULL in parameters else scaled
    text.max_position_embeddings = max_model_len
