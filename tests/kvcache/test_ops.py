"""The twins of the cache's ops against plain loops."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from keysift.kvcache.ops import use_backend
from keysift.kvcache.ops.dispatch import Backend
from keysift.kvcache.ops.store import store
from keysift.kvcache.ops.summarize import summarize

NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
BACKENDS = [pytest.param("reference"), pytest.param("triton", marks=NO_TRITON)]
DTYPES = [
    pytest.param(torch.float32, 1e-6, id="fp32"),
    pytest.param(torch.bfloat16, 0.0, id="bf16"),
    pytest.param(torch.float16, 0.0, id="fp16"),
]
SHAPES = [
    pytest.param(2, 4, 16, id="plain"),
    pytest.param(3, 16, 64, id="three-heads"),
    pytest.param(1, 1, 8, id="pages-of-one"),
    pytest.param(5, 6, 40, id="no-power-of-two"),
]


def device_of(backend: Backend) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "page_size", "dim"), SHAPES)
def test_store_writes_the_slots_and_nothing_else(
    backend: Backend, dtype: torch.dtype, heads: int, page_size: int, dim: int
) -> None:
    device = device_of(backend)
    cache = torch.randn(2, 9, heads, page_size, dim, device=device).to(dtype)
    packed = torch.randn(5, 3, heads, dim, device=device).to(dtype)  # q, k and v of one projection
    slots = torch.randperm(9 * page_size)[:5].to(device)
    expected = cache.clone()
    for token, slot in enumerate(slots.tolist()):
        for side in (0, 1):
            expected[side, slot // page_size, :, slot % page_size] = packed[token, 1 + side]
    with use_backend(backend):
        store(cache[0], cache[1], packed[:, 1], packed[:, 2], slots)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "page_size", "dim"), SHAPES)
def test_summarize_writes_the_listed_frames_and_nothing_else(
    backend: Backend, dtype: torch.dtype, tolerance: float, heads: int, page_size: int, dim: int
) -> None:
    device = device_of(backend)
    k, v = (sixteenths(6, heads, page_size, dim).to(device, dtype) for _ in range(2))
    k[5] = torch.nan
    summaries = torch.full((6, heads, 4, dim), torch.nan, device=device, dtype=dtype)
    expected = summaries.clone()
    for frame in (4, 0):
        for head in range(heads):
            rows = k[frame, head]
            expected[frame, head] = torch.stack([mean(rows), *extremes(rows), mean(v[frame, head])])
    with use_backend(backend):
        summarize(summaries, k, v, torch.tensor([4, 0], device=device))
    torch.testing.assert_close(summaries, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def sixteenths(*shape: int) -> Tensor:
    """Numbers whose sums are exact in fp32, so that a mean has one right rounding."""
    return torch.randint(-64, 65, shape) / 16


def mean(rows: Tensor) -> Tensor:
    """[S, D] -> [D], added in fp64 and rounded once."""
    return (sum(rows.double(), start=torch.zeros(rows.shape[1]).to(rows.device)) / len(rows)).to(rows.dtype)


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    least = greatest = rows[0]
    for row in rows[1:]:
        least, greatest = torch.minimum(least, row), torch.maximum(greatest, row)
    return least, greatest
