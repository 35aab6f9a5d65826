"""Linear layers with int8 weights: half of the memory, and half of the reads of a generated token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .linear import MAX_ROWS, in_parts, native_kernel

GROUP = 64
"""Inputs that share a scale."""
LARGEST = 127


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> int8 [N, K] and scales [N, K / 64] fp32, so that weight is nearly int8 * scale.

    Rounds to nearest, symmetrically. Scales are bfloat16 numbers, rounded up so that none of the weights is cut off:
    prompts, which multiply in bfloat16, and generated tokens then mean the same weights.
    """
    groups = weight.float().view(len(weight), -1, GROUP)  # [N, K / 64, 64]
    least = groups.abs().amax(-1) / LARGEST
    scales = least.bfloat16()
    scales = torch.where(scales.float() < least, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)
    scales = scales.float().clamp(min=torch.finfo(torch.bfloat16).tiny)
    return (groups / scales[..., None]).round().to(torch.int8).flatten(1), scales


class Int8Linear(nn.Module):
    """An `nn.Linear` with int8 weights: the native kernel multiplies few rows; for more, the weights are widened."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        weight, scales = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self._kernel = native_kernel()

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        out = self._few_rows(input.reshape(-1, self.in_features))
        if out is None:
            return functional.linear(input, self.widened(), self.bias)
        return out.view(*input.shape[:-1], self.out_features)

    def widened(self) -> Tensor:
        """[N, K] in the layer's dtype."""
        groups = self.weight.view(self.out_features, -1, GROUP)
        wide = torch.float32 if self.dtype == torch.float16 else self.dtype  # float16 has no scales of small weights
        widened = groups * self.scales.to(wide)[..., None]
        return widened.flatten(1).to(self.dtype)

    def _few_rows(self, rows: Tensor) -> Tensor | None:
        """rows [B, K] -> [B, N] by the kernel, or None if it does not support them or they are too many."""
        if self._kernel is None or not 0 < len(rows) <= MAX_ROWS:
            return None
        return in_parts(self._kernel, rows, self.weight, self.bias, self.scales)


def swap_linears(module: nn.Module) -> int:
    """Replace every linear layer of `module` whose inputs come in whole groups, and return how many.

    An embedding that shared its weights with one of them keeps them, so its vectors are not rounded.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child.in_features % GROUP == 0
    ]
    for parent, name, child in found:
        setattr(parent, name, Int8Linear(child))
    return len(found)
