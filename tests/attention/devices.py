"""Detection of waits for a GPU, without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

MAKERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
MOVERS = (Tensor.to, Tensor.copy_, Tensor.__setitem__)


class NoWaiting(TorchFunctionMode):
    """Context in which tensors on the device ``meta`` claim to be on a GPU, and operations that wait for one raise.

    Meta tensors hold no data, so that reading them fails by itself. Copying host tensors or numbers to them fails here,
    unless the copy is non-blocking.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors) and not kwargs.get("non_blocking"):
            sent = [tensor for tensor in tensors if tensor.is_cpu and (tensor.ndim or func in MOVERS)]
            assert not sent, f"{func.__name__} sends a tensor and waits for the copy"
            assert func not in MAKERS, f"{func.__name__} sends numbers and waits for the copy"
        return result
