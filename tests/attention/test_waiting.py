"""Host synchronisation: below `attend` nothing waits for the device, under any strategy and tier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from keysift.attention import Dense, Strategy, Telemetry, bind, known, make
from keysift.kvcache import (
    BackingStore,
    CacheSpec,
    HostStore,
    OffloadTier,
    PagedCache,
    Phase,
    PoolSize,
    Selection,
    Span,
    Step,
)
from keysift.kvcache.ops import use_backend
from keysift.kvcache.tiers.stage_reader import StageReader

from .devices import NoWaiting

pytestmark = pytest.mark.usefixtures("unchecked")

PAGE, ROW, HEADS, KV_HEADS, DIM = 16, 64, 4, 2, 64
FRAMES, SEQUENCES = 32, 2
SMALL: dict[str, object] = {"sink": 16, "local": 16, "window": 32, "last_rows_dense": 0}
SMALL |= {"budget": 32, "topk.top_k": 4, "dense_layers": 0}
FULL: dict[str, object] = {"coverage": 0.9, "min_budget": 32, "slash_alpha": 0.5, "sampling": "tail", "tau": 0.8}
STRATEGIES = pytest.mark.parametrize("name", sorted(known()))
OPTIONS = pytest.mark.parametrize("options", [SMALL, SMALL | FULL], ids=["plain", "all-options"])
OFFLOADED = pytest.mark.parametrize("offloaded", [False, True], ids=["device", "offload"])
FOR_TOKENS = ["dense", *(name for name in sorted(known()) if not isinstance(make(name).part(Phase.DECODE), Dense))]
"""Strategies that select for generated tokens, and the dense one."""

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
    "numbers sent without blocking": lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),
    "constants": lambda x: torch.arange(3, device=x.device) + torch.full((3,), 2, device=x.device),
}


class NullStore:
    """A backing store without contents: stands for pinned memory, from which a GPU copies without the host."""

    def claim(self, frames: Iterable[int]) -> None:
        pass

    def write(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        pass

    def read(self, layer: int, frames: Sequence[int], pages: Tensor) -> None:
        pass

    def fetch(self, layer: int, pool: Tensor, loads: Tensor, slots: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


def cache_on(device: str, *, offloaded: bool, num_layers: int = 1, slots: int = FRAMES) -> PagedCache:
    spec = CacheSpec(num_layers=num_layers, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE)
    tier = None
    if offloaded:
        place = torch.device(device)
        store: BackingStore = HostStore(spec, place) if place.type == "cuda" else NullStore()
        tier = OffloadTier(spec, FRAMES, store, PoolSize(slots, FRAMES, SEQUENCES, prefetch_pages=2), place)
    return PagedCache(spec, FRAMES, max_sequences=SEQUENCES, max_len=512, device=device, tier=tier)


def chosen(name: str, options: dict[str, object]) -> Strategy:
    """The strategy, with those of the options that it takes."""
    own = {key for field in dataclasses.fields(known()[name]) for key in (field.name, f"{name}.{field.name}")}
    return make(name, **{key: value for key, value in options.items() if key in own})


def prepared(strategy: Strategy, cache: PagedCache) -> tuple[Callable[[], Tensor], Telemetry]:
    """Attention of a prompt's second chunk, whose last row is short, and the telemetry of its selections.

    A strategy that selects for tokens alone runs the token after the chunk.
    """
    device = str(cache.device)
    cache.reserve(sequence := cache.open(), 301)
    first, step = (cache.prefill(Span(sequence, *part), ROW) for part in ((0, 128), (128, 172)))
    bind(make("dense"), cache, first)(0, *qkv(first, device))
    if isinstance(strategy.part(Phase.PREFILL), Dense):
        bind(make("dense"), cache, step)(0, *qkv(step, device))
        step = cache.decode([Span(sequence, 300, 1)])
    telemetry, given = Telemetry(cache.spec, step), qkv(step, device)
    attend = bind(strategy, cache, step, telemetry)
    return lambda: attend(0, *given), telemetry


def qkv(step: Step, device: str) -> list[Tensor]:
    return [torch.randn(len(step.positions), heads, DIM, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.parametrize("operation", WAITS.values(), ids=WAITS.keys())
def test_waits_are_detected(operation: Callable[[Tensor], object]) -> None:
    with NoWaiting(), pytest.raises((AssertionError, RuntimeError)):
        operation(torch.empty(4, 3, device="meta"))


@pytest.mark.parametrize("operation", FREE.values(), ids=FREE.keys())
def test_operations_that_do_not_wait_are_allowed(operation: Callable[[Tensor], object]) -> None:
    with NoWaiting():
        operation(torch.empty(4, 3, device="meta"))


def every_frame(reader: StageReader, selection: Selection, step: Step) -> list[int]:
    """Stands in for `StageReader.selected_frames`, the list that an offloaded prompt waits for: all frames."""
    return sorted(step.held[0][: step.max_pages])


@STRATEGIES
@OPTIONS
@OFFLOADED
def test_selecting_and_attending_wait_for_nothing(
    name: str, options: dict[str, object], offloaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One exception: a prompt over an offloaded cache waits for the list of frames that it copies from the store."""
    strategy, cache = chosen(name, options), cache_on("meta", offloaded=offloaded)
    with use_backend("reference"):
        attend, telemetry = prepared(strategy, cache)
        if not isinstance(strategy.part(Phase.PREFILL), Dense):
            monkeypatch.setattr(StageReader, "selected_frames", every_frame)
        with NoWaiting():
            out = attend()
    assert out.shape[1:] == (HEADS, DIM)
    assert name == "dense" or telemetry._sparse(), "it selected"


