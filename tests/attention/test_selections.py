"""Selections of prompt strategies, against oracles written from the papers, on whole, ragged and continued prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from keysift.attention import make
from keysift.attention.strategies import xattention as module
from tests.strategies import Row, prompt_rows

from . import selection_oracles as oracles
from .prompts import kept, mask, random_prompt, scaled, select
from .selection_oracles import Prompt

EDGES: dict[str, int] = {"sink": 4, "local": 6}


@dataclass(frozen=True)
class Choice:
    """A strategy, options for it, and the oracle that takes the same."""

    name: str
    oracle: Callable[..., Tensor]
    options: Mapping[str, object]

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def chosen(self, prompt: Prompt, **edges: int) -> Tensor:
        return mask(make(self.name, last_rows_dense=0, coverage=0.0, **EDGES | edges, **self.options), prompt)

    def expected(self, prompt: Prompt, slack: float, **edges: int) -> Tensor:
        return self.oracle(prompt, slack, **EDGES | edges, **self.options)


def flexprefill(gamma: float, tau: float, min_budget: int = 0, block_size: int = 8) -> Choice:
    options = {"gamma": gamma, "tau": tau, "min_budget": min_budget, "block_size": block_size}
    return Choice("flexprefill", oracles.flexprefill, options)


def sampleattention(alpha: float, slash_alpha: float, row_ratio: float, sampling: str = "stride") -> Choice:
    options = {"alpha": alpha, "slash_alpha": slash_alpha, "row_ratio": row_ratio, "sampling": sampling}
    return Choice("sampleattention", oracles.sampleattention, options | {"window_ratio": 0.08})


def minference(vertical_size: int, slash_size: int, last_q: int = 64) -> Choice:
    options = {"vertical_size": vertical_size, "slash_size": slash_size, "last_q": last_q}
    return Choice("minference", oracles.minference, options)


def xattention(threshold: float, stride: int) -> Choice:
    return Choice("xattention", oracles.xattention, {"threshold": threshold, "stride": stride})


def sift(threshold: float, looks: int, group: int, trust: float = 0.5) -> Choice:
    options = {"threshold": threshold, "looks": looks, "group": group, "trust": trust}
    return Choice("sift", oracles.sift, options)


CHOICES = [
    flexprefill(0.7, 0.0),
    flexprefill(0.6, 0.4, min_budget=8, block_size=5),
    flexprefill(0.5, 0.8, block_size=12),
    flexprefill(0.0, 0.0, min_budget=13, block_size=3),
    flexprefill(0.0, 0.8, min_budget=13, block_size=7),
    sampleattention(0.6, 0.0, 0.05),
    sampleattention(0.5, 0.4, 0.3),
    sampleattention(0.6, 0.0, 0.5, "tail"),
    minference(40, 120),
    minference(9, 0, last_q=5),
    xattention(0.8, 8),
    xattention(0.5, 6),
    Choice("oracle", oracles.oracle, {"threshold": 0.05}),
    sift(0.05, 4, 4),
    sift(0.08, 100, 6, trust=0.9),
]

PROMPTS = {
    "whole": random_prompt(96, 96, page=4, row=16),
    "ragged": random_prompt(93, 93, page=4, row=16, heads=(3, 1), seed=1),
    "continued": random_prompt(203, 75, page=4, row=16, heads=(2, 2), seed=2),
    "one short row": random_prompt(141, 13, page=4, row=16, seed=3),
    "large pages": random_prompt(235, 107, page=16, row=64, seed=4),
    "rows of a page": random_prompt(118, 70, page=8, row=8, seed=5),
    "pages of three": random_prompt(85, 43, page=3, row=6, seed=6),
    "another scale": random_prompt(96, 64, page=4, row=16, scale=0.8, seed=7),
    "three tokens": random_prompt(3, 3, page=4, row=16, seed=8),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_selections_are_those_of_the_oracle(choice: Choice, prompt: Prompt) -> None:
    chosen = choice.chosen(prompt)
    sure, possible = choice.expected(prompt, -1e-6), choice.expected(prompt, 1e-6)
    assert (sure <= chosen).all()
    assert (chosen <= possible).all()
    assert (possible & ~sure).sum() <= 2  # or the comparison says little


BY_MASS = [choice for choice in CHOICES if choice.options.get("gamma") != 0 and choice.name != "minference"]


@pytest.mark.parametrize("choice", BY_MASS, ids=str)
def test_the_models_scale_is_the_selections_scale(choice: Choice) -> None:
    prompt = PROMPTS["whole"]
    assert not torch.equal(choice.chosen(prompt), choice.chosen(scaled(prompt, 0.02)))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_logits_of_any_size_give_the_oracles_selection(choice: Choice) -> None:
    prompt = scaled(PROMPTS["continued"], 1e4)
    chosen = choice.chosen(prompt)
    sure, possible = choice.expected(prompt, -0.02), choice.expected(prompt, 0.02)
    if not choice.options.get("min_budget"):  # float32 cannot order masses that it rounds to 0
        assert (sure <= chosen).all()
        assert (chosen <= possible).all()
    selection = select(make(choice.name, **choice.options), prompt)
    assert selection.evidence.coverage is not None
    assert selection.evidence.coverage.isfinite().all()


EACH = pytest.mark.parametrize("row", prompt_rows(), ids=str)


@EACH
def test_unwritten_memory_changes_nothing(row: Row) -> None:
    strategy = row.make(last_rows_dense=0, **EDGES)
    for prompt in (PROMPTS["continued"], PROMPTS["three tokens"]):
        clean = select(strategy, prompt, poison=0.0)
        for poison in (float("nan"), 3e38):
            other = select(strategy, prompt, poison=poison)
            assert torch.equal(other.pages, clean.pages)
            assert clean.evidence.coverage is not None
            assert other.evidence.coverage is not None
            assert torch.equal(other.evidence.coverage, clean.evidence.coverage)


@EACH
def test_coverage_is_finite_for_logits_of_any_size(row: Row) -> None:
    coverage = select(row.make(), scaled(PROMPTS["continued"], 1e4)).evidence.coverage
    assert coverage is not None
    assert coverage.isfinite().all()


STRATEGIES = [(choice.name, choice.options) for choice in CHOICES] + [(row.name, row.sparse) for row in prompt_rows()]


@pytest.mark.parametrize(("name", "options"), STRATEGIES, ids=map(str, [*CHOICES, *prompt_rows()]))
def test_the_coverage_that_is_reported_is_that_of_the_selection(name: str, options: Mapping[str, object]) -> None:
    """Probes whose rows read everything keep everything; all others what an exact count of one of their rows gives."""
    prompt = PROMPTS["continued"]
    options = {**options, "last_rows_dense": 0, **EDGES}
    selection = select(make(name, **options), prompt)
    exact = kept(prompt, selection.mask(prompt.num_pages))  # [Hq, Nq]
    assert selection.evidence.coverage is not None
    assert (selection.evidence.coverage >= exact.amin(1) - 1e-5).all()
    assert (selection.evidence.coverage <= exact.amax(1) + 1e-5).all()
    wide = select(make(name, **options | {"coverage": 1.0}), prompt)
    assert wide.evidence.coverage is not None
    assert (wide.evidence.coverage > 1 - 1e-3).all()


@EACH
def test_the_last_rows_of_the_prompt_are_dense_and_only_they(row: Row) -> None:
    prompt = PROMPTS["continued"]
    dense = row.make(last_rows_dense=2, sink=0, local=0)
    full = (
        torch.arange(prompt.num_pages)
        <= torch.tensor([(prompt.start + queries[-1]) // prompt.page for queries in prompt.rows])[:, None]
    )
    chosen = mask(dense, prompt)
    assert torch.equal(chosen[-2:], full[-2:, None].expand_as(chosen[-2:]))
    sparse = mask(row.make(last_rows_dense=0, sink=0, local=0), prompt)
    assert torch.equal(mask(dense, prompt, tokens_left=prompt.row)[:-1], sparse[:-1])
    assert torch.equal(mask(dense, prompt, tokens_left=2 * prompt.row), sparse)


@pytest.mark.parametrize("stride", [1, 4])
def test_xattention_in_parts_of_some_rows_chooses_the_same(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(640, 45, page=4, row=8)
    strategy = make("xattention", stride=stride, threshold=0.5, sink=4, local=4)
    at_once = select(strategy, prompt)
    parts: list[int] = []
    masses = module._masses
    monkeypatch.setattr(module, "_masses", lambda *args: (parts.append(len(args[4])), masses(*args))[1])
    monkeypatch.setattr(module, "MOST_SCORES", 2 * 4 * 8 * 640 // stride**2)
    assert torch.equal(select(strategy, prompt).pages, at_once.pages)
    assert parts == [16, 16, 16], "two rows each"
