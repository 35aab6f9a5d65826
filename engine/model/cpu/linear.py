"""Linear layers for decoding on a CPU, where a handful of tokens leaves the memory bus as the only limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

KERNEL_ROWS = 16
MAX_ROWS = 32
"""As many sequences as decode at once by default; for more, reading the weights every 16 rows costs too much."""
Kernel = Callable[..., Any]
"""x [B, K] with B at most `KERNEL_ROWS`, weight [N, K], bias [N] or None -> [B, N], or `NotImplemented`."""


class DecodeLinear(nn.Linear):
    """An `nn.Linear` on the same weights whose few-row inputs go to the native kernel.

    The kernel computes a row alike whatever the other rows are, so a token does not depend on who is decoded beside it.
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
        """rows [B, K] -> [B, N], or None for more of them, or a case, that the kernel is not for."""
        if not 0 < len(rows) <= MAX_ROWS or torch.is_grad_enabled():
            return None
        parts = [self._kernel(part, self.weight, self.bias) for part in torch.split(rows, KERNEL_ROWS)]
        if any(part is NotImplemented for part in parts):
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def native_kernel() -> Kernel | None:
    """The native library's linear, or None where it was not built."""
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
