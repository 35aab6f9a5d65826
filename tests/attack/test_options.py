"""Every numeric option of every strategy at its ends and at random: at any value the cost is bounded by the context.

Some seconds of it in `make test`; with ``KEYSIFT_ATTACK_MINUTES`` random ones for as long as that says.
"""

from __future__ import annotations

import math
import os
import random
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keysift.attention import Strategy, StrategyError, Telemetry, bind, find, make
from keysift.attention.registry import Option, options
from keysift.attention.token import TokenStrategy
from keysift.engine import Engine, EngineConfig, Finish, FinishReason, Request, SamplingParams
from keysift.engine.errors import InvalidRequest, Unsupported
from keysift.kvcache import CacheSpec, Context, HostStore, OffloadTier, PagedCache, Phase, PoolSize, Span
from keysift.kvcache.index import CodeIndex, Graph, IndexSpec, Ivf
from keysift.kvcache.index.graph.index import BOUNDS as GRAPH_BOUNDS
from keysift.kvcache.ops import use_backend
from keysift.kvcache.ops.dispatch import Backend
from tests.strategies import rows
from tests.tiers import qkv

LENGTHS = (1, 2, 15, 16, 17, 100, 300)
MOST_BYTES = 2**25
"""Of one tensor: ten times the greatest of these contexts; the greatest options would take a hundred times as much."""
MOST_SECONDS = 10.0
"""Of this thread's own time, for a run that takes milliseconds."""
TINY = (5e-324, 1e-38)
"""Numbers whose inverses overflow, and that are 0 in fp32."""
SEED = 20261201


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A strategy with its options, and what it runs on."""

    name: str
    options: dict[str, object] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 17, 100)
    page_size: int = 16
    row: int = 16
    chunk: int = 64
    offloaded: bool = False
    backend: Backend = "auto"

    def run(self, made: Strategy | None = None) -> bool:
        """Run prompts and two tokens of all of them through a layer; False: the options are refused."""
        spec = CacheSpec(1, 2, 32, page_size=self.page_size, **self.spec)
        try:
            strategy = made or make(self.name, **self.options)
            strategy.check(spec)
        except ValueError:
            return False
        began = time.thread_time()
        with torch.inference_mode(), use_backend(self.backend), Bounds():
            self._drive(strategy, self._cache(spec))
        assert time.thread_time() - began < MOST_SECONDS
        return True

    def _cache(self, spec: CacheSpec) -> PagedCache:
        count, longest = len(self.lengths), max(self.lengths) + 2
        frames = sum(spec.pages_for(length + 2) for length in self.lengths)
        tier = None
        if self.offloaded:
            size = PoolSize(slots=max(frames // 2, spec.pages_for(longest)), staged=frames, tails=count)
            tier = OffloadTier(spec, frames, HostStore(spec, torch.device("cpu")), size, torch.device("cpu"))
        return PagedCache(spec, frames, max_sequences=count, max_len=longest, tier=tier)

    def _drive(self, strategy: Strategy, cache: PagedCache) -> None:
        sequences = [cache.open() for _ in self.lengths]
        for sequence, length in zip(sequences, self.lengths, strict=True):
            cache.reserve(sequence, length)
            for start in range(0, length, self.chunk):
                self._step(strategy, cache, [Span(sequence, start, min(self.chunk, length - start))], Phase.PREFILL)
        for i in range(2):
            spans = [Span(sequence, length + i, 1) for sequence, length in zip(sequences, self.lengths, strict=True)]
            for span in spans:
                cache.reserve(span.sequence, span.stop)
            self._step(strategy, cache, spans, Phase.DECODE)

    def _step(self, strategy: Strategy, cache: PagedCache, spans: list[Span], phase: Phase) -> None:
        """One step, in checked mode: `bind` holds the selection to all laws, native calls to their tensors."""
        longest = max(span.stop for span in spans)
        step = cache.decode(spans)
        if phase is Phase.PREFILL:
            step = cache.prefill(spans[0], self.row, self.lengths[spans[0].sequence] - spans[0].stop)
        telemetry = Telemetry(cache.spec, step)
        attend = bind(strategy.at(phase, longest, sum(span.length for span in spans)), cache, step, telemetry)
        each = [qkv(cache.spec, span.sequence, span, 0) for span in spans]
        out = attend(0, *(torch.cat(parts) for parts in zip(*each, strict=True)))
        assert bool(out.isfinite().all())
        assert all(0 <= read.density <= 1 for read in telemetry.reads())
        telemetry.coverage(telemetry.reads())
        telemetry.locality()


class Bounds(TorchDispatchMode):
    """Refuses tensors that are out of proportion to the context, those that native calls write to among them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() > MOST_BYTES:
                raise AssertionError(f"{func}: {each.untyped_storage().nbytes()} bytes")
        return made


