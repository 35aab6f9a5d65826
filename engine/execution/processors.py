"""Logits processors of a request: biases, penalties and masks, and the warpers of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..request import SamplingParams

Processor = Callable[[Any, Tensor], Tensor]
"""Generated token ids, a list that only grows, and scores [1, V] -> scores [1, V]."""


def processors(params: SamplingParams, prompt: Sequence[int], eos_token_ids: Set[int]) -> tuple[Processor, ...]:
    """Logits processors of a request, in the order of transformers' `generate`; each result equals that of theirs.

    All that grows with the request is computed here, or once with the first token: a later token costs the same
    whatever the request asks for and however much was generated.
    """
    built: list[Processor] = []
    if params.logit_bias:
        built.append(_bias(params.logit_bias))
    if params.repetition_penalty != 1:
        built.append(_repetition(params.repetition_penalty, prompt))
    if params.presence_penalty or params.frequency_penalty:
        built.append(_penalties(params.presence_penalty, params.frequency_penalty))
    if params.allowed_token_ids:
        built.append(_allowed(params.allowed_token_ids))
    if params.min_new_tokens and (endings := params.endings(eos_token_ids)):
        built.append(_minimum(params.min_new_tokens, endings))
    return (*built, *_warpers(params))


def _warpers(params: SamplingParams) -> list[Processor]:
    """Processors that reshape the distribution without moving its peak; none for a greedy request."""
    built: list[Processor] = []
    if params.temperature == 0:
        return built
    if params.temperature != 1:
        built.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        built.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        built.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        built.append(MinPLogitsWarper(params.min_p))
    return built


class _Row:
    """One value for each token [V]: `values` for some tokens, `elsewhere` for the others.

    Spread over the vocabulary with the first scores, whose size and device it takes.
    """

    def __init__(self, token_ids: Iterable[int], values: Tensor, elsewhere: float) -> None:
        self._ids = torch.tensor(list(token_ids), dtype=torch.long)
        self._values = values
        self._elsewhere = elsewhere
        self._spread: Tensor | None = None

    def like(self, scores: Tensor) -> Tensor:
        """The row for scores [1, V]; tokens that the model cannot choose are left out."""
        if self._spread is None:
            known = self._ids < scores.shape[-1]
            row = torch.full(scores.shape[-1:], self._elsewhere, dtype=self._values.dtype)
            row[self._ids[known]] = self._values if self._values.dim() == 0 else self._values[known]
            self._spread = row.to(scores.device)
        return self._spread


class _Counts:
    """Counts of each token [V] int32: one for each distinct token of `prompt`, then each time it is generated.

    Kept up with the list of generated tokens, so a step that runs again counts nothing twice.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._row = _Row(sorted(set(prompt)), torch.tensor(1, dtype=torch.int32), 0)
        self._counted = 0

    def up_to(self, generated: Sequence[int], scores: Tensor) -> Tensor:
        counts = self._row.like(scores)
        if new := generated[self._counted :]:
            ids = torch.tensor(new, dtype=torch.long, device=counts.device)
            counts.index_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))
            self._counted += len(new)
        return counts


def _bias(logit_bias: dict[int, float]) -> Processor:
    row = _Row(logit_bias, torch.tensor(list(logit_bias.values()), dtype=torch.float32), 0.0)
    return lambda _generated, scores: scores + row.like(scores)


def _repetition(penalty: float, prompt: Sequence[int]) -> Processor:
    """Positive scores of tokens that occurred are divided by `penalty`, negative ones multiplied."""
    seen = _Counts(prompt)

    def repetition(generated: Sequence[int], scores: Tensor) -> Tensor:
        lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(seen.up_to(generated, scores) > 0, lowered, scores)

    return repetition


def _penalties(presence: float, frequency: float) -> Processor:
    """Penalties of generated tokens: `presence` once for each that occurred, `frequency` for each occurrence."""
    occurrences = _Counts()

    def penalties(generated: Sequence[int], scores: Tensor) -> Tensor:
        counts = occurrences.up_to(generated, scores)
        return scores - presence * (counts > 0) - frequency * counts

    return penalties


def _allowed(token_ids: Sequence[int]) -> Processor:
    """All other tokens are masked; where every allowed one is at -inf already, all of them become equally likely."""
    row = _Row(token_ids, torch.tensor(False), True)

    def allowed(_generated: Sequence[int], scores: Tensor) -> Tensor:
        others = row.like(scores)
        kept = scores.masked_fill(others, -math.inf)
        return torch.where(kept.amax(-1, keepdim=True).isneginf() & ~others, 0.0, kept)

    return allowed


def _minimum(min_new_tokens: int, endings: Iterable[int]) -> Processor:
    """Tokens that end the text are masked until there are enough others."""
    row = _Row(endings, torch.tensor(True), False)

    def minimum(generated: Sequence[int], scores: Tensor) -> Tensor:
        return scores.masked_fill(row.like(scores), -math.inf) if len(generated) < min_new_tokens else scores

    return minimum
