"""Sampling of tokens from logits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import InvalidRequest
from ..request import Logprob, SamplingParams

Processor = Callable[[Any, Tensor], Tensor]
"""generated token ids [1, n], scores [1, V] -> scores [1, V]."""

UNIFORM_STEPS = 1 << 48
MAX_BIAS = 1e4


class Sampled(NamedTuple):
    """One chosen token."""

    token_id: int
    logprobs: tuple[Logprob, ...]
    """The chosen token's first, then the candidates' in descending order; empty without `SamplingParams.logprobs`."""


@dataclass(slots=True, kw_only=True, eq=False)
class SamplerState:
    """Everything but the logits that a request's next token depends on, so that batches never matter."""

    params: SamplingParams
    prompt: Sequence[int]
    generated: list[int]
    """Generated tokens; the owner appends to the list."""
    eos_token_ids: Set[int]
    seed: int
    """Seed if `params` have none; see `derive_seed`."""
    generator: torch.Generator = field(init=False)
    processors: tuple[Processor, ...] = field(init=False)

    def __post_init__(self) -> None:
        seed = self.seed if self.params.seed is None else self.params.seed
        self.generator = torch.Generator().manual_seed(seed)
        self.processors = _processors(self.params, self.prompt, self.eos_token_ids)

    @property
    def plain(self) -> bool:
        """The next token is the most likely one, without any processing of the logits."""
        return self.params.temperature == 0 and not self.processors


