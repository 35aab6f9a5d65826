"""Decoder layers for decode on a CPU: two native calls around the attention instead of some forty small ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from keysift.kvcache.native import checks
from keysift.kvcache.native.calls import DTYPES, LayerInCall, LayerOutCall, Matrix
from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import kernels, level

from .linear import MAX_ROWS
from .native import describe

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Greatest relative difference, in norm, of what the two layers add to their input."""


class DecodeLayer(nn.Module):
    """A decoder layer whose few-row inputs go to the native kernels, and all others to the layer itself.

    The kernels round where the layer's modules round, and the bits of a row do not depend on the other rows. One thread
    at a time may run it.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Raises `ValueError` if the layer is not of the Llama kind, or the kernels do not support its weights."""
        super().__init__()
        self.layer = layer
        found: Any = layer
        _check_parts(found)
        attention, mlp = found.self_attn, found.mlp
        norms = (found.input_layernorm, found.post_attention_layernorm)
        self._layer_idx, self._dim = attention.layer_idx, attention.head_dim
        self._width, self._dtype = norms[0].weight.shape[0], norms[0].weight.dtype
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        to_q, to_k, to_v, to_out = (_matrix(linear, self._dtype) for linear in linears)
        gate, up, down = (_matrix(linear, self._dtype) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self._heads, self._kv_heads = to_q.outputs // self._dim, to_k.outputs // self._dim
        first, second = ({"norm": norm.weight, "eps": norm.variance_epsilon} for norm in norms)
        common = {"x": None, "batch": 0, "type": DTYPES[self._dtype]}  # None and 0: set by each call
        rotation = {"cos": None, "sin": None, "q": None, "k": None, "v": None, "dim": self._dim}
        self._in = LayerInCall.pack(**common, **first, **rotation, to_q=to_q, to_k=to_k, to_v=to_v)
        matrices = {"to_out": to_out, "gate": gate, "up": up, "down": down}
        self._out = LayerOutCall.pack(**common, **second, attended=None, out=None, **matrices)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the layer that a model reads, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [1, T, C] -> [1, T, C], as the layer's own."""
        attend, turns = kwargs.get("attend"), kwargs.get("position_embeddings")
        few = hidden_states.shape[-2] <= MAX_ROWS and hidden_states.dtype == self._dtype
        if not few or attend is None or turns is None or kwargs.get("observe") or torch.is_grad_enabled():
            return self.layer(hidden_states, *args, **kwargs)
        x = hidden_states.reshape(-1, self._width).contiguous()
        q, k, v = self._project(x, *(turn.reshape(-1, self._dim).contiguous() for turn in turns))
        return self._finish(x, attend(self._layer_idx, q, k, v).contiguous()).view_as(hidden_states)

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, C], cos and sin [T, D] -> q [T, Hq, D], k and v [T, Hkv, D]; q and k rotated."""
        q = x.new_empty(len(x), self._heads, self._dim)
        k, v = (x.new_empty(len(x), self._kv_heads, self._dim) for _ in range(2))
        call = self._in
        call.x, call.cos, call.sin, call.batch = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), len(x)
        call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if checks.mode.on:
            checks.check(call, {"x": x, "cos": cos, "sin": sin, "q": q, "k": k, "v": v})
        kernels.keysift_layer_in(call, level(), num_threads())
        return q, k, v

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [T, C] and the output of its attention [T, Hq, D] -> [T, C]."""
        out, call = torch.empty_like(x), self._out
        call.x, call.attended, call.out, call.batch = x.data_ptr(), attended.data_ptr(), out.data_ptr(), len(x)
        if checks.mode.on:
            checks.check(call, {"x": x, "attended": attended, "out": out})
        kernels.keysift_layer_out(call, level(), num_threads())
        return out


def swap_layers(module: nn.Module) -> int:
    """Replace every decoder layer that the kernels reproduce, and return their number."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if {part for part, _ in child.named_children()} == PARTS
    ]
    swapped = 0
    for parent, name, child in found:
        try:
            fast = DecodeLayer(child)
        except ValueError:
            continue
        if _agree(fast):
            setattr(parent, name, fast)
            swapped += 1
    return swapped


def _check_parts(layer: Any) -> None:
    for module, parts in ((layer, PARTS), (layer.self_attn, ATTENTION), (layer.mlp, MLP)):
        if {name for name, _ in module.named_children()} != parts:
            raise ValueError(f"{type(module).__name__}: other parts than {', '.join(sorted(parts))}")
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        if not hasattr(norm, "variance_epsilon") or norm.weight.dtype not in TOLERANCE or not norm.weight.is_cpu:
            raise ValueError(f"{type(norm).__name__}: not an RMS norm in float32 or bfloat16 on a CPU")
    if not isinstance(getattr(layer.self_attn, "layer_idx", None), int) or not hasattr(layer.self_attn, "head_dim"):
        raise ValueError(f"{type(layer.self_attn).__name__}: has no layer index or head size")


def _matrix(linear: Any, dtype: torch.dtype) -> Matrix:
    weight, bias = linear.weight, linear.bias
    matrix = describe(weight, bias, getattr(linear, "scales", None), dtype)
    if matrix is None:
        raise ValueError(f"{type(linear).__name__}: weights that the kernels do not support")
    return matrix


def _agree(fast: DecodeLayer) -> bool:
    """Compare both on random input, which shows whatever else a layer does, such as another activation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, fast._width, generator=generator).to(fast._dtype)
    angles = torch.rand(1, 3, fast._dim // 2, generator=generator).repeat(1, 1, 2)
    turns = angles.cos().to(fast._dtype), angles.sin().to(fast._dtype)
    options = {"position_embeddings": turns, "attend": _mix, "attention_mask": None}
    try:
        with torch.inference_mode():
            expected, got = fast.layer(x, **options), fast(x, **options)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return False
    change = (expected - x).float().norm()
    return bool((expected - got).float().norm() <= TOLERANCE[fast._dtype] * change)


def _mix(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A stand-in for attention that depends on all three."""
    group = q.shape[1] // k.shape[1]
    return q + (k - v).repeat_interleave(group, 1)
