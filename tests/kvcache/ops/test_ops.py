"""The twins of the cache's ops against plain loops."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend
from keysift.kvcache.ops.store import store
from keysift.kvcache.ops.summarize import summarize
from tests.problems import built

NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
BACKENDS = [pytest.param("reference"), pytest.param("triton", marks=NO_TRITON)]
NOT_BUILT = pytest.mark.skipif(not built("keysift.kvcache.ops.summarize.native"), reason="not built")
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
    pytest.param(2, 3, 21, id="odd"),
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


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("native", marks=NOT_BUILT)])
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


@NOT_BUILT
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "page_size", "dim"), SHAPES)
def test_summaries_of_every_instruction_set(
    dtype: torch.dtype, tolerance: float, heads: int, page_size: int, dim: int
) -> None:
    from keysift.kvcache.native.library import isas, use_isa

    k, v = (within(torch.full((6, heads, page_size, dim), torch.nan, dtype=dtype)) for _ in range(2))
    frames = torch.tensor([4, 0])
    k[frames], v[frames] = (sixteenths(2, heads, page_size, dim).to(dtype) for _ in range(2))
    k[0, 0, -1, 3] = torch.nan  # shows in all that is made of it
    expected = torch.full((6, heads, 4, dim), 7.0, dtype=dtype)
    written = [within(expected.clone()) for _ in isas()]
    with use_backend("reference"):
        summarize(expected, k, v, frames)
    for isa, summaries in zip(isas(), written, strict=True):
        with use_isa(isa), use_backend("native"):
            summarize(summaries, k, v, frames)
        torch.testing.assert_close(summaries, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert torch.equal(summaries[..., 1:3, 4:], expected[..., 1:3, 4:])


@NOT_BUILT
def test_means_of_any_numbers() -> None:
    """Added in fp32, in whatever order."""
    k, v = torch.randn(2, 1, 2, 1000, 16)
    with use_backend("native"):
        summarize(summaries := torch.empty(1, 2, 4, 16), k, v, torch.tensor([0]))
    torch.testing.assert_close(summaries[0, :, 0].double(), k[0].double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(summaries[0, :, 3].double(), v[0].double().mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NOT_BUILT), pytest.param("triton", marks=NO_TRITON)])
def test_channels_apart_are_refused(backend: Backend) -> None:
    k = torch.zeros(2, 1, 4, 16, device=device_of(backend))[..., ::2]
    with pytest.raises(BackendUnavailable, match="summarize"), use_backend(backend):
        summarize(torch.empty(2, 1, 4, 8, device=k.device), k, k, torch.tensor([1], device=k.device))


def within(part: Tensor) -> Tensor:
    """The same numbers as part of a larger tensor: only the last axis lies side by side."""
    return torch.stack([part, part], dim=-2)[..., 0, :]


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
