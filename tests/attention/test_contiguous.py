"""Kernels over contiguous keys and values: results, steps that use them, and obstacles."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keysift.attention import Dense, DenseKernel, Strategy, Telemetry, attend, bind, make
from keysift.attention.contiguous import KERNELS, _causal_mask, obstacle, suits
from keysift.kvcache import CacheSpec, DeviceTier, PagedCache, Phase, Span
from keysift.kvcache.ops import use_backend
from tests.tiers import in_memory, offloaded

from .devices import NoWaiting

PAGE, ROW, DIM = 4, 8, 16
FRAMES, MAX_LEN = 64, 128
SCALE = 0.37
"""Differs from the default of every kernel."""
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Chunk:
    """`tokens` of a prompt after `start` others."""

    start: int
    tokens: int
    heads: tuple[int, int] = (4, 2)
    dtype: torch.dtype = torch.float32
    spec: dict[str, Any] = field(default_factory=dict)


FIRST, LATER = Chunk(0, 24), Chunk(40, 21)
CHUNKS = {
    "at the start": FIRST,
    "at the start, within a page": Chunk(0, 13),
    "one token": Chunk(0, 1),
    "one token after a page": Chunk(4, 1),
    "after one page": Chunk(4, 16),
    "after many pages": Chunk(64, 24),
    "within a page": LATER,
    "as many heads": Chunk(16, 13, heads=(3, 3)),
    "groups of three": Chunk(16, 13, heads=(9, 3)),
    "groups of four": Chunk(16, 13, heads=(8, 2)),
    "one KV head": Chunk(16, 13, heads=(4, 1)),
    "bfloat16": Chunk(40, 21, dtype=torch.bfloat16),
    "bfloat16 at the start": Chunk(0, 13, dtype=torch.bfloat16),
    "float16": Chunk(40, 21, dtype=torch.float16),
    "a bias in the last channels": Chunk(40, 21, spec={"bias_channels": 8, "scale": None}),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran, the paged op among them."""
    ran: list[str] = []

    def recorded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            ran.append(name)
            return kernel(*args, **options)

        return run

    monkeypatch.setattr(attend, "paged_attention", recorded("paged", attend.paged_attention))
    for name, kernel in KERNELS.items():
        monkeypatch.setitem(KERNELS, name, recorded(name, kernel))
    return ran


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """flash-attn with its documented semantics, in float64."""
    module = types.ModuleType("flash_attn")
    module.__dict__.update(flash_attn_func=flash_attn_func, __version__="2.7.4.post1")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """q [B, T, Hq, D], k and v [B, K, Hkv, D] -> [B, T, Hq, D]; causal: query i sees key j <= i + K - T."""
    assert dropout_p == 0
    assert window_size == (-1, -1)
    assert all(tensor.dim() == 4 and tensor.stride(-1) == 1 for tensor in (q, k, v))
    batch, tokens, heads, dim = q.shape
    assert k.shape == v.shape
    assert (k.shape[0], k.shape[3]) == (batch, dim)
    assert heads % k.shape[2] == 0
    out = torch.empty(q.shape, dtype=torch.float64)
    for each, i, head in torch.cartesian_prod(*map(torch.arange, (batch, tokens, heads))).tolist():
        seen, kv_head = i + k.shape[1] - tokens + 1 if causal else k.shape[1], head // (heads // k.shape[2])
        scores = k[each, :seen, kv_head].double() @ q[each, i, head].double() * (softmax_scale or dim**-0.5)
        out[each, i, head] = scores.softmax(0) @ v[each, :seen, kv_head].double()
    return out.to(q.dtype)


def cache_of(chunk: Chunk = LATER, device: str = "cpu", **spec: Any) -> PagedCache:
    """A cache whose slots all hold NaN."""
    shape = {"num_layers": 1, "num_kv_heads": chunk.heads[1], "head_dim": DIM, "page_size": PAGE, "dtype": chunk.dtype}
    sized = CacheSpec(**{**shape, "scale": SCALE, **chunk.spec, **spec})
    cache = PagedCache(sized, FRAMES, max_sequences=4, max_len=MAX_LEN, device=device)
    assert isinstance(cache.tier, DeviceTier)
    for slots in (cache.tier.k, cache.tier.v):
        slots.fill_(torch.nan)
    return cache


