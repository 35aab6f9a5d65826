"""Choices of pages that depend on the last token's, and what they come to, written out in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Rows whose own pages are `lasts`, and of which every third forgets what its last token read."""

    lasts: tuple[int, ...]
    pages: int
    lists: int = 2
    group: int = 3
    sinks: int = 2
    window: int = 3
    budget: int = 12
    queried: int = 6
    most: int = 2
    factor: float = 1.25
    keep: float = 0.9
    epsilon: float = 0.1
    spread: float = 2.0
    steps: float = 0.0  # masses and averages are multiples of something, so that many are equal
    residents: float = 1.0  # of the budget, and one page more that has left the window

    @property
    def firsts(self) -> Tensor:
        return (torch.tensor(self.lasts) - self.window + 1).clamp(min=0).int()

    @property
    def options(self) -> dict[str, float]:
        names = ("sinks", "window", "budget", "queried", "most", "factor", "keep", "epsilon")
        return {"heads": self.lists, **{name: getattr(self, name) for name in names}}


CASES = {
    "ragged": Case((40, 0, 1, 5, 17, 44, 30), 45),
    "group-of-1": Case((99, 64), 100, group=1, lists=3),
    "group-of-8": Case((99, 63), 128, group=8, lists=1),
    "nothing-comes-in": Case((99, 64), 100, most=0, epsilon=1.0),
    "any-number-comes-in": Case((99, 64), 100, most=-1, epsilon=1.0),
    "no-comparison": Case((99, 64), 100, most=-1, factor=0.0, epsilon=1.0),
    "nothing-is-refused": Case((99, 64), 100, most=0, epsilon=0.0),
    "bound_exceeded": Case((99, 64), 100, most=1, epsilon=0.02),
    "reluctant": Case((99, 64), 100, factor=3.0, most=-1, epsilon=0.5),
    "no-budget": Case((99, 50), 100, budget=0),
    "nothing-queried": Case((99, 50), 100, queried=0),
    "queried-beyond-the-budget": Case((99, 50), 100, queried=40, budget=8),
    "no-sinks": Case((99, 50), 100, sinks=0),
    "more-budget-than-pages": Case((20, 11), 21, budget=30, queried=30),
    "more-sinks-than-pages": Case((9, 3), 10, sinks=12),
    "all-in-the-window": Case((20, 11), 21, window=40),
    "room": Case((99, 64), 100, residents=0.5),
    "no-residents": Case((99, 64), 100, residents=0.0),
    "one-peak": Case((199, 150), 200, spread=30.0),
    "equal-pages": Case((199, 150), 200, steps=1.0, factor=1.0),
    "no-memory": Case((99, 64), 100, keep=0.0),
    "long": Case((2047, 1500), 2050, budget=300, queried=100, most=20),
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Arguments of the op: NaN after a row's last page and in averages of an unknown past, some masses -inf."""
    torch.manual_seed(seed)
    rows = len(case.lasts)
    masses = torch.randn(rows, case.lists * case.group, case.pages) * case.spread + 7
    averages = torch.rand(rows, case.lists, case.pages) ** 4 / 20
    if case.steps:
        masses = (masses / case.steps).round() * case.steps
        masses = masses[:, :: case.group].repeat_interleave(case.group, 1)  # else sums differ in their last bits
        averages = (averages * 40).round() / 40
    masses[:, :, 4::9] = -torch.inf
    known = torch.arange(rows) % 3 != 2
    read = torch.zeros(rows, case.lists, case.pages, dtype=torch.bool)
    for row, last in enumerate(case.lasts):
        masses[row, :, last + 1 :] = torch.nan
        averages[row, :, last:] = 0.0 if known[row] else torch.nan
        for index in range(case.lists):
            read[row, index] = past(case, int(case.firsts[row]), last)
    read[~known] = True
    return masses, case.firsts, torch.tensor(case.lasts).int(), known, read, averages


def past(case: Case, first: int, last: int) -> Tensor:
    """[F] bool, what the token before may have read: both zones as of then, and residents between them."""
    page = torch.arange(case.pages)
    zone = (page < case.sinks) | (page >= max(first - 1, 0))
    between = (~zone).nonzero().flatten()
    count = int(case.budget * case.residents)
    zone[between[torch.randperm(len(between))][:count]] = True
    return zone & (page < last)


@dataclass
class List:
    """Result of one list, written out in fp64."""

    chosen: set[int]
    refused: set[int]
    averages: list[float]
    overlap: float
    bound_exceeded: bool
    kept: Tensor


def written_out(case: Case, inputs: Inputs) -> Iterator[List]:
    """Row by row, list by list."""
    masses, firsts, lasts, known, read, averages = inputs
    for row, index in itertools.product(range(len(case.lasts)), range(case.lists)):
        heads = slice(index * case.group, (index + 1) * case.group)
        shares = masses[row, heads, : int(lasts[row]) + 1].double().softmax(-1).nan_to_num(0.0)
        before = set(read[row, index].nonzero().flatten().tolist()) if known[row] else None
        made = one_list(case, shares.mean(0).tolist(), int(firsts[row]), before, averages[row, index].tolist())
        made.kept = shares[:, sorted(made.chosen)].sum(-1)
        yield made


def one_list(case: Case, score: list[float], first: int, before: set[int] | None, average: list[float]) -> List:
    """Forced pages F, queried pages Q, residents R; the sets of the description under their names."""
    forced = {page for page in range(len(score)) if page < case.sinks or page >= first}
    others = [page for page in range(len(score)) if page not in forced]
    by_score = sorted((page for page in others if score[page] > 0), key=lambda page: (-score[page], page))
    if before is None:
        chosen = forced | set(by_score[: case.budget])
        return List(chosen, set(), score, math.nan, False, torch.empty(0))
    ema = [case.keep * average[page] + (1 - case.keep) * score[page] for page in range(len(score))]
    queried = by_score[: min(case.queried, case.budget)]
    resident = before & set(others)
    victims = sorted(resident - set(queried), key=lambda page: (ema[page], page))
    while len(resident) > case.budget:
        resident.remove(victims.pop(0))
    new = [page for page in queried if page not in resident]
    bounded = admit(case, new, set(resident), list(victims), score, ema)
    count = bounded
    while sum(score[page] for page in new[count:]) > case.epsilon:
        count += 1
    for page in new[:count]:
        if len(resident) == case.budget:
            resident.remove(victims.pop(0))
        resident.add(page)
    chosen = forced | resident
    overlap = len(chosen & before) / len(chosen)
    return List(chosen, set(queried) - chosen, ema, overlap, count > bounded, torch.empty(0))


def admit(
    case: Case, new: list[int], resident: set[int], victims: list[int], score: list[float], ema: list[float]
) -> int:
    """Number of candidates within the bound."""
    count = 0
    for page in new:
        if 0 <= case.most <= count:
            break
        if len(resident) == case.budget:
            victim = victims.pop(0)
            if case.factor and not score[page] > case.factor * max(score[victim], ema[victim]):
                break
            resident.remove(victim)
        resident.add(page)
        count += 1
    return count
