"""Law 9: nothing below `attend` waits for the device, whatever the strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from keysift.attention import Dense, Telemetry, bind, known, make
from keysift.kvcache import CacheSpec, PagedCache, Phase, Span, Step
from keysift.kvcache.ops import use_backend

from .devices import NoWaiting

PAGE, ROW, HEADS, KV_HEADS, DIM = 16, 64, 4, 2, 64
SMALL: dict[str, object] = {"sink": 16, "local": 16, "window": 32, "last_rows_dense": 0}
SMALL |= {"budget": 32, "top_k": 4, "dense_layers": 0}
FULL: dict[str, object] = {"coverage": 0.9, "min_budget": 32, "slash_alpha": 0.5, "sampling": "tail", "tau": 0.8}
STRATEGIES = pytest.mark.parametrize("name", sorted(known()))
OPTIONS = pytest.mark.parametrize("options", [SMALL, SMALL | FULL], ids=["plain", "all-options"])

WAITS: dict[str, Callable[[Tensor], object]] = {
    "number": lambda x: x.sum().item(),
    "decision": lambda x: bool((x > 0).any()),
    "list": lambda x: x.tolist(),
    "copy to the host": lambda x: x.cpu(),
    "chosen by a mask": lambda x: x[x > 0],
    "places": lambda x: x.nonzero(),
    "repeated as often as counted": lambda x: x.repeat_interleave(x[:, 0].long(), 0),
    "comparison": lambda x: torch.equal(x, x),
    "numbers from the host": lambda x: torch.tensor([1, 2], device=x.device),
    "numbers like these": lambda x: x.new_tensor([1, 2]),
    "tensor from the host": lambda x: torch.zeros(3).to(x.device),
    "index from the host": lambda x: x[torch.arange(2)],
    "row from the host": lambda x: x.__setitem__(0, torch.zeros(3)),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: torch.where(x > 0, x.softmax(-1), 0.0).sort().values,
    "gathering": lambda x: x[x.argmax(0)],
    "numbers sent ahead": lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),
    "constants": lambda x: torch.arange(3, device=x.device) + torch.full((3,), 2, device=x.device),
}


def prepared(name: str, options: dict[str, object], device: str) -> tuple[Callable[[], Tensor], Telemetry]:
    """Attention of the second chunk of a prompt, whose last row is short, or of the token behind it where the strategy
    chooses for tokens; and what notes its selections."""
    own = {field.name for field in dataclasses.fields(known()[name])}
    strategy = make(name, **{key: value for key, value in options.items() if key in own})
    spec = CacheSpec(num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE)
    cache = PagedCache(spec, 32, max_sequences=1, max_len=512, device=device)
    cache.reserve(sequence := cache.open(), 301)
    first, step = (cache.prefill(Span(sequence, *where), ROW) for where in ((0, 128), (128, 172)))
    bind(make("dense"), cache, first)(0, *qkv(first, device))
    if isinstance(strategy.part(Phase.PREFILL), Dense):
        bind(make("dense"), cache, step)(0, *qkv(step, device))
        step = cache.decode([Span(sequence, 300, 1)])
    telemetry, given = Telemetry(spec, step), qkv(step, device)
    attend = bind(strategy, cache, step, telemetry)
    return lambda: attend(0, *given), telemetry


def qkv(step: Step, device: str) -> list[Tensor]:
    return [torch.randn(len(step.positions), heads, DIM, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.parametrize("operation", WAITS.values(), ids=WAITS.keys())
def test_what_waits_is_noticed(operation: Callable[[Tensor], object]) -> None:
    with NoWaiting(), pytest.raises((AssertionError, RuntimeError)):
        operation(torch.empty(4, 3, device="meta"))


@pytest.mark.parametrize("operation", FREE.values(), ids=FREE.keys())
def test_what_does_not_wait_is_free(operation: Callable[[Tensor], object]) -> None:
    with NoWaiting():
        operation(torch.empty(4, 3, device="meta"))


@STRATEGIES
@OPTIONS
def test_choosing_and_attending_wait_for_nothing(name: str, options: dict[str, object]) -> None:
    with use_backend("reference"):
        attend, telemetry = prepared(name, options, "meta")
        with NoWaiting():
            out = attend()
    assert out.shape[1:] == (HEADS, DIM)
    assert name == "dense" or telemetry._sparse(), "it chose"


@contextmanager
def refused() -> Iterator[None]:
    """Inside, CUDA raises where the host waits for it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def _any_order() -> Iterator[None]:
    """Cumulative sums of floats have no deterministic CUDA kernel; the test asks about waiting, not about bits."""
    torch.set_deterministic_debug_mode("default")
    yield
    torch.set_deterministic_debug_mode("error")


@pytest.mark.gpu
@pytest.mark.usefixtures("_any_order")
@STRATEGIES
@OPTIONS
def test_the_device_is_never_waited_for(name: str, options: dict[str, object]) -> None:
    attend, telemetry = prepared(name, options, "cuda")
    expected = attend()  # compiles
    with refused():
        out = attend()
    torch.testing.assert_close(out, expected)
    assert name == "dense" or telemetry._sparse(), "it chose"