def derive_seed(engine_seed: int, request_id: str) -> int:
    """Seed of a request: equal for the same id in an engine of the same seed."""
    digest = hashlib.sha256(f"{engine_seed}:{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check(params: SamplingParams, vocab_size: int, eos_token_ids: Set[int] = frozenset()) -> None:
    """Raise `InvalidRequest` for ids outside the vocabulary and for options that leave no token to choose."""
    fields = {
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids,
        "stop_token_ids": params.stop_token_ids,
    }
    for name, ids in fields.items():
        if (largest := max(ids, default=0)) >= vocab_size:
            raise InvalidRequest(name, f"token ids below the vocabulary size {vocab_size}, got {largest}")
    for token_id, bias in params.logit_bias.items():
        if not (-MAX_BIAS <= bias <= MAX_BIAS or bias == -math.inf):
            raise InvalidRequest(
                "logit_bias", f"-{MAX_BIAS:g} to {MAX_BIAS:g} or -inf, got {bias} for token {token_id}"
            )
    _check_choice(params, vocab_size, params.endings(eos_token_ids) if params.min_new_tokens else frozenset())


def _check_choice(params: SamplingParams, vocab_size: int, endings: Set[int]) -> None:
    """Raise `InvalidRequest` for parameters that leave no token to choose."""
    allowed = set(params.allowed_token_ids) or set(range(vocab_size))
    if allowed <= (banned := {token for token, bias in params.logit_bias.items() if bias == -math.inf}):
        raise InvalidRequest("logit_bias", f"at least one token that is not at -inf, got {len(banned)} that are")
    if allowed <= endings | banned:
        field = "allowed_token_ids" if params.allowed_token_ids else "stop_token_ids"
        raise InvalidRequest(field, "at least one token must not end the text before min_new_tokens, got none")


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """The next token of every row of logits [B, V] fp32, with the log probabilities that its request asks for.

    Log probabilities and ranks are of the model's own distribution, before temperature, penalties and masks. Waits for
    the device once for the greedy rows and once for each other row. An error leaves all generators as they were.
    """
    with _restoring([state.generator for state in states if state.params.temperature > 0]):
        return _sample(logits, states)


@contextmanager
def _restoring(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Restore the generators' states if the block raises: a step that failed may be run again."""
    before = [generator.get_state() for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        raise


def _sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    greedy = logits.argmax(-1).tolist() if any(state.plain for state in states) else None
    sampled = []
    for row, state in enumerate(states):
        token_id = greedy[row] if greedy is not None and state.plain else _choose(logits[row : row + 1], state)
        sampled.append(Sampled(token_id, _logprobs(logits[row], token_id, state.params.logprobs)))
    return sampled


def _choose(scores: Tensor, state: SamplerState) -> int:
    """One token from scores [1, V]."""
    generated = torch.tensor([state.generated], dtype=torch.long, device=scores.device)  # [1, n]
    for process in state.processors:
        scores = process(generated, scores)
    return int(scores.argmax()) if state.params.temperature == 0 else _draw(scores[0], state.generator)


def _draw(scores: Tensor, generator: torch.Generator) -> int:
    """One token from the softmax of scores [V], by inverse transform sampling.

    The uniform number is drawn on the host whatever the device is, so a seed means the same everywhere. In double
    precision it stays below 1 and rare tokens keep their share.
    """
    uniform = int(torch.randint(UNIFORM_STEPS, (), generator=generator)) / UNIFORM_STEPS
    mass = scores.double().softmax(-1).cumsum(-1)  # [V]
    if not mass[-1].isfinite():  # scores overflowed: fall back to the highest
        return int(scores.nan_to_num().argmax())
    return int(torch.searchsorted(mass, mass[-1:] * uniform, right=True).clamp(max=len(mass) - 1))


def _logprobs(logits: Tensor, token_id: int, candidates: int | None) -> tuple[Logprob, ...]:
    """Log probabilities under logits [V]: of the chosen token, then of the `candidates` most likely, descending."""
    if candidates is None:
        return ()
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs[token_id]
    rank = 1 + int((logprobs > chosen).sum())
    values, ids = logprobs.topk(min(candidates, logprobs.numel()))
    ranked = enumerate(zip(ids.tolist(), values.tolist(), strict=True), start=1)
    return (Logprob(token_id, float(chosen), rank), *(Logprob(other, value, place) for place, (other, value) in ranked))


def _processors(params: SamplingParams, prompt: Sequence[int], eos_token_ids: Set[int]) -> tuple[Processor, ...]:
    """Logits processors of a request, in the order of transformers' `generate`."""
    built: list[Processor] = []
    if params.logit_bias:
        built.append(SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        built.append(_repetition(params.repetition_penalty, prompt))
    if params.presence_penalty or params.frequency_penalty:
        built.append(_penalties(params.presence_penalty, params.frequency_penalty))
    if params.allowed_token_ids:
        allowed = sorted(set(params.allowed_token_ids))
        built.append(PrefixConstrainedLogitsProcessor(lambda _batch, _ids: allowed, num_beams=1))
    if params.min_new_tokens and (endings := params.endings(eos_token_ids)):
        built.append(_minimum(params.min_new_tokens, sorted(endings)))
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


def _repetition(penalty: float, prompt: Sequence[int]) -> Processor:
    process = RepetitionPenaltyLogitsProcessor(float(penalty))
    distinct = torch.tensor(sorted(set(prompt)), dtype=torch.long)[None]  # [1, n]

    def repetition(generated: Tensor, scores: Tensor) -> Tensor:
        seen = torch.cat((distinct.to(scores.device), generated), dim=1)
        return process(seen, scores)  # type: ignore[no-any-return]

    return repetition


def _penalties(presence: float, frequency: float) -> Processor:
    """Penalties of generated tokens: `presence` once for each that occurred, `frequency` for each occurrence."""

    def penalties(generated: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(generated[0], minlength=scores.shape[-1])
        return scores - presence * (counts > 0) - frequency * counts

    return penalties


def _minimum(min_new_tokens: int, endings: list[int]) -> Processor:
    def minimum(generated: Tensor, scores: Tensor) -> Tensor:
        process = MinNewTokensLengthLogitsProcessor(0, min_new_tokens, endings, device=str(scores.device))
        return process(generated, scores)  # type: ignore[no-any-return]

    return minimum
