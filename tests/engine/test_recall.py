"""Recall of strategies in prompts with known answers, by a model that is right by construction, or misled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.lib.recall_model import recall_prompt, write_recall_model
from keysift.attention import Attend, Dense, Strategy
from keysift.attention import make as make_strategy
from keysift.engine import EngineConfig, Request
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel
from tests.engine.driver import Make, drain, finish_of, greedy, said
from tests.recall import probabilities

LENGTHS = [2048, 4096, pytest.param(8192, marks=pytest.mark.slow)]
RUNS = [1, 16]
"""Querying tokens in each quote: single ones among filler, or a stretch that is copied."""
ALL_SPARSE = {"dense_below": 0, "last_rows_dense": 0, "sink": 64, "local": 64}


@dataclass(frozen=True, slots=True)
class Found:
    spread: float
    """Share of right answers to queries all over the second half of the prompt."""
    end: float
    """Share of right answers to queries in the prompt's last row."""
    density: float


Ask = Callable[..., Found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    write_recall_model(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load(EngineConfig(model=str(folder), dtype="float32", device="cpu"), lambda message: None)


@pytest.fixture(scope="module")
def ask(model: LoadedModel) -> Ask:
    def ask(strategy: Strategy, length: int, run: int, prompts: int = 2) -> Found:
        """Prompts that results are averaged over."""
        return mean([answer(model, strategy, recall_prompt(length, seed, run=run)) for seed in range(prompts)])

    return ask


def answer(model: LoadedModel, strategy: Strategy, prompt: Any) -> Found:
    chances, density = probabilities(model, prompt.tokens, torch.cat((prompt.spread, prompt.end)), strategy)
    spread, end = torch.split(chances.argmax(-1), [len(prompt.spread), len(prompt.end)])
    return Found(prompt.right(prompt.spread, spread), prompt.right(prompt.end, end), density)


def mean(found: list[Found]) -> Found:
    rows = torch.tensor([(one.spread, one.end, one.density) for one in found])
    return Found(*rows.mean(0).tolist())


def sparse(name: str, **options: object) -> Strategy:
    """Options that make the whole prompt sparse, with few pages that are always read."""
    return make_strategy(name, **ALL_SPARSE | options)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("length", LENGTHS)
def test_dense_is_certain_of_every_answer(model: LoadedModel, length: int, run: int) -> None:
    prompt = recall_prompt(length, 0, run=run)
    asked = torch.cat((prompt.spread, prompt.end))
    assert len(asked) == 16 * run + 8
    chances, _ = probabilities(model, prompt.tokens, asked, Dense())
    assert chances.gather(1, prompt.answers[asked, None]).min() > 0.999


def test_transformers_gives_the_same_answers(folder: Path) -> None:
    prompt = recall_prompt(1024, 0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = torch.cat((prompt.spread, prompt.end))
    with torch.inference_mode():
        told = plain(prompt.tokens[None], logits_to_keep=asked).logits[0]
    assert torch.equal(told.argmax(-1), prompt.answers[asked])


def test_it_recalls_over_all_its_positions(
    model: LoadedModel, dense: Callable[[LoadedModel, Tensor, Tensor], Attend]
) -> None:
    prompt, half = recall_prompt(1024, 0), torch.arange(512)
    far = torch.cat((half, model.max_model_len - 512 + half))  # records at the start, queries at the very end
    asked = torch.cat((prompt.spread, prompt.end))
    logits = model.forward(prompt.tokens, far, asked, dense(model, torch.zeros(1024), far))
    assert torch.equal(logits.argmax(-1), prompt.answers[asked])


def test_its_tokens_are_words(model: LoadedModel) -> None:
    tokens = recall_prompt(1024, 0).tokens.tolist()
    text = model.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text.startswith("<start> word")
    assert model.tokenizer.encode(text) == tokens


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("oracle", {"threshold": 0.1}), ("sift", {"looks": 64})],
    ids=["oracle", "sift looking at all"],
)
def test_strategies_that_probe_every_query_find_everything(
    ask: Ask, name: str, options: dict[str, object], length: int, run: int
) -> None:
    found = ask(sparse(name, **options), length, run)
    assert (found.spread, found.end) == (1.0, 1.0)
    assert found.density < 0.65


@pytest.mark.parametrize("length", LENGTHS)
def test_sift_finds_quotes_anywhere(ask: Ask, length: int) -> None:
    """Looks see only 4 of 64 queries; a copied stretch shows in the means too."""
    found = ask(sparse("sift"), length, 16)
    assert found.spread > 0.95
    assert found.density < 0.65


def test_sift_finds_single_queries_among_few_pages(ask: Ask) -> None:
    """In a longer context the mean of a page hides a single key: only a look finds it."""
    found = ask(sparse("sift"), 2048, 1)
    assert (found.spread, found.end) == (1.0, 1.0)
    assert ask(sparse("sift", threshold=0.05), 4096, 1).spread < 0.5
    assert ask(sparse("sift", threshold=0.05, looks=64), 4096, 1).spread == 1.0


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("options", [{"gamma": 0.99, "min_budget": 0}, {}], ids=["gamma 0.99", "default"])
def test_flexprefill_finds_answers_to_the_last_queries(
    ask: Ask, options: dict[str, object], length: int, run: int
) -> None:
    found = ask(sparse("flexprefill", **options), length, run)
    assert found.end == 1.0
    assert found.density < 1


@pytest.mark.parametrize("run", RUNS)
def test_a_probe_of_the_last_queries_misses_answers_to_others(ask: Ask, run: int) -> None:
    """Answers that are found lie in pages, or on diagonals, that were chosen for something else."""
    blind = ask(sparse("flexprefill", min_budget=0), 4096, run)
    assert blind.end > 0.9
    assert blind.spread < 0.4
    assert ask(sparse("sift"), 4096, 16).spread > blind.spread + 0.5


def test_a_sample_misses_rare_single_queries(ask: Ask) -> None:
    """One of 20 queries is probed, and 95 % of the attention of those is on the first token and their neighbours."""
    found = ask(sparse("sampleattention"), 4096, 1)
    assert found.spread < 0.2
    assert found.end < 0.4


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_window_finds_nothing(ask: Ask, length: int, run: int) -> None:
    for blind in (sparse("ashape"), make_strategy("streaming", dense_below=0, sink=64, window=64)):
        found = ask(blind, length, run)
        assert max(found.spread, found.end) <= 0.05


def test_a_dense_last_row_finds_answers_to_its_own_queries_only(ask: Ask) -> None:
    found = ask(sparse("ashape", last_rows_dense=1), 4096, 1)
    assert found.end == 1.0
    assert found.spread <= 0.05


@pytest.mark.parametrize(
    ("strategy", "options", "right"),
    [
        ("dense", {}, 1.0),
        ("sift", ALL_SPARSE, 1.0),
        ("flexprefill", ALL_SPARSE | {"min_budget": 0}, 1.0),
        ("streaming", {"sink": 64, "window": 64}, 0.0),
    ],
)
def test_questions_after_a_cached_prompt(
    make: Make, folder: Path, strategy: str, options: dict[str, object], right: float
) -> None:
    """One request per fact: whole chunks of a prompt, in which sparse prefixes are shared, and a key."""
    engine = make(model=str(folder), prefill_chunk=1024, kv_memory=2**25)
    prompt, arguments = recall_prompt(3072, 0), tuple(f"{name}={value}" for name, value in options.items())
    shared, score = prompt.tokens[:2048].tolist(), 0
    for index, position in enumerate(prompt.end.tolist()):
        tokens = (*shared, int(prompt.tokens[position]))
        engine.add(Request(str(index), tokens, greedy(1), strategy=strategy, strategy_args=arguments))
        outputs = drain(engine)
        assert finish_of(outputs, str(index)).usage.cached_tokens == (len(shared) if index else 0)
        score += said(outputs, str(index)) == [int(prompt.answers[position])]
    assert score / len(prompt.end) == right
