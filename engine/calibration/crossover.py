"""Measurement of the prompt length from which each strategy beats dense attention on this machine and model."""

from __future__ import annotations

import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime

import torch
from torch import Tensor

from keysift.attention import Attend, Dense, DenseKernel, Strategy, StrategyError, bind, known, make
from keysift.attention.prompt import PromptStrategy
from keysift.kvcache import PagedCache, Span, Step
from keysift.kvcache.ops import use_backend

from ..config import EngineConfig
from ..errors import Unsupported
from ..execution.runner import check_kernel
from ..memory.budget import cache_spec
from ..model.loaded import LoadedModel
from ..model.placement import tier_of
from .calibration import Calibration, options, setting
from .fit import Chunk, Crossover, fit

LENGTH = {"cpu": 6 * 1024, "cuda": 32 * 1024}
"""Longest prompt measured, in tokens, by device: what two CPU cores, or a GPU, read within a minute."""
LAYERS = 4
"""Layers that are measured, evenly over the model's depth, as attention differs between them."""
SECONDS = 60.0
"""Time after which no further chunk starts, once at least two were measured."""
RUNS, ATTEMPTS = 3, 8
"""Undisturbed runs of which a time is the median, and the most runs to get them."""
DISTURBED = 1.2
"""Factor of the fastest run above which a run counts as disturbed by other load."""
BASE = "dense"

Progress = Callable[[int, int], None]
"""Called with the chunks done and the chunks in all."""
Times = dict[str, float]
"""Milliseconds by strategy, dense included."""


def measure(config: EngineConfig, model: LoadedModel, progress: Progress) -> Calibration:
    """Prefill real text with dense attention, timing every strategy against it in some layers.

    Raises `Unsupported` if every layer has a window, so that there is nothing to choose; `InvalidRequest` if the dense
    kernel cannot run.
    """
    tokens = text(config, model)
    chunks = _prefill(config, model, tokens, progress)
    crossovers = {
        name: _crossover(options(strategy), [_chunk(name, *chunk) for chunk in chunks], config.prefill_chunk)
        for name, strategy in prompt_strategies().items()
    }
    return Calibration(setting=setting(config, model), model=model.name, crossovers=crossovers)


def prompt_strategies() -> dict[str, Strategy]:
    """Strategies that choose pages for prompts, with default options, by name; no yardsticks."""
    found: dict[str, Strategy] = {}
    for name, strategy in known().items():
        if issubclass(strategy, PromptStrategy) and not strategy.yardstick:
            with suppress(StrategyError):  # a plug-in with an option that has no default
                found[name] = make(name)
    return found


def text(config: EngineConfig, model: LoadedModel) -> Tensor:
    """Tokens [T] int64 of CPython's documentation, in whole chunks if the model can take one."""
    longest = min(LENGTH[model.device.type], model.max_model_len)
    longest = longest // config.prefill_chunk * config.prefill_chunk or longest
    words = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    return torch.tensor(model.tokenizer.encode(words[: 8 * longest])[:longest], device=model.device)


def _prefill(config: EngineConfig, model: LoadedModel, tokens: Tensor, progress: Progress) -> list[tuple[Step, Times]]:
    """Step and times of each chunk, summed over the measured layers."""
    spec, length = cache_spec(config, model), len(tokens)
    frames = spec.pages_for(length)
    tier = tier_of(spec, frames, model.devices, model.device)
    cache = PagedCache(spec, frames, max_sequences=1, max_len=length, device=model.device, tier=tier)
    check_kernel(config.dense_kernel, cache)
    cache.reserve(sequence := cache.open(), length)
    layers, begun = _layers(model), time.monotonic()
    starts = range(0, length, config.prefill_chunk)
    chunks: list[tuple[Step, Times]] = []
    for number, start in enumerate(starts):
        if number > 1 and time.monotonic() - begun > SECONDS:
            break
        progress(number, len(starts))
        stop = min(start + config.prefill_chunk, length)
        step = cache.prefill(Span(sequence, start, stop - start), config.queries_per_row, length - stop)
        timer = _Timer(cache, step, layers, config.dense_kernel)
        with torch.inference_mode(), use_backend(config.backend):
            model.forward(tokens[start:stop], step.positions, step.positions[-1:] - start, timer)
        chunks.append((step, timer.totals))
    progress(len(starts), len(starts))
    return chunks


def _layers(model: LoadedModel) -> set[int]:
    full = [layer for layer in range(model.num_layers) if not model.windows[layer]]
    if not full:
        raise Unsupported(f"{model.name}: every layer has a window, so there is nothing to choose")
    count = min(LAYERS, len(full))
    return {full[(2 * i + 1) * len(full) // (2 * count)] for i in range(count)}


class _Timer:
    """Dense `Attend` that first times every strategy in some layers.

    Writing the same keys and values again changes nothing and costs every strategy the same.
    """

    def __init__(self, cache: PagedCache, step: Step, layers: set[int], kernel: DenseKernel) -> None:
        strategies = {BASE: Dense(), **prompt_strategies()}
        self._attends = {
            name: bind(strategy, cache, step, dense_kernel=kernel) for name, strategy in strategies.items()
        }
        self._layers = layers
        self.totals: Times = dict.fromkeys(strategies, 0.0)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self._layers:
            works = {name: _work(attend, layer, q, k, v) for name, attend in self._attends.items()}
            for name, milliseconds in side_by_side(works, q.device).items():
                self.totals[name] += milliseconds
        return self._attends[BASE](layer, q, k, v)


def _work(attend: Attend, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    return lambda: attend(layer, q, k, v)


def side_by_side(works: Mapping[str, Callable[[], object]], device: torch.device) -> Times:
    """Milliseconds of each work, measured in turns, so that a machine that slows down affects all alike.

    The median of undisturbed runs, or of all runs if too few were undisturbed.
    """
    for work in works.values():
        work()  # compiles kernels, warms caches
    runs: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ATTEMPTS):
        for name, work in works.items():
            if len(_undisturbed(runs[name])) < RUNS:
                runs[name].append(_milliseconds(work, device))
    return {
        name: statistics.median(quiet if len(quiet := _undisturbed(times)) >= RUNS else times)
        for name, times in runs.items()
    }


def _undisturbed(times: list[float]) -> list[float]:
    return [each for each in times if each <= DISTURBED * min(times)]


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    work()
    _wait(device)
    return 1e3 * (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _chunk(name: str, step: Step, times: Times) -> Chunk:
    span = step.spans[0]
    return Chunk(queries=span.length, context=span.stop, dense_ms=times[BASE], strategy_ms=times[name])


def _crossover(options: str, chunks: list[Chunk], prefill_chunk: int) -> Crossover:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return Crossover(options=options, measured=now, chunks=tuple(chunks), **dict(fit(chunks, prefill_chunk)))
