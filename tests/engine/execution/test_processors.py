"""Logits processors: equal to those of transformers, at a cost that does not grow."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from keysift.engine.execution.processors import processors
from keysift.engine.request import SamplingParams

VOCABULARY = 24
EOS = frozenset({3})
tokens = st.integers(0, VOCABULARY - 1)


def library(params: SamplingParams, prompt: list[int]) -> LogitsProcessorList:
    """The same processors of transformers, which take the prompt before the generated tokens."""
    built: list[Any] = []
    if params.logit_bias:
        built.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        built.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if allowed := sorted(set(params.allowed_token_ids)):
        built.append(PrefixConstrainedLogitsProcessor(lambda _batch, _ids: allowed, num_beams=1))
    if params.min_new_tokens and (endings := sorted(params.endings(EOS))):
        built.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, endings))
    return LogitsProcessorList(built)


@given(
    prompt=st.lists(tokens, min_size=1, max_size=8),
    generated=st.lists(tokens, max_size=8),
    bias=st.dictionaries(tokens, st.floats(-9, 9) | st.just(-math.inf), max_size=VOCABULARY),
    allowed=st.lists(tokens, max_size=6),
    endings=st.lists(tokens, max_size=4),
    penalty=st.sampled_from([1.0, 0.5, 1.3]),
    least=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_every_step_equals_that_of_transformers(
    prompt: list[int],
    generated: list[int],
    bias: dict[int, float],
    allowed: list[int],
    endings: list[int],
    penalty: float,
    least: int,
    seed: int,
) -> None:
    params = SamplingParams(
        logit_bias=bias,
        allowed_token_ids=tuple(allowed),
        stop_token_ids=tuple(endings),
        repetition_penalty=penalty,
        min_new_tokens=least,
    )
    ours, theirs = processors(params, prompt, EOS), library(params, prompt)
    scores = torch.randn(len(generated) + 1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    for step, row in enumerate(scores):
        done: Tensor = row[None]
        for process in ours:
            done = process(generated[:step], done)
        assert torch.equal(done, theirs(torch.tensor([prompt + generated[:step]]), row[None]))


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": dict.fromkeys(range(50_000), 1.0)},
        {"allowed_token_ids": tuple(range(50_000))},
        {"stop_token_ids": tuple(range(50_000)), "min_new_tokens": 9},
    ],
    ids=lambda params: next(iter(params)),
)
def test_long_lists_cost_no_more_each_token(params: dict[str, Any]) -> None:
    (process,) = processors(SamplingParams(**params), (), EOS)
    scores = torch.randn(1, 60_000)
    process([], scores)
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        process([], scores)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 1e-3


def test_allowed_tokens_that_the_model_masks_become_equally_likely() -> None:
    params = SamplingParams(allowed_token_ids=(2, 5))
    scores = torch.zeros(1, VOCABULARY).index_fill(1, torch.tensor([2, 5]), -math.inf)
    (ours,), theirs = processors(params, (), EOS), library(params, [])
    assert torch.equal(ours([], scores), theirs(torch.tensor([[0]]), scores))


def test_ids_that_the_model_cannot_choose_are_left_out() -> None:
    params = SamplingParams(repetition_penalty=2.0, min_new_tokens=2)
    scores = torch.ones(1, VOCABULARY)
    for process in processors(params, (1, VOCABULARY + 5), frozenset({0, VOCABULARY})):
        scores = process([], scores)
    assert scores[0, :3].tolist() == [-math.inf, 0.5, 1.0]
