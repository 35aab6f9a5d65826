"""Dense attention of a prompt's chunk by kernels that know no pages: they get keys and values in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keysift.kvcache import CacheSpec, Context, Phase, Selection

DenseKernel = Literal["paged", "sdpa", "flash-attn"]
"""What runs where a prompt's chunk reads everything; `paged` is the op that sparse selections take too."""

LARGEST_HEAD = 256
"""Channels of a head that both kernels take on CUDA."""
OLDEST = (2, 1)
"""The flash-attn that first let the last query see the last key; before, the first query saw only the first key."""


def suits(context: Context, selection: Selection, window: int) -> bool:
    """Every query of a prompt's chunk reads all that comes before it, and the tier has all of that at hand.

    A tier that fetches pages would have to make room for a layer's keys twice: for the pages, and for the copy.
    """
    prompt = context.step.phase is Phase.PREFILL
    return prompt and selection.complete and not window and context.tier.steady


def contiguous_attention(q: Tensor, context: Context, kernel: DenseKernel) -> Tensor:
    """Causal attention of q [T, Hq, D], a chunk of one prompt, over all keys up to its own -> [T, Hq, D], contiguous.

    There is no log-sum-exp: nothing is left to merge, and nobody counts what a complete selection kept. Takes a copy of
    the sequence's keys and values of one layer, 2 * Hkv * K * D numbers, until it returns, and on a CPU a mask of T * K
    bytes; no budget counts them.
    """
    k, v = gather(context)
    return KERNELS[kernel](q, k, v, context.spec.softmax_scale).contiguous()


def gather(context: Context) -> tuple[Tensor, Tensor]:
    """Keys and values [Hkv, K, D] of the prompt so far, copied from its pages.

    What lies behind the last token of its page may be anything, and stays out of sight.
    """
    (span,) = context.step.spans
    frames = context.fetch(context.all())
    table = frames.table[0].long()  # [Hkv, F]: every row's is the same
    heads = torch.arange(len(table), device=table.device)[:, None]
    k, v = (pages[table, heads].flatten(1, 2)[:, : span.stop] for pages in (frames.k, frames.v))
    return k, v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's own. q [T, Hq, D], k and v [Hkv, K, D] -> [T, Hq, D]; the last query stands at the last key."""
    tokens, keys = len(q), k.shape[1]
    # Its `is_causal` has the first query at the first key, which is right for a prompt's first chunk alone.
    bias = None if tokens == keys else _behind(tokens, keys, q.device)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], bias, is_causal=bias is None, scale=scale, enable_gqa=True
    )  # [1, Hq, T, D]
    return out[0].transpose(0, 1)


def _behind(tokens: int, keys: int, device: torch.device) -> Tensor:
    """The mask [T, K] of queries at the end of their keys; on CUDA only its name, which the kernel knows."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(tokens, keys)
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril_(keys - tokens)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The package's, whose layout is [B, T, H, D]; arguments and result as for `_sdpa`."""
    from flash_attn import flash_attn_func

    k, v = (tensor.transpose(0, 1)[None] for tensor in (k, v))
    out: Tensor = flash_attn_func(q[None], k, v, softmax_scale=scale, causal=True)
    return out[0]


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {"sdpa": _sdpa, "flash-attn": _flash_attn}


def obstacle(kernel: DenseKernel, spec: CacheSpec, device: torch.device) -> str | None:
    """Why the kernel cannot run here; None: it can.

    On CUDA torch's is held to what its flash kernel takes: any other would write out all scores [Hq, T, K].
    """
    if kernel == "paged" or (kernel == "sdpa" and device.type == "cpu"):
        return None
    if device.type != "cuda":
        return f"{kernel} takes a CUDA device, got {device.type}"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"{kernel} takes float16 or bfloat16 on CUDA, got {str(spec.dtype).removeprefix('torch.')}"
    if spec.head_dim > LARGEST_HEAD:
        return f"{kernel} takes a head dim of at most {LARGEST_HEAD} on CUDA, got {spec.head_dim}"
    if (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"{kernel} takes a GPU of compute capability 8.0 or more, got {found[0]}.{found[1]}"
    return _missing() if kernel == "flash-attn" else None


def _missing() -> str | None:
    """What is wrong with the package flash-attn, if anything is."""
    try:
        import flash_attn
    except ImportError as error:  # of a build for another torch, too
        return f"flash-attn takes its package (pip install 'keysift[flash-attn]'), got none that loads: {error}"
    major, minor = (int(part) for part in flash_attn.__version__.split(".")[:2])
    if (major, minor) < OLDEST:
        return f"flash-attn takes its package from {'.'.join(map(str, OLDEST))} on, got {flash_attn.__version__}"
    return None
