"""Linear layers at decode, where reading the weights is all the work."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cores import num_threads
from .library import DTYPES, LinearCall, kernels, level

MAX_BATCH = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, K] times weight [N, K], transposed, plus bias [N] -> [B, N], summed in fp32.

    A row's bits do not depend on its company. `NotImplemented` for B above 16, dtypes other than fp32 and bf16, K that
    is no multiple of 32 and tensors that are not contiguous: `torch.nn.functional.linear` does those.
    """
    batch, inputs = x.shape
    if batch > MAX_BATCH or inputs % 32 or not _fit(x, weight, bias):
        return NotImplemented  # type: ignore[no-any-return]
    outputs = weight.shape[0]
    out = torch.empty((batch, outputs), dtype=x.dtype)
    call = LinearCall(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        batch,
        outputs,
        inputs,
        DTYPES[x.dtype],
    )
    kernels.keysift_linear(ctypes.byref(call), level(), num_threads())
    return out


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    dtype = x.dtype
    return (
        (dtype == torch.bfloat16 or dtype == torch.float32)
        and weight.dtype == dtype
        and x.is_cpu
        and weight.is_cpu
        and x.stride(1) == 1
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == dtype and bias.is_contiguous()))
    )
