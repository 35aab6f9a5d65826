"""The model that recalls exactly, for tests: what it says under a strategy."""

from __future__ import annotations

import torch
from torch import Tensor

from keysift.attention import Reads, Strategy, Telemetry, bind
from keysift.engine.config import EngineConfig
from keysift.engine.memory.budget import cache_spec
from keysift.engine.model.loaded import LoadedModel
from keysift.kvcache import PagedCache, Span

CHUNK, ROW = 1024, 64


def probabilities(model: LoadedModel, tokens: Tensor, asked: Tensor, strategy: Strategy) -> tuple[Tensor, float]:
    """[queries, V], next-token probabilities at the positions `asked` [queries] of a prompt [n], and the density.

    Prefilled chunk by chunk, as the engine does it, but with logits of inner positions.
    """
    spec = cache_spec(EngineConfig(), model)
    cache = PagedCache(spec, spec.pages_for(len(tokens)), max_sequences=1, max_len=len(tokens))
    sequence = cache.open()
    cache.reserve(sequence, len(tokens))
    found, reads = [], Reads()
    for start in range(0, len(tokens), CHUNK):
        span = Span(sequence, start, min(CHUNK, len(tokens) - start))
        here = asked[(asked >= span.start) & (asked < span.stop)] - span.start
        step = cache.prefill(span, ROW, len(tokens) - span.stop)
        telemetry = Telemetry(spec, step)
        attend = bind(strategy, cache, step, telemetry)
        found.append(model.forward(tokens[span.start : span.stop], step.positions, here, attend).softmax(-1))
        reads += telemetry.reads()[0]
    return torch.cat(found), reads.density
