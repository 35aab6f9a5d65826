"""Sampling of tokens from logits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidRequest, NoChoice
from ..request import Logprob, SamplingParams
from .processors import Processor, processors

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
    """Generated tokens; the owner appends to the list, whose tokens never change."""
    eos_token_ids: Set[int]
    seed: int
    """Seed if `params` have none; see `derive_seed`."""
    generator: torch.Generator = field(init=False)
    processors: tuple[Processor, ...] = field(init=False)

    def __post_init__(self) -> None:
        seed = self.seed if self.params.seed is None else self.params.seed
        self.generator = torch.Generator().manual_seed(seed)
        self.processors = processors(self.params, self.prompt, self.eos_token_ids)

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
    _check_bias(params.logit_bias)
    _check_choice(params, vocab_size, params.endings(eos_token_ids) if params.min_new_tokens else frozenset())


def _check_bias(logit_bias: Mapping[int, float]) -> None:
    values = torch.tensor(list(logit_bias.values()), dtype=torch.float64)
    wrong = ~(values.isneginf() | (values.abs() <= MAX_BIAS))
    if wrong.any():
        token_id, bias = list(logit_bias.items())[int(wrong.nonzero()[0])]
        raise InvalidRequest("logit_bias", f"-{MAX_BIAS:g} to {MAX_BIAS:g} or -inf, got {bias} for token {token_id}")


def _check_choice(params: SamplingParams, vocab_size: int, endings: Set[int]) -> None:
    """Raise `InvalidRequest` for parameters that leave no token to choose."""
    allowed = frozenset(params.allowed_token_ids)

    def forbids(tokens: Set[int]) -> bool:
        return allowed <= tokens if allowed else sum(token < vocab_size for token in tokens) == vocab_size

    if forbids(banned := {token for token, bias in params.logit_bias.items() if bias == -math.inf}):
        raise InvalidRequest("logit_bias", f"at least one token that is not at -inf, got {len(banned)} that are")
    if endings and forbids(endings | banned):
        field = "allowed_token_ids" if allowed else "stop_token_ids"
        raise InvalidRequest(field, "at least one token must not end the text before min_new_tokens, got none")


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """The next token of every row of logits [B, V] fp32, with the log probabilities that its request asks for.

    Log probabilities and ranks are of the model's own distribution, before temperature, penalties and masks. Waits for
    the device once for all rows and once more for each that is not greedy. An error leaves all generators as they were.
    Raises `NoChoice` for a row without a greatest logit that is finite.
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
    greedy = _most_likely(logits, any(state.plain for state in states))
    sampled = []
    for row, state in enumerate(states):
        token_id = greedy[row] if state.plain else _choose(logits[row : row + 1], state)
        sampled.append(Sampled(token_id, _logprobs(logits[row], token_id, state.params.logprobs)))
    return sampled


def _most_likely(logits: Tensor, wanted: bool) -> list[int]:
    """The first most likely token of every row, empty unless `wanted`. Raises `NoChoice` as `sample` does."""
    peaks, ids = logits.max(-1) if wanted else (logits.amax(-1), logits.new_empty(0))
    found: list[float] = torch.cat((peaks.double(), ids.double())).tolist()  # exact, and one wait for the device
    for row, peak in enumerate(found[: len(logits)]):
        if not math.isfinite(peak):
            raise NoChoice(f"logits of row {row} of {len(logits)}: the greatest must be finite, got {peak}")
    return [int(token) for token in found[len(logits) :]]


def _choose(scores: Tensor, state: SamplerState) -> int:
    """One token from scores [1, V]."""
    for process in state.processors:
        scores = process(state.generated, scores)
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