@OFFLOADED
def test_dense_prompts_wait_for_nothing(offloaded: bool) -> None:
    """Page tables, steps and chunks, some of which begin or end within a page."""
    cache = cache_on("meta", offloaded=offloaded, num_layers=2)
    sequence = cache.open()
    with NoWaiting(), use_backend("reference"):
        for start, stop in pairwise((0, 128, 150, 300)):
            cache.reserve(sequence, stop)
            step = cache.prefill(Span(sequence, start, stop - start), ROW)
            attend = bind(make("dense"), cache, step)
            for layer in range(2):
                attend(layer, *qkv(step, "meta"))


@pytest.mark.parametrize(("name", "slots"), [("dense", 1), *((name, FRAMES) for name in FOR_TOKENS)])
def test_generated_tokens_wait_for_nothing(name: str, slots: int) -> None:
    """Page tables, steps, and tokens of two sequences that begin and fill pages, read through the pool or the stage.

    Only a sparse selection that exceeds the pool waits, for the same list as a prompt.
    """
    cache = cache_on("meta", offloaded=True, num_layers=2, slots=slots)
    strategy, sequences = chosen(name, SMALL), (cache.open(), cache.open())
    with NoWaiting(), use_backend("reference"):
        for start in range(109, 114):
            spans = [Span(sequence, start + 2 * sequence, 1) for sequence in sequences]
            for span in spans:
                cache.reserve(span.sequence, span.stop)
            step = cache.decode(spans)
            attend = bind(strategy, cache, step)
            for layer in range(2):
                attend(layer, *qkv(step, "meta"))


@contextmanager
def refused() -> Iterator[None]:
    """Context in which CUDA raises if the host waits for it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def _any_order() -> Iterator[None]:
    """Allow cumulative sums of floats, which have no deterministic CUDA kernel: the test is of waits, not of bits."""
    torch.set_deterministic_debug_mode("default")
    yield
    torch.set_deterministic_debug_mode("error")


@contextmanager
def permitted() -> Iterator[None]:
    """Context in which `refused` does not apply."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.usefixtures("_any_order")
@STRATEGIES
@OPTIONS
@OFFLOADED
def test_the_device_is_never_waited_for(
    name: str, options: dict[str, object], offloaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exception that `test_selecting_and_attending_wait_for_nothing` names."""
    strategy, cache = chosen(name, options), cache_on("cuda", offloaded=offloaded)
    attend, telemetry = prepared(strategy, cache)
    expected = attend()  # compiles
    if not isinstance(strategy.part(Phase.PREFILL), Dense):
        monkeypatch.setattr(StageReader, "selected_frames", permitted()(StageReader.selected_frames))
    with refused():
        out = attend()
    torch.testing.assert_close(out, expected)
    assert name == "dense" or telemetry._sparse(), "it selected"
