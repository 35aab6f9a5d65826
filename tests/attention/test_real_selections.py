"""Selections on queries and keys of a real model: the embedded one, reading this repository's licence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from keysift.attention import make
from keysift.engine.config import EngineConfig
from keysift.engine.model import embedded
from keysift.engine.model.load import load

from .prompts import kept, mask, select
from .selection_oracles import Prompt

TOKENS, CHUNK, LAYERS = 1490, 530, (3, 6, 9)

pytestmark = pytest.mark.skipif(importlib.util.find_spec(embedded.PACKAGE) is None, reason=f"needs {embedded.INSTALL}")


class Enough(Exception):
    """The later layers are not needed."""


@pytest.fixture(scope="module")
def prompts() -> dict[int, Prompt]:
    """The last chunk of the text, by layer."""
    model = load(EngineConfig(dtype="float32"), lambda message: None)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    tokens = torch.tensor(model.tokenizer.encode(text)[:TOKENS])
    assert len(tokens) == TOKENS
    found: dict[int, Prompt] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in LAYERS:
            found[layer] = Prompt(q[-CHUNK:].double(), k.double(), 16, 64, model.scale)
        if len(found) == len(LAYERS):
            raise Enough
        queries, keys, values = (each.transpose(0, 1)[None] for each in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=model.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    positions = torch.arange(TOKENS)
    with pytest.raises(Enough):
        model.forward(tokens, positions, positions[-1:], attend)
    return found


def share(part: Tensor, whole: Tensor) -> float:
    return float((part & whole).sum() / whole.sum())


@pytest.mark.parametrize("layer", LAYERS)
def test_sift_finds_most_pages_of_the_oracle(prompts: dict[int, Prompt], layer: int) -> None:
    prompt = prompts[layer]
    wanted = mask(make("oracle", sink=0, local=0, last_rows_dense=0), prompt)
    chosen = mask(make("sift", threshold=0.006, coverage=0.0, last_rows_dense=0), prompt)
    assert share(chosen, wanted) > 0.82
    assert chosen.sum() < 1.5 * wanted.sum()
    assert kept(prompt, chosen).mean(1).min() > 0.9


@pytest.mark.parametrize("layer", LAYERS)
def test_flexprefill_keeps_its_gamma(prompts: dict[int, Prompt], layer: int) -> None:
    prompt = prompts[layer]
    strategy = make("flexprefill", gamma=0.95, min_budget=64, last_rows_dense=0)
    selection = select(strategy, prompt)
    assert selection.evidence.coverage is not None
    assert (selection.evidence.coverage.amin(0) > 0.95 - 1e-4).all()  # of its representatives
    exact = kept(prompt, selection.mask(prompt.num_pages))
    assert exact.mean(1).min() > 0.94  # of all queries, mean of each head
    more = select(make("flexprefill", gamma=0.99, min_budget=64, last_rows_dense=0), prompt)
    assert kept(prompt, more.mask(prompt.num_pages)).mean() > exact.mean()


@pytest.mark.parametrize("layer", LAYERS)
def test_the_worst_query_fares_better_than_by_a_window_of_the_same_size(prompts: dict[int, Prompt], layer: int) -> None:
    prompt = prompts[layer]
    chosen = mask(make("sift", threshold=0.006, coverage=0.0, last_rows_dense=0), prompt)
    blind = mask(make("streaming", sink=128, window=640), prompt).repeat_interleave(3, 1)
    assert chosen.sum() < blind.sum()
    assert kept(prompt, chosen).min() > kept(prompt, blind).min() + 0.03
