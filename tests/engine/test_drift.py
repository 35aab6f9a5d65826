"""Decoding far past the prompt: generated tokens are found again, and errors do not add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from benchmarks.lib.recall_model import NAMES, WORDS, write_recall_model
from keysift.attention import Dense, Strategy, bind, make
from keysift.engine.config import EngineConfig
from keysift.engine.memory.budget import cache_spec
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel
from keysift.kvcache import PagedCache, Span, Step
from tests.models import llama

PROMPT, GENERATED = 96, 2112
"""Tokens; the prompt is longer than the sinks, so that all generated tokens have to be found."""
FACTS = torch.arange(PROMPT + 4, PROMPT + 100, 6)
"""Positions at which pairs of names are stated, in the first 100 tokens after the prompt. Each is queried once."""
QUESTIONS = torch.linspace(PROMPT + 300, PROMPT + GENERATED - 1, len(FACTS)).long()
SMALL = {"sink": 64, "window": 64, "budget": 64}
AT_ONCE = 16
"""Tokens of a step; `tests/attention/test_decode_rows.py` shows that they are decoded as if one by one."""


@torch.inference_mode()
def decode(
    model: LoadedModel, strategy: Strategy, tokens: Tensor, *, prompt: int = PROMPT, at_once: int = AT_ONCE
) -> Tensor:
    """Log probabilities [n - prompt, V] after each of these tokens [n] that follows the dense prompt."""
    spec = cache_spec(EngineConfig(), model)
    cache = PagedCache(spec, spec.pages_for(len(tokens)), max_sequences=1, max_len=len(tokens))
    cache.reserve(sequence := cache.open(), len(tokens))

    def run(step: Step, strategy: Strategy) -> Tensor:
        attend, every = bind(strategy, cache, step), torch.arange(len(step.positions))
        return model.forward(tokens[step.positions], step.positions, every, attend).log_softmax(-1)

    run(cache.prefill(Span(sequence, 0, prompt), 64), Dense())
    steps = torch.arange(prompt, len(tokens)).split(at_once)
    return torch.cat([run(cache.decode([Span(sequence, at, 1) for at in step.tolist()]), strategy) for step in steps])


def tokens_and_answers() -> tuple[Tensor, Tensor]:
    """Tokens [PROMPT + GENERATED] of filler, facts and questions, and the answers [facts]."""
    generator = torch.Generator().manual_seed(0)
    tokens = 1 + NAMES + torch.randint(WORDS, (PROMPT + GENERATED,), generator=generator)
    asked, answers = 1 + torch.randperm(NAMES, generator=generator)[: 2 * len(FACTS)].view(2, -1)
    tokens[0] = 0
    tokens[FACTS], tokens[FACTS + 1], tokens[QUESTIONS] = asked, answers, asked
    return tokens, answers


@pytest.fixture(scope="module")
def recalling(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_recall_model(tmp_path_factory.mktemp("recall"))
    return load(EngineConfig(model=str(folder), dtype="float32", device="cpu"), lambda message: None)


@pytest.mark.parametrize("at_once", [AT_ONCE, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("strategy", "right"),
    [
        (Dense(), 1.0),
        (make("retrieval", index="codes", **SMALL), 1.0),
        (make("streaming", sink=64, window=128), 0.0),
    ],
    ids=["dense", "codes", "streaming"],
)
def test_facts_among_the_first_generated_tokens(
    recalling: LoadedModel, strategy: Strategy, right: float, at_once: int
) -> None:
    tokens, answers = tokens_and_answers()
    said = decode(recalling, strategy, tokens, at_once=at_once)[QUESTIONS - PROMPT].argmax(-1)
    assert (said == answers).float().mean() == right


def test_errors_do_not_add_up(write_model: Callable[[PreTrainedConfig], Path]) -> None:
    """2,000 keys and values written under the strategy cost little compared with its choice at this token."""
    folder = write_model(llama(max_position_embeddings=4096, head_dim=16))
    model = load(EngineConfig(model=str(folder), dtype="float32", device="cpu"), lambda message: None)
    tokens = torch.randint(3, 259, (PROMPT + GENERATED,))
    codes = make("retrieval", index="codes", **SMALL | {"budget": 512})
    dense, far = (decode(model, strategy, tokens)[-256:] for strategy in (Dense(), codes))
    near = decode(model, codes, tokens, prompt=PROMPT + GENERATED - 256)
    assert 0 < kl(dense, far) < 1.5 * kl(dense, near)


def kl(dense: Tensor, sparse: Tensor) -> float:
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())
