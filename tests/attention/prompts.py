"""Random prompts, and the selections of strategies for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from keysift.attention import Strategy
from keysift.kvcache import CacheSpec, PagedCache, Selection, Span

from .selection_oracles import Prompt


def random_prompt(
    tokens: int, chunk: int, *, page: int, row: int, heads: tuple[int, int] = (4, 2), scale: float = 0.35, seed: int = 0
) -> Prompt:
    """Peaky random attention: a sink, a few keys that all queries read, and neighbours that resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    drift = torch.randn(tokens, num_kv_heads, 8, generator=generator).cumsum(0) / 3
    k = torch.cat([drift, torch.randn(tokens, num_kv_heads, 8, generator=generator)], -1)
    q = k[-chunk:].repeat_interleave(num_heads // num_kv_heads, 1) + torch.randn(
        chunk, num_heads, 16, generator=generator
    )
    heavy = torch.randint(0, tokens, (4,), generator=generator)
    k[heavy] += q.mean((0, 1))
    return Prompt(q.double(), k.double(), page, row, scale)


def select(strategy: Strategy, prompt: Prompt, poison: float = float("nan"), tokens_left: int = 0) -> Selection:
    """The selection for the prompt's last chunk, in frames scattered among those of another sequence."""
    spec = CacheSpec(
        num_layers=1,
        num_kv_heads=prompt.k.shape[1],
        head_dim=prompt.k.shape[2],
        page_size=prompt.page,
        scale=prompt.scale,
    )
    cache = PagedCache(spec, 2 * prompt.num_pages + 2, max_sequences=2, max_len=len(prompt.k))
    for tensor in (cache.tier.k, cache.tier.v, cache.tier.summaries(0)):  # type: ignore[attr-defined]
        tensor.fill_(poison)
    sequence, other = cache.open(), cache.open()
    for page in range(1, prompt.num_pages + 1):
        cache.reserve(other, page * prompt.page)
        cache.reserve(sequence, page * prompt.page)
    q, k = prompt.q.float(), prompt.k.float()
    if prompt.start:
        cache.append(
            0, k[: prompt.start], k[: prompt.start], cache.prefill(Span(sequence, 0, prompt.start), prompt.row)
        )
    step = cache.prefill(Span(sequence, prompt.start, len(q)), prompt.row, tokens_left)
    cache.append(0, k[prompt.start :], k[prompt.start :], step)
    return strategy.prefill(q, cache.context(0, step))


def mask(strategy: Strategy, prompt: Prompt, **surroundings: float) -> Tensor:
    """[R, Hq, F] bool, the pages that `select` returns."""
    return select(strategy, prompt, **surroundings).mask(prompt.num_pages)  # type: ignore[arg-type]


def kept(prompt: Prompt, chosen: Tensor) -> Tensor:
    """[Hq, Nq], the share of each query's attention on the chosen pages [R, Hq, F] of its row."""
    queries = chosen.repeat_interleave(prompt.row, 0)[: len(prompt.q)].transpose(0, 1)  # [Hq, Nq, F]
    tokens = queries.repeat_interleave(prompt.page, 2)[..., : len(prompt.k)]
    return (prompt.weights * tokens).sum(-1)


def scaled(prompt: Prompt, factor: float) -> Prompt:
    return replace(prompt, scale=prompt.scale * factor)
