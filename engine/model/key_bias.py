"""Learned bias of every key, as in NOSA checkpoints: recognised by its tensors, served without a kernel of its own.

Huang et al., "NOSA", arXiv 2510.13602: besides the weights of a plain decoder, whose configuration does not mention it,
every layer has `self_attn.A` [Hkv] and a linear `self_attn.delta`. They give each token and KV head a bias
``b = A * softplus(delta(v))``, and attention weighs a key with ``exp(b) * exp(scale * q . k)``: without the bias it is
another model, so every path applies it. transformers drops tensors that its own model does not have.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear, pad, softplus
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from keysift.attention import Attend

from ..errors import Unsupported
from .source import Source

NAME = "key_bias"
"""Submodule of an attention module, so that its weights move with the others and count in the fingerprint."""
TRAINED_LEN = 16_384
"""Context length in tokens of the published checkpoints' training, which their files do not state."""
PARTS = ("A", "delta.weight", "delta.bias")
FILLED = 2
"""Channels that hold a bias, high part and low part: in bfloat16 one of them has 8 bits, both have 16."""
MULTIPLE = 16
"""Head dims that all native kernels take; Triton's pad to a power of two, so 128 + 16 costs them a tile of 256."""

Place = tuple[int, str]
"""A layer, and one of `PARTS`."""

_TENSOR = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.(A|delta\.weight|delta\.bias)")
_loader = logging.getLogger("transformers.modeling_utils")


