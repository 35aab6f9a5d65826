"""From masses to page lists: the native twin against the reference, and both against the words of the contract."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from keysift.attention.ops.top_pages import TopPages, top_pages
from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend
from tests.problems import built

BUILT = built("keysift.attention.ops.top_pages.native")
NATIVE = pytest.mark.skipif(not BUILT, reason="not built")
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=NATIVE)])
EPSILONS = pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.2, 1.0])


@dataclass(frozen=True)
class Case:
    """Rows whose own pages are `lasts`."""

    lasts: tuple[int, ...]
    pages: int
    lists: int = 2
    group: int = 3
    sinks: int = 2
    window: int = 3
    budget: int = 6
    spread: float = 2.0
    steps: float = 0.0  # masses are multiples of it, so that many are equal

    @property
    def firsts(self) -> Tensor:
        return (torch.tensor(self.lasts) - self.window + 1).clamp(min=0).int()


CASES = {
    "ragged": Case((40, 0, 1, 5, 17, 44), 45),
    "group-of-1": Case((99, 64), 100, group=1, lists=3),
    "group-of-4": Case((99, 33), 100, group=4),
    "group-of-8": Case((99, 63), 128, group=8, lists=1),
    "no-budget": Case((99,), 100, budget=0),
    "no-sinks": Case((99,), 100, sinks=0),
    "more-budget-than-pages": Case((20, 11), 21, budget=30),
    "more-sinks-than-pages": Case((9, 3), 10, sinks=12),
    "all-in-the-window": Case((20, 11), 21, window=40),
    "one-peak": Case((199, 150), 200, spread=60.0),
    "flat": Case((199, 150), 200, spread=0.0),
    "equal-pages": Case((199, 150), 200, steps=1.0),
    "long": Case((2047, 1500), 2050, budget=300),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_masses(case: Case) -> Tensor:
    """[R, Hq, F]; NaN after a row's last page, and some that are -inf."""
    masses = torch.randn(len(case.lasts), case.lists * case.group, case.pages) * case.spread + 7
    if case.steps:
        masses = (masses / case.steps).round() * case.steps
        masses = masses[:, :: case.group].repeat_interleave(case.group, 1)  # else sums differ in their last bits
    masses[:, :, 4::9] = -torch.inf
    for row, last in enumerate(case.lasts):
        masses[row, :, last + 1 :] = torch.nan
    return masses


def run(backend: Backend, case: Case, masses: Tensor, epsilon: float) -> TopPages:
    with use_backend(backend):
        got = top_pages(
            masses,
            case.firsts,
            torch.tensor(case.lasts).int(),
            heads=case.lists,
            sinks=case.sinks,
            window=case.window,
            budget=case.budget,
            epsilon=epsilon,
        )
    assert got.pages.dtype == torch.int32
    assert got.pages.shape == (
        len(case.lasts),
        case.lists,
        min(case.pages, case.sinks + case.window + case.budget),
    )
    return got


def written_out(case: Case, masses: Tensor, epsilon: float) -> tuple[list[list[int]], Tensor]:
    """The pages of each row and list, and the share of each head that they hold, in fp64."""
    lists, kept = [], torch.zeros(masses.shape[:2], dtype=torch.float64)
    for (row, last), index in itertools.product(enumerate(case.lasts), range(case.lists)):
        heads = slice(index * case.group, (index + 1) * case.group)
        shares = masses[row, heads, : last + 1].double().softmax(-1).nan_to_num(0.0)
        mean = shares.mean(0).tolist()
        chosen = [page for page in range(last + 1) if page < case.sinks or page >= case.firsts[row]]
        left = 1 - sum(mean[page] for page in chosen)
        rest = sorted(set(range(last + 1)) - set(chosen), key=lambda page: (-mean[page], page))
        for page in rest[: case.budget]:
            if mean[page] <= 0 or (epsilon > 0 and left <= epsilon):
                break
            chosen.append(page)
            left -= mean[page]
        lists.append(sorted(chosen))
        kept[row, heads] = shares[:, chosen].sum(-1)
    return lists, kept


def as_lists(pages: Tensor) -> list[list[int]]:
    """Also checks that they ascend, and that only padding follows."""
    lists = [[page for page in row if page >= 0] for row in pages.flatten(0, 1).tolist()]
    for row, found in zip(pages.flatten(0, 1).tolist(), lists, strict=True):
        assert row == found + [-1] * (len(row) - len(found))
        assert found == sorted(set(found))
    return lists


@BACKENDS
@EPSILONS
@EACH_CASE
def test_the_contract(case: Case, backend: Backend, epsilon: float) -> None:
    masses = make_masses(case)
    got = run(backend, case, masses, epsilon)
    lists, kept = written_out(case, masses, epsilon)
    assert as_lists(got.pages) == lists
    torch.testing.assert_close(got.kept.double(), kept, atol=1e-5, rtol=1e-5)


@NATIVE
@EPSILONS
@EACH_CASE
def test_every_instruction_set(case: Case, epsilon: float) -> None:
    from keysift.kvcache.native.library import isas, use_isa

    masses = make_masses(case)
    reference = run("reference", case, masses, epsilon)
    for isa in isas():
        with use_isa(isa):
            got = run("native", case, masses, epsilon)
        assert torch.equal(got.pages, reference.pages)
        torch.testing.assert_close(got.kept, reference.kept, atol=1e-5, rtol=1e-5)


@BACKENDS
def test_masses_count_up_to_a_factor(backend: Backend) -> None:
    case = CASES["ragged"]
    masses = make_masses(case)
    factors = torch.linspace(-200, 300, case.lists * case.group)[:, None]
    got, plain = (run(backend, case, x, 0.2) for x in (masses + factors, masses))
    assert torch.equal(got.pages, plain.pages)
    torch.testing.assert_close(got.kept, plain.kept, atol=1e-4, rtol=1e-4)


@BACKENDS
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_head_without_a_share(backend: Backend, value: float) -> None:
    """Such a head chooses nothing; the others of its group do. Where no head has any, the zones stay."""
    case = CASES["group-of-4"]
    masses = make_masses(case)
    masses[:, :5] = value
    got = run(backend, case, masses, 0.0)
    lists, kept = written_out(case, masses, 0.0)
    assert as_lists(got.pages) == lists
    assert len(lists[0]) == case.sinks + case.window
    assert not got.kept[:, :5].any()
    torch.testing.assert_close(got.kept.double(), kept, atol=1e-5, rtol=1e-5)


@NATIVE
@EPSILONS
@pytest.mark.parametrize("name", ["ragged", "equal-pages", "long"])
def test_neither_company_nor_spare_pages_nor_threads_change_a_bit(
    name: str, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    masses = make_masses(case)
    together = run("native", case, masses, epsilon)
    for row, last in enumerate(case.lasts):
        alone = Case((last,), last + 1, case.lists, case.group, case.sinks, case.window, case.budget)
        monkeypatch.setattr("keysift.attention.ops.top_pages.native.num_threads", lambda row=row: row + 1)
        got = run("native", alone, masses[row : row + 1, :, : last + 1].contiguous(), epsilon)
        assert torch.equal(got.kept[0], together.kept[row])
        assert as_lists(got.pages) == as_lists(together.pages[row : row + 1])


@NATIVE
def test_what_native_cannot_do_is_left_to_the_reference() -> None:
    case = CASES["ragged"]
    for odd in (make_masses(case).double(), make_masses(case)[:, :, ::2]):
        with pytest.raises(BackendUnavailable, match="top_pages"):
            run("native", Case(case.lasts, odd.shape[2]), odd, 0.0)
