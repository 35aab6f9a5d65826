"""A whole model with random weights, shaped as Llama 3.1 8B, under the engine's own scheduler, runner and cache.

The weights are made on the device, by transformers, from a configuration alone; the seam, the cache, the scheduler,
the runner and the sampler are the engine's. The rest of `engine.model.load` (files, tokenizer, CPU kernels) is
left out. Random weights attend to everything alike, so a strategy with a target for coverage reads more of a prompt
than it does of a real one: its density is in its row.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple, cast

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from keysift.attention import DEFAULT, Reads, parse
from keysift.engine import EngineConfig, Request, SamplingParams
from keysift.engine.execution.recorder import CudaRecorder
from keysift.engine.execution.runner import Runner
from keysift.engine.execution.sampler import SamplerState
from keysift.engine.memory.budget import cache_spec, make_cache
from keysift.engine.model import seam
from keysift.engine.model.loaded import LoadedModel
from keysift.engine.model.tokenizer import Tokenizer
from keysift.engine.scheduling.scheduler import Scheduler
from keysift.engine.scheduling.sequence import Sequence as Running
from keysift.kvcache import PagedCache, Phase

from .rows import Aim, Row, Settings, attempt, free

MOST_RUNS = 3
"""A prompt of 128k tokens is long enough to be measured few times."""
RESERVED = 64
"""Tokens of the context after the prompt."""
LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


class Times(NamedTuple):
    """Seconds of one request."""

    first: float
    between: float
    """Median over the tokens after the first."""
    densities: tuple[float, float]
    """Densities of the prompt and of the generated tokens."""


def rows(settings: Settings) -> Iterator[Row]:
    model = random_model(settings)
    config = _config(settings, model)
    cache = make_cache(config, model, lambda message: None)
    for name, graphs in itertools.product(("dense", DEFAULT), (False, True)):
        if graphs and settings.device.type != "cuda":
            continue
        runner = Runner(model, cache, config)
        if graphs:
            runner.record(CudaRecorder(settings.device))
        what = {"what": f"{name}, CUDA graphs" * graphs or name, "context": settings.long}
        yield attempt(what, partial(_row, settings, config, runner, model, cache, name))
        del runner
        free()


def _config(settings: Settings, model: LoadedModel) -> EngineConfig:
    """Configuration with room for one request of the full length."""
    fields = {"max_model_len": settings.long, "max_num_seqs": 1, "prefix_cache": False, "seed": settings.seed}
    spec = cache_spec(EngineConfig(**fields), model)
    pages = spec.pages_for(settings.long)
    return EngineConfig(**fields, prefill_chunk=settings.chunk, kv_memory=pages * spec.page_bytes)


def random_model(settings: Settings) -> LoadedModel:
    """A model as `engine.model.load` returns it, without a tokenizer."""
    seam.register()
    torch.manual_seed(settings.seed)
    shape = SMALL if settings.small else LLAMA
    config = LlamaConfig(**shape, max_position_embeddings=settings.long)
    maker: Any = AutoModelForCausalLM
    with torch.device(settings.device):
        made = maker.from_config(config, dtype=torch.bfloat16, attn_implementation=seam.NAME)
    module = made.eval().requires_grad_(False)
    calls = seam.probe(module, settings.device)
    return LoadedModel(
        name="random weights",
        module=module,
        tokenizer=cast(Tokenizer, None),
        max_model_len=settings.long,
        vocab_size=config.vocab_size,
        dtype=module.dtype,
        device=settings.device,
        eos_token_ids=frozenset(),
        **seam.facts(calls),
        fingerprint="random",
    )


def _row(
    settings: Settings, config: EngineConfig, runner: Runner, model: LoadedModel, cache: PagedCache, name: str
) -> Row:
    request = partial(_request, settings, config, runner, model, cache, name)
    new = min(settings.steps, RESERVED)
    request(min(2 * settings.chunk, settings.long - RESERVED), 3)  # compiles
    free()
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
    runs = min(settings.clock.runs, MOST_RUNS)
    times = [request(settings.long - RESERVED, new) for _ in range(runs)]
    return {
        "prompt": settings.long - RESERVED, "parameters": sum(p.numel() for p in model.module.parameters()),
        "TTFT s": statistics.median(each.first for each in times),
        "TPOT ms": 1e3 * statistics.median(each.between for each in times),
        "density": times[0].densities[0], "decode density": times[0].densities[1], **_peak(settings.device),
    }  # fmt: skip


def _request(
    settings: Settings,
    config: EngineConfig,
    runner: Runner,
    model: LoadedModel,
    cache: PagedCache,
    name: str,
    prompt: int,
    new: int,
) -> Times:
    """One greedy request, as `Engine.step` runs it: next batch, run, commit."""
    running, state = _begin(settings, model, name, prompt, new)
    scheduler = Scheduler(cache, max_running=1, chunk=config.prefill_chunk, queries_per_row=config.queries_per_row)
    scheduler.add(running)
    reads = dict.fromkeys(Phase, Reads())
    times: list[float] = []
    start = perf_counter()
    while len(times) < new:
        batch = scheduler.next_batch()
        assert batch is not None, "it runs alone"
        result = runner.run(batch, [state] * len(batch.sampled))
        tokens = {sequence: token for sequence, (token, _) in zip(batch.sampled, result.sampled, strict=True)}
        for sequence, span in zip(batch.sequences, batch.spans, strict=True):
            scheduler.commit(sequence, span, tokens.get(sequence), perf_counter())
        state.generated += [token for token, _ in result.sampled]
        times += [perf_counter()] * len(result.sampled)
        reads[batch.phase] += result.reads[0]
    scheduler.finish(running)
    between = statistics.median(after - before for before, after in pairwise(times))
    return Times(times[0] - start, between, (reads[Phase.PREFILL].density, reads[Phase.DECODE].density))


def _begin(settings: Settings, model: LoadedModel, name: str, prompt: int, new: int) -> tuple[Running, SamplerState]:
    options = () if name == "dense" else tuple(f"{part}.dense_below=0" for part in name.split("+"))
    strategy = parse(name, options)
    numbers = random.Random(settings.seed)
    tokens = tuple(numbers.randrange(model.vocab_size) for _ in range(prompt))
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    running = Running(Request("one", tokens, params, bypass_prefix_cache=True), strategy, new)
    state = SamplerState(params=params, prompt=tokens, generated=[], eos_token_ids=frozenset(), seed=settings.seed)
    return running, state


def _peak(device: torch.device) -> Row:
    """Peak memory of the device; without one, resident memory of the process."""
    if device.type == "cuda":
        return {"peak GB": torch.cuda.max_memory_allocated(device) / 1e9, "memory of": "device"}
    return {"peak GB": psutil.Process().memory_info().rss / 1e9, "memory of": "process, now"}


def aims(rows: Sequence[Row]) -> list[Aim]:
    """None were set."""
    return []
