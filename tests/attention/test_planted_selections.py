"""Planted structure is found: diagonals, columns, blocks and needles, also where published code loses them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from keysift.attention import make
from tests.strategies import Row, prompt_rows

from .prompts import kept, mask
from .selection_oracles import Prompt

BARE: dict[str, object] = {"coverage": 0.0, "sink": 0, "local": 0, "last_rows_dense": 0}
PAGE, ROW, START, DIM = 16, 64, 384, 64


def directions(*shape: int) -> Tensor:
    """Random unit vectors, nearly at right angles to each other."""
    return torch.nn.functional.normalize(torch.randn(*shape, DIM, dtype=torch.float64), dim=-1)


def prompt_of(q: Tensor, k: Tensor) -> Prompt:
    return Prompt(q, k, PAGE, ROW, 1.0)


@pytest.mark.parametrize("chunk", [128, 117])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flexprefill", {"gamma": 0.9, "tau": 0.0, "min_budget": 0}),
        ("minference", {"vertical_size": 0, "slash_size": 128}),
        ("sampleattention", {"alpha": 0.0, "slash_alpha": 0.9, "window_ratio": 0.0, "row_ratio": 0.3}),
    ],
    ids=["flexprefill", "minference", "sampleattention"],
)
def test_a_diagonal_keeps_its_mass_wherever_it_lies_on_the_page_grid(
    name: str, options: dict[str, object], chunk: int
) -> None:
    """Published code keeps ``1 - r / block`` of one that lies r tokens off its grid. One head for each offset."""
    offsets = torch.arange(1, 3 * ROW + 1)
    k = directions(START + chunk, 1)
    q = 16 * k[torch.arange(START, START + chunk)[:, None] - offsets, 0]  # [Nq, Hq, D]
    prompt = prompt_of(q, k)
    chosen = mask(make(name, **BARE, **options), prompt)
    assert prompt.weights.max(-1).values.mean() > 0.99
    assert kept(prompt, chosen).mean(1).min() >= 0.9
    assert chosen.float().mean() < 0.6  # nor by reading everything


@pytest.mark.parametrize("row", [row for row in prompt_rows(PAGE) if not row.blind], ids=str)
@pytest.mark.parametrize("column", [0, 15, 100, START - 1, START])
def test_a_column_that_all_read_is_found(row: Row, column: int) -> None:
    common = directions(1, 1)
    k = directions(START + 128, 1)
    k[column] = common
    q = 24 * common + directions(128, 2)
    chosen = mask(row.make(**BARE), prompt_of(q, k))
    assert chosen[:, :, column // PAGE].all()
    assert chosen.float().mean() < 0.6


@pytest.mark.parametrize("name", ["sift", "oracle"])
@pytest.mark.parametrize("where", [3, 100, 200, START + 50])
def test_a_needle_that_a_few_queries_of_one_row_read_is_found_by_that_row_alone(name: str, where: int) -> None:
    needle = directions(1)
    k = directions(START + 256, 1)
    k[where] = needle
    q = directions(256, 2)
    q[150:166, 1] = 24 * needle  # of the row of queries 128 to 191, head 1
    chosen = mask(make(name, **BARE, threshold=0.2), prompt_of(q, k))[:, :, where // PAGE]
    own = torch.tensor([(START + row * ROW) // PAGE <= where // PAGE for row in range(4)])
    assert chosen.tolist() == [[bool(own[row]), bool(own[row]) or row == 2] for row in range(4)]


def blocks(loudness: Tensor) -> tuple[Prompt, Tensor]:
    """Two heads over keys that are alike within a page, and the page that each row of the first head asks for, [R].

    Loudness of the rows' queries [R]. The second head reads one key of a page in a random direction: no mean shows it.
    """
    rows = len(loudness)
    pages = START // PAGE
    means = directions(pages + rows * ROW // PAGE)
    k = means.repeat_interleave(PAGE, 0)[:, None]
    asked = torch.randperm(pages - 1)[:rows] + 1
    q = (loudness[:, None] * means[asked]).repeat_interleave(ROW, 0)[:, None]
    return prompt_of(q, k), asked


def test_a_head_that_pages_explain_is_chosen_row_by_row() -> None:
    prompt, asked = blocks(torch.full((4,), 16.0))
    chosen = mask(make("flexprefill", gamma=0.9, tau=0.1, min_budget=0, block_size=PAGE, **BARE), prompt)[:, 0]
    for row, page in enumerate(asked.tolist()):
        assert chosen[row, page]
        assert not chosen[row, [other for other in asked.tolist() if other != page]].any()
    never = mask(make("flexprefill", gamma=0.9, tau=0.0, min_budget=0, block_size=PAGE, **BARE), prompt)[:, 0]
    assert never[:, asked[-1]].all()  # vertical-slash: what the last row reads
    assert not never[0, asked[0]]


def test_a_head_that_pages_do_not_explain_is_vertical_slash() -> None:
    k = directions(START + 256, 1)
    q = 16 * k[torch.arange(START, START + 256) - 100]
    prompt = prompt_of(q, k)
    chosen, never = (mask(make("flexprefill", gamma=0.9, tau=tau, min_budget=0, **BARE), prompt) for tau in (0.1, 0.0))
    assert torch.equal(chosen, never)
    assert kept(prompt, chosen).min() > 0.9


def test_every_query_aware_row_keeps_gamma_for_itself() -> None:
    """Published code spends one budget on all rows: loud ones take it, and flat ones, which come late, go without."""
    prompt, _ = blocks(torch.tensor([20.0, 18.0, 2.0, 1.0]))
    chosen = mask(make("flexprefill", gamma=0.8, tau=0.3, min_budget=0, block_size=PAGE, **BARE), prompt)
    counts = chosen[:, 0].sum(-1)
    assert counts[0] <= 6  # its own four, and those that it asks for
    assert (kept(prompt, chosen) > 0.75).all()


def test_a_short_row_and_a_page_in_the_making_do_not_hide_that_pages_explain_a_head() -> None:
    """The estimate knows full pages only, and is compared on those; the mean is that of the queries there are."""
    prompt, asked = blocks(torch.full((4,), 7.0))
    q, k = prompt.q[: 3 * ROW + 24], prompt.k[: START + 3 * ROW + 24]
    q[2 * ROW :] = q[2 * ROW]
    k[-8:] = q[-1] / 4
    prompt = prompt_of(q, k)
    chosen = mask(make("flexprefill", gamma=0.9, tau=0.1, min_budget=0, block_size=PAGE, **BARE), prompt)[:, 0]
    assert chosen[0, asked[0]]
    assert not chosen[3, asked[0]]


def test_a_key_that_its_page_hides_makes_the_estimate_untrustworthy() -> None:
    """It holds 7 % of the last row's attention, and its page nothing of the estimate, not even in float32."""
    prompt, asked = blocks(torch.full((4,), 200.0))
    hidden = int(asked[-1]) * PAGE - 1
    prompt.k[hidden] = prompt.k[int(asked[-1]) * PAGE] * (1 + math.log(16 * 0.075) / 200)
    chosen = mask(make("flexprefill", gamma=0.9, tau=0.1, min_budget=0, block_size=PAGE, **BARE), prompt)[:, 0]
    assert chosen[0, asked[-1]]
    assert not chosen[0, asked[0]]