def ends(option: Option) -> list[float]:
    """The ends of an option's bounds, the numbers next to them, and some that are hard to compute with."""
    if option.type == "integer":
        least, most = option.bounds["minimum"], option.bounds["maximum"]
        return [least, least + 1, *[2**24] * (most > 2**24), most - 1, most]  # not at once the most
    least = option.bounds.get("minimum", option.bounds.get("exclusiveMinimum", -math.inf))
    most = option.bounds.get("maximum", option.bounds.get("exclusiveMaximum", math.inf))
    near = [least, math.nextafter(least, most), math.nextafter(most, least), most]
    return [*near, *(each for each in (*TINY, 1 - 2**-24) if least < each < most)]


def numeric(name: str) -> list[Option]:
    return [option for option in options(find(name)) if option.type in ("integer", "number")]


def bases() -> dict[str, Setting]:
    """The first row of each strategy, and of each of its indexes, in `tests.strategies`; choosing at every length."""
    found: dict[str, Setting] = {}
    for row in rows(16):
        if "+" not in row.name:
            chosen = row.sparse | ({} if row.name == "dense" else {"dense_below": 0})
            label = f"{row.name} {row.sparse.get('index', '')}".strip()
            found.setdefault(label, Setting(name=row.name, options=chosen, spec=row.spec))
    return found


BASES = bases()


@pytest.mark.parametrize("base", BASES)
def test_options_at_their_ends(base: str) -> None:
    setting = BASES[base]
    few = slice(None) if base == next(each for each in BASES if BASES[each].name == setting.name) else slice(0, None, 3)
    cases = [{option.name: value} for option in numeric(setting.name) for value in ends(option)[few]]
    ran = sum(
        replace(
            setting,
            options=setting.options | case,
            offloaded=i % 3 == 1,
            backend="reference" if i % 8 == 1 else "auto",
        ).run()
        for i, case in enumerate(cases)
    )
    assert ran > len(cases) / 4, "most were refused"


@pytest.mark.parametrize("value", [0, 1, 16, 17, 2**24, 2**31 - 16])
def test_all_sizes_of_blocks_alike(value: int) -> None:
    """Options that have to be multiples of each other, all at the same end."""
    for name in ("infllmv2", "nosa-trained"):
        sizes = dict.fromkeys(("kernel_size", "kernel_stride", "block_size", "window_size"), value)
        many = {"topk": 2**31 - 1} | ({"query_blocks": 2**31 - 1} if name == "nosa-trained" else {})
        for changes in ({}, {"kernel_stride": 16}, {"kernel_stride": 16, "kernel_size": 16}):
            chosen: dict[str, object] = {**sizes, **many, **changes, "dense_below": 0}
            Setting(name=name, options=chosen, spec={"bias_channels": 8, "scale": 16**-0.5}).run()


@pytest.mark.parametrize("value", [5e-324, 1e-300, 0.0, math.nextafter(1e-6, 0), math.nan, -math.inf])
def test_a_share_of_queries_too_small_to_invert_is_refused(value: float) -> None:
    with pytest.raises(
        StrategyError, match=r"sampleattention\.row_ratio: Input should be (greater|less) than or equal to"
    ):
        make("sampleattention", row_ratio=value, dense_below=0)


@dataclass(frozen=True, kw_only=True)
class Searching(TokenStrategy):
    """Pages by an index with options that no strategy has."""

    index: Any

    def __post_init__(self) -> None:
        pass

    def index_spec(self) -> IndexSpec:
        return self.index  # type: ignore[no-any-return]

    def masses(self, q: Tensor, context: Context) -> Tensor:
        return context.page_mass(q)


