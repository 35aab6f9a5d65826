"""Attention implementation registered with transformers, for every model that uses its attention interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from keysift.attention import Attend

from ..errors import Unsupported
from . import key_bias

NAME = "keysift"
REFUSED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "head_mask")
"""Arguments that change the result of attention; a model that passes one is refused rather than served wrongly."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Shapes and arguments of one layer's attention call."""

    layer: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    """A query reads itself and the `window` - 1 tokens before it; 0: everything before it."""
    device: torch.device


ALIKE = ("num_query_heads", "num_kv_heads", "head_dim", "scale")
"""Fields that must be equal in all layers of a model."""
Observe = Callable[[AttentionCall], None]


def register() -> None:
    """Register `NAME` as an attention implementation of transformers; idempotent.

    Both registries must have it: a name in only the first one silently loses its masks.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    attend: Attend | None = None,
    observe: Observe | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] after rotary embedding -> ([1, T, Hq, D], None).

    The model's layer passes the arguments; `attend` and `observe` are the engine's and arrive through ``model(...)``.
    Raises `Unsupported` naming arguments that cannot be honoured.
    """
    layer = _layer(module)
    _refuse(module, attention_mask, dropout, attend, others)
    assert attend is not None
    if observe is not None:
        observe(_call(layer, query, key, value, scaling, sliding_window))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if (bias := key_bias.of(module)) is not None:
        return bias.attend(attend, layer, q, k, v, _scale(q, scaling))[None], None
    return attend(layer, q, k, v)[None], None  # [1, T, Hq, D]


def mask(*_args: Any, config: Any, attention_mask: Tensor | None = None, **_others: Any) -> None:
    """No mask: `Attend` knows each token's sequence and position, and applies causality and windows itself."""
    if attention_mask is not None:
        raise Unsupported(f"{config.model_type}: cannot honour attention_mask; tokens are packed, there is no padding")


def probe(model: nn.Module, device: torch.device) -> list[AttentionCall]:
    """Attention calls of all layers, in order, observed in one forward pass over two tokens.

    Raises `Unsupported` naming what cannot be honoured.
    """
    calls: list[AttentionCall] = []
    positions = torch.arange(2, device=device)  # [T]
    several = len({parameter.device for parameter in model.parameters()}) > 1  # an index would be on the wrong one
    kept = 1 if several else positions[-1:]
    options = {"use_cache": False, "logits_to_keep": kept, "attend": _zeros, "observe": calls.append}
    try:
        with torch.inference_mode():
            output = model(input_ids=positions[None], position_ids=positions[None], **options)
    except TypeError as error:
        raise Unsupported(
            f"{type(model).__name__}: its forward pass does not take what the engine passes ({error})"
        ) from error
    if not calls:
        raise Unsupported(f"{type(model).__name__}: does not use transformers' attention interface")
    if output.logits.shape[1] != 1:
        raise Unsupported(f"{type(model).__name__}: does not honour logits_to_keep")
    return calls


def facts(calls: list[AttentionCall]) -> dict[str, Any]:
    """Fields of `LoadedModel` about its layers, which differ only in windows and devices."""
    return {
        "num_layers": len(calls),
        **{name: getattr(calls[0], name) for name in ALIKE},
        "windows": tuple(call.window for call in calls),
        "devices": tuple(call.device for call in calls),
    }


def _zeros(_layer: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
    return torch.zeros_like(q)


def _layer(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise Unsupported(f"{type(module).__name__}: its layers carry no layer_idx")
    return layer


def _refuse(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, attend: Attend | None, others: dict[str, Any]
) -> None:
    unfit = [name for name in REFUSED if others.get(name) is not None]
    if attention_mask is not None:
        unfit.append("attention_mask")
    if dropout > 0 and module.training:
        unfit.append("dropout while training")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unfit.append("is_causal=False")
    if unfit:
        raise Unsupported(f"{type(module).__name__}: cannot honour {', '.join(unfit)}")
    if attend is None:
        raise Unsupported(f"{type(module).__name__}: attend did not reach attention; pass it to the model's forward")


def _call(
    layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
) -> AttentionCall:
    head_dim = query.shape[-1]
    if value.shape[-1] != head_dim or key.shape[-1] != head_dim:
        raise Unsupported(
            f"layer {layer}: head_dim of queries is {head_dim}, of values {value.shape[-1]}; they must agree"
        )
    return AttentionCall(
        layer=layer,
        num_query_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=head_dim,
        scale=_scale(query, scaling),
        window=sliding_window or 0,
        device=query.device,
    )


def _scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)
