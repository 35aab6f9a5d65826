"""The native linear layer for the few rows of decode, limited by reading the weights once."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.kvcache.native.calls import DTYPES, LinearCall, Matrix
from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import kernels, level
from keysift.kvcache.ops.dispatch import UnsupportedCall

MAX_BATCH = 16
GROUP = 64
"""Inputs that share a scale where weights are int8."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """x [B, K] times weight [N, K], transposed, plus bias [N] -> [B, N], summed in fp32.

    A row's bits do not depend on the other rows. With scales [N, K / 64] fp32 the weight is int8. `UnsupportedCall` for
    B above 16, dtypes other than fp32 and bf16, K that is no multiple of 32 (64 with scales) and tensors that are not
    contiguous: `torch.nn.functional.linear` does those.
    """
    if len(x) > MAX_BATCH or x.dtype not in (torch.bfloat16, torch.float32) or not x.is_cpu or x.stride(1) != 1:
        raise UnsupportedCall
    matrix = describe(weight, bias, scales, x.dtype)
    if matrix is None:
        raise UnsupportedCall
    out = torch.empty((len(x), matrix.outputs), dtype=x.dtype)
    call = LinearCall.pack(x=x, out=out, matrix=matrix, batch=len(x), type=DTYPES[x.dtype])
    kernels.keysift_linear(call, level(), num_threads())
    return out


def describe(weight: Tensor, bias: Tensor | None, scales: Tensor | None, dtype: torch.dtype) -> Matrix | None:
    """The weights of one layer for inputs of a dtype; None if the kernels do not support them.

    It holds the addresses of the tensors, which the caller keeps alive.
    """
    outputs, inputs = weight.shape
    stored, grain = (dtype, 32) if scales is None else (torch.int8, GROUP)
    parts = (weight, stored), (bias, dtype), (scales, torch.float32)
    if inputs % grain or not all(part is None or _is_plain(part, kind) for part, kind in parts):
        return None
    matrix: Matrix = Matrix.pack(weight=weight, scales=scales, bias=bias, outputs=outputs, inputs=inputs)
    return matrix


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()