INDEXES: list[tuple[type[Any], dict[str, int], str]] = [
    *((Graph, {"lag": 16, "sink": 16, "window": 16}, each) for each in GRAPH_BOUNDS),
    *(
        (Ivf, {"segment": 32, "tokens_per_list": 8}, each)
        for each in ("segment", "tokens_per_list", "nprobe", "iterations")
    ),
    (CodeIndex, {}, "candidates"),
]


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize(("kind", "base", "option"), INDEXES)
def test_options_of_indexes(kind: type[Any], base: dict[str, int], option: str, offloaded: bool) -> None:
    for value in (-(2**31), -1, 0, 1, 2, 32, 1024, 2**15, 2**24, 2**31 - 1, 2**31, 2**63):
        try:
            index = kind(**base | {option: value} | ({"wait": True} if kind is Graph else {}))
        except ValueError as error:
            refused = str(error)
            assert not 1 <= value <= 1024 or "multiple" in refused
            continue
        assert 0 <= value < 2**31
        Setting(name="searching", offloaded=offloaded).run(Searching(index=index, sink=16, window=16, budget=32))


@pytest.mark.parametrize("config", range(4))
def test_random_options_in_requests_to_an_engine(config: int, model_folder: Path) -> None:
    """Every request is refused, with the field, or answered in full; none fails."""
    dice = random.Random(SEED + config)
    page_size = dice.choice((1, 4, 16, 64))
    engine = Engine(
        EngineConfig(
            model=str(model_folder),
            strategy="dense",
            dtype="float32",
            page_size=page_size,
            queries_per_row=64,
            prefill_chunk=dice.choice((64, 128)),
            code_bits=dice.choice((2, 4)),
            kv_memory=2**22,
        )
    )
    refusals = {str(i): _refusal(engine, str(i), random_setting(dice), dice) for i in range(30)}
    assert all(re.match(r"strategy |[\w.-]+: ", refusal) for refusal in refusals.values() if refusal)
    finished = {}
    while engine.has_work:
        finished |= {output.request_id: output for output in engine.step() if isinstance(output, Finish)}
    assert {each.reason for each in finished.values()} == {FinishReason.LENGTH}, finished
    assert set(finished) == {each for each, refusal in refusals.items() if not refusal}
    assert engine.status.pages_free == engine.status.pages_total
    engine.close()


def _refusal(engine: Engine, request_id: str, setting: Setting, dice: random.Random) -> str:
    """Add a request. Returns why it is refused, or nothing."""
    arguments = tuple(f"{key}={value}" for key, value in setting.options.items())
    prompt = tuple(dice.randrange(3, 200) for _ in range(dice.choice(LENGTHS)))
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    try:
        engine.add(Request(request_id, prompt, params, strategy=setting.name, strategy_args=arguments))
    except (InvalidRequest, Unsupported) as error:
        return str(error)
    return ""


def random_setting(dice: random.Random) -> Setting:
    """Some options of some strategy at their ends or anywhere, on a cache of some shape."""
    base = dice.choice(list(BASES.values()))
    chosen = base.options if dice.random() < 0.7 else {"dense_below": 0}
    for option in dice.sample(known := numeric(base.name), min(len(known), dice.randint(1, 6))):
        chosen = chosen | {option.name: random_value(option, dice)}
    page_size = dice.choice((1, 2, 4, 8, 16, 32, 64, 256))
    width = page_size * dice.choice((1, 2, 4))
    return Setting(
        name=base.name,
        options=chosen,
        spec=base.spec | {"code_bits": dice.choice((2, 4))},
        lengths=tuple(dice.sample(LENGTHS, dice.randint(1, 3))),
        page_size=page_size,
        row=width,
        chunk=width * dice.choice((1, 2, 8)),
        offloaded=dice.random() < 0.3,
        backend="reference" if dice.random() < 0.2 else "auto",
    )


def random_value(option: Option, dice: random.Random) -> float:
    if dice.random() < 0.5:
        return dice.choice(ends(option))
    if option.type == "number":
        least, most = (max(min(option.bounds.get(key, 1e3), 1e3), -1e3) for key in ("minimum", "maximum"))
        return dice.uniform(min(least, most), most)
    least, most = option.bounds["minimum"], option.bounds["maximum"]
    return dice.choice((dice.randint(least, most), min(most, max(least, 2 ** dice.randint(0, 31))), 16, 48, 64))


def test_random_options_on_random_caches() -> None:
    minutes = float(os.environ.get("KEYSIFT_ATTACK_MINUTES", "0"))
    dice, stop = random.Random(None if minutes else SEED), time.monotonic() + 60 * minutes
    count = ran = 0
    while count < 25 or time.monotonic() < stop:
        setting = random_setting(dice)
        try:
            ran += setting.run()
        except Exception as error:
            raise AssertionError(str(setting)) from error
        count += 1
    assert ran > count / 3, "most were refused"