@pytest.mark.parametrize("last_rows_dense", [0, 1])
def test_an_estimate_that_loses_what_the_representatives_read_is_not_used(last_rows_dense: int) -> None:
    """However far apart it may be from their attention, and though their own row may be dense."""
    k = directions(START + 128, 1)
    k[160:176] = 0.5 * k[160]
    q = (60 * (k[160] + k[37]))[None].expand(128, 1, DIM)
    options = BARE | {"last_rows_dense": last_rows_dense}
    chosen = mask(make("flexprefill", gamma=0.9, tau=1.0, min_budget=0, **options), prompt_of(q, k))
    assert chosen[:, :, 37 // PAGE].all()


@pytest.mark.parametrize("block_size", [1, 16, 24, 32, 64])
def test_budgets_are_tokens_whatever_the_block_size(block_size: int) -> None:
    """Nothing but the budget chooses: 48 tokens are three columns and three bands, or the blocks that hold so many."""
    k = directions(START + 64, 1)
    q = torch.cat([directions(63, 1), 8 * k[[40]] + 7 * k[[90]] + 6 * k[[140]]])
    q[:-1] = q[-1]
    chosen = mask(
        make("flexprefill", gamma=0.0, tau=0.0, min_budget=48, block_size=block_size, **BARE), prompt_of(q, k)
    )
    unit = max(block_size // PAGE, 1)
    units, own = -(-3 // unit), ROW // PAGE
    assert chosen[0, 0, [2, 5, 8][:units]].all()
    assert chosen.sum() <= units * unit + units * (unit + own) + own


@pytest.mark.parametrize("tokens", [256, 512])
@pytest.mark.parametrize("stride", [8, 16])
def test_lengths_without_padding_are_not_masked(tokens: int, stride: int) -> None:
    """Published code hides everything before the last chunk where there is nothing to pad."""
    common = directions(1, 1)
    k = directions(tokens, 1)
    k[32:48] = common
    q = 16 * common + directions(tokens // 2, 1)
    chosen = mask(make("xattention", threshold=0.9, stride=stride, **BARE), prompt_of(q, k))
    assert chosen[:, :, 2].all()
    assert chosen.float().mean() < 0.7