class KeyBias(nn.Module):
    """Bias that one layer adds to the score of each key."""

    def __init__(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """a [Hkv], weight [Hkv, Hkv * D], bias [Hkv] or none; kept in fp32, as they are few."""
        super().__init__()
        self.a = nn.Parameter(a.float(), requires_grad=False)
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, v: Tensor) -> Tensor:
        """[T, Hkv] fp32 for values v [T, Hkv, D]."""
        return self.a * softplus(linear(v.flatten(1).float(), self.weight, self.bias))

    def attend(self, attend: Attend, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[T, Hq, D], biased attention of q [T, Hq, D] over k and v [T, Hkv, D], by an `attend` without a bias.

        Heads are widened by channels whose product is the bias, so that pages, their means, bounds and codes carry it.
        The query's channels hold the power of two nearest to 1 / scale, so that the key's are about as large as the
        bias: codes, whose steps follow a page's largest channel, would otherwise lose precision.
        """
        more, step = channels(dim := q.shape[-1]), 2.0 ** round(-math.log2(scale))
        part = self(v) / (scale * step)  # [T, Hkv]
        high = part.to(k.dtype)
        both = torch.stack([high, (part - high.float()).to(k.dtype)], dim=-1)
        wide_q = torch.cat([q, pad(q.new_full((*q.shape[:2], FILLED), step), (0, more - FILLED))], dim=-1)
        wide_k = torch.cat([k, pad(both, (0, more - FILLED))], dim=-1)
        return attend(layer, wide_q, wide_k, pad(v, (0, more)))[..., :dim]


def channels(head_dim: int) -> int:
    """Extra channels of a biased head; see `KeyBias.attend`."""
    return FILLED + -(head_dim + FILLED) % MULTIPLE


def of(module: nn.Module) -> KeyBias | None:
    """Bias of an attention module; None: its checkpoint has none."""
    return getattr(module, NAME, None)


def found(unexpected: Sequence[str]) -> bool:
    """A bias is among the tensors that transformers did not use."""
    return bool(_names(unexpected))


def attach(
    module: nn.Module, source: Source, unexpected: Sequence[str], *, layers: int, kv_heads: int, head_dim: int
) -> int:
    """Attach to every layer the bias that is among the checkpoint's `unexpected` tensors, if there is one.

    Returns the channels that it takes in the cache, 0 for none. Raises `Unsupported` naming the tensors that are
    missing or of another shape.
    """
    names = _names(unexpected)
    if not names:
        return 0
    _check_complete(names, layers)
    tensors = _read(source, names)
    _check_shapes(names, tensors, kv_heads, head_dim)
    modules = _attention_modules(module)
    for layer in range(layers):
        if layer not in modules:
            raise Unsupported(f"{type(module).__name__}: no attention for {names[layer, 'A']}")
        a, weight, bias = (tensors.get((layer, part)) for part in PARTS)
        assert a is not None
        assert weight is not None
        modules[layer].add_module(NAME, KeyBias(a, weight, bias).to(next(modules[layer].parameters()).device))
    return channels(head_dim)


@contextmanager
def hold_report() -> Iterator[list[logging.LogRecord]]:
    """Hold back transformers' report on a checkpoint's tensors for `release_report`; an error logs it."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            held.append(record)
        return not is_report

    _loader.addFilter(hold)
    try:
        yield held
    except Exception:
        _loader.removeFilter(hold)
        _log(held)
        raise
    finally:
        _loader.removeFilter(hold)


def release_report(held: Sequence[logging.LogRecord], loading: dict[str, Any]) -> None:
    """Log the held report, unless it names no other tensors than those of a key bias."""
    names = [name for group in loading.values() for name in group]
    if not all(isinstance(name, str) and _TENSOR.fullmatch(name) for name in names):
        _log(held)


def _log(held: Sequence[logging.LogRecord]) -> None:
    for record in held:
        _loader.handle(record)


def _names(unexpected: Sequence[str]) -> dict[Place, str]:
    """Names of a bias' tensors by layer and part."""
    found = ((_TENSOR.fullmatch(name), name) for name in sorted(unexpected))
    return {(int(match[1]), match[2]): name for match, name in found if match}


def _check_complete(names: dict[Place, str], layers: int) -> None:
    known = {layer for layer, _ in names}
    if strange := sorted(known - set(range(layers))):
        raise Unsupported(f"a biased checkpoint of {layers} layers: has tensors of layer {strange[0]}")
    missing = [(layer, part) for layer in range(layers) for part in PARTS[:2] if (layer, part) not in names]
    with_bias = {layer for layer, part in names if part == "delta.bias"}
    if with_bias and not missing:
        missing = [(layer, "delta.bias") for layer in range(layers) if layer not in with_bias]
    if missing:
        layer, part = missing[0]
        raise Unsupported(
            f"a biased checkpoint ({next(iter(names.values()))}): layer {layer} lacks self_attn.{part}, "
            f"{len(missing)} tensors are missing"
        )


def _read(source: Source, names: dict[Place, str]) -> dict[Place, Tensor]:
    """Tensors of the checkpoint's safetensors files, by layer and part."""
    index = cached_file(source.path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = {} if index is None else json.loads(Path(index).read_bytes())["weight_map"]
    tensors = {}
    for place, name in names.items():
        file = files.get(name) or files.get(_short(name)) or SAFE_WEIGHTS_NAME
        with safe_open(cached_file(source.path, file), framework="pt") as opened:
            own = set(opened.keys())
            tensors[place] = opened.get_tensor(name if name in own else _short(name))
    return tensors


def _short(name: str) -> str:
    """Name of the tensor in a checkpoint of the decoder without a language model head."""
    return name.removeprefix("model.")


def _check_shapes(names: dict[Place, str], tensors: dict[Place, Tensor], kv_heads: int, head_dim: int) -> None:
    right = {"A": (kv_heads,), "delta.weight": (kv_heads, kv_heads * head_dim), "delta.bias": (kv_heads,)}
    for (layer, part), tensor in tensors.items():
        if tuple(tensor.shape) != right[part]:
            raise Unsupported(
                f"{names[layer, part]}: shape {tuple(tensor.shape)}, but {kv_heads} KV heads of {head_dim} need "
                f"{right[part]}"
            )


def _attention_modules(module: nn.Module) -> dict[int, nn.Module]:
    """Attention module of each layer."""
    return {
        layer: part
        for name, part in module.named_modules()
        if name.endswith("self_attn") and isinstance(layer := getattr(part, "layer_idx", None), int)
    }
