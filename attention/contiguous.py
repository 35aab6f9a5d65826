"""Dense attention of a prompt chunk by kernels that take contiguous keys and values: torch's SDPA and flash-attn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keysift.kvcache import CacheSpec, Context, Phase, Selection

DenseKernel = Literal["paged", "sdpa", "flash-attn"]
"""Kernel for prompt chunks that read every page; `paged` is the op that sparse selections use, too."""

MAX_HEAD_DIM = 256
"""Largest head dim that both kernels support on CUDA."""
MIN_FLASH_ATTN = (2, 1)
"""First flash-attn with the causal mask aligned to the last query and key; it was aligned to the first ones before."""


def suits(context: Context, selection: Selection, window: int) -> bool:
    """True for a prompt chunk that reads every page, outside of windows, on a tier that holds all of them.

    A tier that fetches pages would need memory for a layer's keys twice: for the pages, and for the contiguous copy.
    """
    prompt = context.step.phase is Phase.PREFILL
    return prompt and selection.complete and not window and context.tier.steady


def contiguous_attention(q: Tensor, context: Context, kernel: DenseKernel) -> Tensor:
    """Causal attention of q [T, Hq, D], a chunk of one prompt, over all keys up to its own -> [T, Hq, D], contiguous.

    Returns no log-sum-exp: a complete selection has nothing to merge or to measure. Allocates a copy of one layer's
    keys and values of the sequence, 2 * Hkv * K * D numbers, and on a CPU a mask of T * K bytes; no memory budget
    includes them.
    """
    k, v = gather(context)
    return KERNELS[kernel](q, k, v, context.spec.softmax_scale).contiguous()


def gather(context: Context) -> tuple[Tensor, Tensor]:
    """Keys and values [Hkv, K, D] of the prompt so far, copied from its pages without the unused slots of the last."""
    (span,) = context.step.spans
    frames = context.fetch(context.all())
    table = frames.table[0].long()  # [Hkv, F], the same for every row
    heads = torch.arange(len(table), device=table.device)[:, None]
    k, v = (pages[table, heads].flatten(1, 2)[:, : span.stop] for pages in (frames.k, frames.v))
    return k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`scaled_dot_product_attention` of q [T, Hq, D] over k, v [Hkv, K, D] -> [T, Hq, D], causal from the last key."""
    tokens, keys = len(q), k.shape[1]
    # `is_causal` aligns the first query to the first key, which is right for the first chunk of a prompt alone.
    bias = None if tokens == keys else _causal_mask(tokens, keys, q.device)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], bias, is_causal=bias is None, scale=scale, enable_gqa=True
    )  # [1, Hq, T, D]
    return out[0].transpose(0, 1)


def _causal_mask(tokens: int, keys: int, device: torch.device) -> Tensor:
    """Causal mask [T, K] that aligns the last query to the last key; on CUDA a lazy one, not materialized."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(tokens, keys)
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril_(keys - tokens)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`flash_attn_func`, whose layout is [B, T, H, D]; arguments and result as for `_sdpa`."""
    from flash_attn import flash_attn_func

    k, v = (tensor.transpose(0, 1)[None] for tensor in (k, v))
    out: Tensor = flash_attn_func(q[None], k, v, softmax_scale=scale, causal=True)
    return out[0]


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {"sdpa": _sdpa, "flash-attn": _flash_attn}


def obstacle(kernel: DenseKernel, spec: CacheSpec, device: torch.device) -> str | None:
    """Reason why the kernel cannot run on this cache and device, or None.

    On CUDA, sdpa has the limits of its flash backend: any other backend would materialize all scores [Hq, T, K].
    """
    if kernel == "paged" or (kernel == "sdpa" and device.type == "cpu"):
        return None
    if device.type != "cuda":
        return f"{kernel} takes a CUDA device, got {device.type}"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"{kernel} takes float16 or bfloat16 on CUDA, got {str(spec.dtype).removeprefix('torch.')}"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"{kernel} takes a head dim of at most {MAX_HEAD_DIM} on CUDA, got {spec.head_dim}"
    if (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"{kernel} takes a GPU of compute capability 8.0 or more, got {found[0]}.{found[1]}"
    return _package_obstacle() if kernel == "flash-attn" else None


def _package_obstacle() -> str | None:
    """Reason why the installed flash-attn package cannot be used, or None."""
    try:
        import flash_attn
    except ImportError as error:  # a build for another torch raises it, too
        return f"flash-attn takes its package (pip install 'keysift[flash-attn]'), got none that loads: {error}"
    major, minor = (int(part) for part in flash_attn.__version__.split(".")[:2])
    if (major, minor) < MIN_FLASH_ATTN:
        oldest = ".".join(map(str, MIN_FLASH_ATTN))
        return f"flash-attn takes its package from {oldest} on, got {flash_attn.__version__}"
    return None
