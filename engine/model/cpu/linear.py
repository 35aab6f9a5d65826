"""Linear layers for decode on a CPU, limited by memory bandwidth at a handful of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from keysift.kvcache.ops.dispatch import UnsupportedCall

KERNEL_ROWS = 16
MAX_ROWS = 32
"""The default number of sequences in a batch; for more, reading the weights every 16 rows costs too much."""
Kernel = Callable[..., Any]
"""x [B, K] with B at most `KERNEL_ROWS`, weight [N, K], bias [N] or None -> [B, N], or `UnsupportedCall`."""


class DecodeLinear(nn.Linear):
    """An `nn.Linear` on the same weights whose few-row inputs go to the native kernel.

    The bits of a row do not depend on the other rows, nor a token on the other sequences of its batch.
    """

    def __init__(self, linear: nn.Linear, kernel: Kernel) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self._kernel = kernel

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        out = self._few_rows(input.reshape(-1, self.in_features))
        if out is None:
            return functional.linear(input, self.weight, self.bias)
        return out.view(*input.shape[:-1], self.out_features)

    def _few_rows(self, rows: Tensor) -> Tensor | None:
        """rows [B, K] -> [B, N] by the kernel, or None if it does not support them or they are too many."""
        if not 0 < len(rows) <= MAX_ROWS or torch.is_grad_enabled():
            return None
        return in_parts(self._kernel, rows, self.weight, self.bias)


def in_parts(kernel: Kernel, rows: Tensor, *weights: Tensor | None) -> Tensor | None:
    """rows [B, K] -> [B, N] in calls of at most `KERNEL_ROWS`, or None if the kernel does not support them."""
    try:
        parts = [kernel(part, *weights) for part in torch.split(rows, KERNEL_ROWS)]
    except UnsupportedCall:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def native_kernel() -> Kernel | None:
    """The native library's linear, or None if it was not built."""
    try:
        from .native import linear
    except ImportError:
        return None
    return linear


def swap_linears(module: nn.Module, kernel: Kernel) -> int:
    """Replace every plain `nn.Linear` on a CPU inside `module` and return how many; tied weights stay tied."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.device.type == "cpu"
    ]
    for parent, name, child in found:
        setattr(parent, name, DecodeLinear(child, kernel))
    return len(found)