def scattered(cache: PagedCache, tokens: int) -> int:
    """A sequence whose frames are out of order, interleaved with another's."""
    ours, others = cache.open(), [cache.open(), cache.open()]
    cache.reserve(others[0], 5 * PAGE)
    cache.reserve(others[1], 3 * PAGE)
    cache.release(others[0])
    for pages in range(1, cache.spec.pages_for(tokens) + 1):
        cache.reserve(ours, min(pages * PAGE, tokens))
        cache.reserve(others[1], (3 + pages // 2) * PAGE)
    frames = cache._frames[ours]
    assert len(frames) < 3 or frames != list(range(frames[0], frames[0] + len(frames)))
    return ours


def make_qkv(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the whole prompt, as slices of a fused projection."""
    heads, kv_heads = chunk.heads
    packed = torch.randn(chunk.start + chunk.tokens, heads + 2 * kv_heads, DIM).to(chunk.dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], 1)
    return 2 * q, k, v


def run(
    cache: PagedCache,
    chunk: Chunk,
    data: Sequence[Tensor],
    kernel: DenseKernel,
    strategy: Strategy | None = None,
    telemetry: bool = False,
) -> Tensor:
    """Output [T, Hq, D] of the chunk's queries, with the tokens before it cached."""
    sequence = scattered(cache, chunk.start + chunk.tokens)
    if chunk.start:
        before = cache.prefill(Span(sequence, 0, chunk.start), ROW)
        cache.append(0, *(part[: chunk.start] for part in data[1:]), before)
    step = cache.prefill(Span(sequence, chunk.start, chunk.tokens), ROW)
    record = Telemetry(cache.spec, step) if telemetry else None
    with torch.inference_mode():
        out = bind(strategy or Dense(), cache, step, record, dense_kernel=kernel)(
            0, *(part[chunk.start :] for part in data)
        )
    if record is not None:
        (reads,) = record.reads()
        assert reads.density == 1.0
        assert reads.bytes > 0
        (kept,) = record.coverage([reads])
        assert (kept.mean, kept.least) == (1.0, 1.0)
    return out


def reference(chunk: Chunk, data: Sequence[Tensor], scale: float, window: int = 0) -> Tensor:
    """Causal softmax attention in float64, one query and head at a time."""
    q, k, v = (part.double() for part in data)
    out = torch.empty(chunk.tokens, chunk.heads[0], DIM, dtype=torch.float64)
    for token in range(chunk.tokens):
        position = chunk.start + token
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        for head in range(chunk.heads[0]):
            kv_head = head * chunk.heads[1] // chunk.heads[0]
            weights = torch.exp((k[seen, kv_head] @ q[position, head]) * scale)
            out[token, head] = weights @ v[seen, kv_head] / weights.sum()
    return out


@pytest.mark.parametrize("kernel", ["sdpa", "flash-attn"])
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.usefixtures("package")
def test_kernels_compute_causal_attention(chunk: Chunk, kernel: DenseKernel, ran: list[str]) -> None:
    data, cache = make_qkv(chunk), cache_of(chunk)
    out = run(cache, chunk, data, kernel)
    assert ran == [kernel]
    assert out.is_contiguous()
    assert out.dtype == chunk.dtype
    expected = reference(chunk, data, cache.spec.softmax_scale)
    torch.testing.assert_close(out.double(), expected, rtol=CLOSE[chunk.dtype], atol=CLOSE[chunk.dtype])


@pytest.mark.parametrize("chunk", [FIRST, LATER], ids=["at the start", "after others"])
def test_sdpa_equals_the_paged_op_and_is_deterministic(chunk: Chunk, ran: list[str]) -> None:
    data = make_qkv(chunk)
    op, one, two = (run(cache_of(chunk), chunk, data, kernel) for kernel in ("paged", "sdpa", "sdpa"))
    assert ran == ["paged", "sdpa", "sdpa"]
    torch.testing.assert_close(one, op, rtol=2e-6, atol=2e-6)
    assert torch.equal(one, two)


def test_telemetry_counts_every_page_as_read(ran: list[str]) -> None:
    run(cache_of(), LATER, make_qkv(LATER), "sdpa", telemetry=True)
    assert ran == ["sdpa"]


@pytest.mark.parametrize("name", ["streaming", "flexprefill", "sift"])
def test_a_strategy_that_falls_back_to_dense_uses_the_kernel(name: str, ran: list[str]) -> None:
    length = LATER.start + LATER.tokens
    strategy = make(name, dense_below=length).at(Phase.PREFILL, length, LATER.tokens)
    data = make_qkv(LATER)
    out = run(cache_of(), LATER, data, "sdpa", strategy)
    assert ran == ["sdpa"]
    torch.testing.assert_close(out.double(), reference(LATER, data, SCALE), rtol=2e-6, atol=2e-6)


def test_sparse_selections_use_the_paged_op(ran: list[str]) -> None:
    data, strategy = make_qkv(LATER), make("streaming", sink=4, window=8)
    out, expected = (run(cache_of(), LATER, data, kernel, strategy) for kernel in ("sdpa", "paged"))
    assert ran == ["paged", "paged"]
    assert torch.equal(out, expected)


def test_layers_with_a_window_use_the_paged_op(ran: list[str]) -> None:
    data = make_qkv(LATER)
    out = run(cache_of(windows=(10,)), LATER, data, "sdpa")
    assert ran == ["paged"]
    torch.testing.assert_close(out.double(), reference(LATER, data, SCALE, window=10), rtol=2e-6, atol=2e-6)


def test_a_window_over_every_page_uses_the_paged_op() -> None:
    cache = cache_of()
    cache.reserve(sequence := cache.open(), 8)
    context = cache.context(0, cache.prefill(Span(sequence, 0, 8), ROW))
    assert suits(context, context.all(), window=0)
    assert not suits(context, context.all(), window=100)


def test_decode_steps_use_the_paged_op(ran: list[str]) -> None:
    cache, data = cache_of(), make_qkv(LATER)
    sequence = scattered(cache, len(data[0]))
    cache.append(0, *(part[:-1] for part in data[1:]), cache.prefill(Span(sequence, 0, len(data[0]) - 1), ROW))
    step = cache.decode([Span(sequence, len(data[0]) - 1, 1)])
    bind(Dense(), cache, step, dense_kernel="sdpa")(0, *(part[-1:] for part in data))
    assert ran == ["paged"]


def test_offloaded_pages_use_the_paged_op(ran: list[str]) -> None:
    spec = CacheSpec(num_layers=1, num_kv_heads=2, head_dim=DIM, page_size=PAGE, scale=SCALE)
    cache, data = offloaded(in_memory, slots=12, staged=16)(spec), make_qkv(FIRST)
    cache.reserve(sequence := cache.open(), FIRST.tokens)
    out = bind(Dense(), cache, cache.prefill(Span(sequence, 0, FIRST.tokens), ROW), dense_kernel="sdpa")(0, *data)
    assert set(ran) == {"paged"}
    torch.testing.assert_close(out.double(), reference(FIRST, data, SCALE), rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("chunk", [FIRST, LATER], ids=["at the start", "after others"])
def test_sdpa_does_not_wait_for_the_device(chunk: Chunk, ran: list[str]) -> None:
    cache = cache_of(chunk, device="meta")
    cache.reserve(sequence := cache.open(), chunk.start + chunk.tokens)
    attend = bind(Dense(), cache, cache.prefill(Span(sequence, chunk.start, chunk.tokens), ROW), dense_kernel="sdpa")
    given = [part[chunk.start :].to("meta") for part in make_qkv(chunk)]
    with NoWaiting(), use_backend("reference"):
        out = attend(0, *given)
    assert ran == ["sdpa"]
    assert out.shape == given[0].shape


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPEC = CacheSpec(num_layers=1, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
FLOATS = CacheSpec(num_layers=1, num_kv_heads=2, head_dim=128, dtype=torch.float32)
WIDE = CacheSpec(num_layers=1, num_kv_heads=2, head_dim=272, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kernel", "spec", "device", "capability", "problem"),
    [
        ("paged", FLOATS, CUDA, (7, 0), None),
        ("sdpa", FLOATS, CPU, (9, 0), None),
        ("sdpa", WIDE, CPU, (9, 0), None),
        ("sdpa", SPEC, CUDA, (8, 0), None),
        ("flash-attn", SPEC, CUDA, (9, 0), None),
        ("flash-attn", SPEC, CPU, (9, 0), "flash-attn takes a CUDA device, got cpu"),
        ("sdpa", SPEC, torch.device("mps"), (9, 0), "sdpa takes a CUDA device, got mps"),
        ("sdpa", FLOATS, CUDA, (9, 0), "sdpa takes float16 or bfloat16 on CUDA, got float32"),
        ("flash-attn", FLOATS, CUDA, (9, 0), "flash-attn takes float16 or bfloat16 on CUDA, got float32"),
        ("flash-attn", WIDE, CUDA, (9, 0), "flash-attn takes a head dim of at most 256 on CUDA, got 272"),
        ("flash-attn", SPEC, CUDA, (7, 5), "flash-attn takes a GPU of compute capability 8.0 or more, got 7.5"),
    ],
)
@pytest.mark.usefixtures("package")
def test_obstacle_names_the_unsupported_property(
    kernel: DenseKernel,
    spec: CacheSpec,
    device: torch.device,
    capability: tuple[int, int],
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert obstacle(kernel, spec, device) == problem


def test_a_missing_package_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    problem = obstacle("flash-attn", SPEC, CUDA)
    assert problem is not None
    assert problem.startswith("flash-attn takes its package (pip install 'keysift[flash-attn]'), got none that loads:")


@pytest.mark.parametrize(("version", "fits"), [("2.0.9", False), ("1.0", False), ("2.1.0", True), ("3.0.0b1", True)])
def test_a_package_with_the_causal_mask_at_the_first_key_is_refused(
    version: str, fits: bool, package: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    package.__dict__["__version__"] = version
    problem = obstacle("flash-attn", SPEC, CUDA)
    assert problem == (None if fits else f"flash-attn takes its package from 2.1 on, got {version}")


@pytest.mark.filterwarnings("ignore:.*attention")  # torch explains why a CPU tensor takes the mask
def test_the_lazy_mask_on_cuda_equals_the_materialized_one() -> None:
    """On CPU tensors torch materializes the lazy mask itself, as they have no kernel for it."""
    tokens, keys = 5, 12
    q, k, v = torch.randn(1, 4, tokens, DIM), torch.randn(1, 2, keys, DIM), torch.randn(1, 2, keys, DIM)
    outs = [
        scaled_dot_product_attention(q, k, v, _causal_mask(tokens, keys, at), enable_gqa=True) for at in (CPU, CUDA)
    ]
    torch.testing.assert_close(*outs)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa", "flash-attn"])
@pytest.mark.parametrize("chunk", [FIRST, LATER], ids=["at the start", "after others"])
def test_kernels_compute_causal_attention_on_a_gpu(chunk: Chunk, kernel: DenseKernel) -> None:
    chunk = replace(chunk, dtype=torch.bfloat16)
    data, cache = make_qkv(chunk), cache_of(chunk, device="cuda")
    if (problem := obstacle(kernel, cache.spec, cache.device)) is not None:
        pytest.skip(problem)
    out = run(cache, chunk, [part.cuda() for part in data], kernel)
    torch.testing.assert_close(out.cpu().double(), reference(chunk, data, SCALE), rtol=2e-2, atol=2e-2)
