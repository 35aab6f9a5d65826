"""Linear layers at decode, where reading the weights is all the work."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.native.library import DTYPES, LinearCall, Matrix, kernels, level

MAX_BATCH = 16
GROUP = 64
"""Inputs that share a scale where weights are int8."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """x [B, K] times weight [N, K], transposed, plus bias [N] -> [B, N], summed in fp32.

    A row's bits do not depend on its company. With scales [N, K / 64] fp32 the weight is int8. `NotImplemented` for B
    above 16, dtypes other than fp32 and bf16, K that is no multiple of 32 (64 with scales) and tensors that are not
    contiguous: `torch.nn.functional.linear` does those.
    """
    if len(x) > MAX_BATCH or x.dtype not in (torch.bfloat16, torch.float32) or not x.is_cpu or x.stride(1) != 1:
        return NotImplemented  # type: ignore[no-any-return]
    matrix = describe(weight, bias, scales, x.dtype)
    if matrix is None:
        return NotImplemented  # type: ignore[no-any-return]
    out = torch.empty((len(x), matrix.outputs), dtype=x.dtype)
    call = LinearCall(x.data_ptr(), out.data_ptr(), matrix, x.stride(0), len(x), DTYPES[x.dtype])
    kernels.keysift_linear(ctypes.byref(call), level(), num_threads())
    return out


def describe(weight: Tensor, bias: Tensor | None, scales: Tensor | None, dtype: torch.dtype) -> Matrix | None:
    """The weights of one layer for inputs of a dtype; None where the kernels are not for them.

    It points to the tensors, which have to live and stay where they are.
    """
    outputs, inputs = weight.shape
    stored, grain = (dtype, 32) if scales is None else (torch.int8, GROUP)
    parts = [(weight, stored), *(((bias, dtype),) if bias is not None else ())]
    parts += [(scales, torch.float32)] if scales is not None else []
    if inputs % grain or not all(part.dtype == kind and part.is_cpu and part.is_contiguous() for part, kind in parts):
        return None
    return Matrix(weight.data_ptr(), _pointer(scales), _pointer(bias), outputs, inputs)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
