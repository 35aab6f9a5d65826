"""Choice of the device and the precision that a model computes in."""

from __future__ import annotations

import torch

from .errors import InvalidRequest


def choose_device(name: str) -> torch.device:
    """Device of a name; ``auto`` is CUDA where there is one. Raises `InvalidRequest` for one that is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest("device", f"auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest("device", f"one of the {torch.cuda.device_count()} CUDA devices here, got {name!r}")
    return device


def check_count(device: torch.device, ranks: int) -> None:
    """Raises `InvalidRequest` where there are fewer CUDA devices than ranks that need one each."""
    if device.type == "cuda" and ranks > (count := torch.cuda.device_count()):
        raise InvalidRequest("tensor_parallel_size", f"at most {count}, the CUDA devices here, got {ranks}")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of a name; ``auto`` is bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return torch.bfloat16
    # The oldest supported torch does not have the function.
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32
