"""The Triton twin of `top_pages`: the reference's lists, its ties, and bits that no longer list changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from keysift.attention.ops.top_pages import TopPages, top_pages
from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend

pytest.importorskip("triton")


@dataclass(frozen=True)
class Case:
    pages: int
    heads: tuple[int, int] = (4, 2)
    rows: int = 3
    sinks: int = 2
    window: int = 3
    budget: int = 6
    epsilon: float = 0.0
    spread: float = 2.0


CASES = {
    "plain": Case(40),
    "a share": Case(40, epsilon=0.1),
    "a share that the zones hold": Case(40, epsilon=1.0),
    "hardly a share": Case(40, epsilon=1e-3, budget=40),
    "no budget": Case(40, budget=0),
    "everything": Case(40, budget=40),
    "no zones": Case(40, sinks=0, window=1),
    "more zones than pages": Case(5, sinks=20, window=9),
    "one head a list": Case(33, heads=(3, 3)),
    "groups of three": Case(300, heads=(6, 2), budget=100, epsilon=0.01),
    "one page": Case(1),
    "masses far apart": Case(64, spread=60.0, budget=50),
    "many pages": Case(1500, heads=(8, 1), rows=2, budget=64, epsilon=0.3),
}


def masses_of(case: Case) -> Tensor:
    """[R, Hq, F]; some pages that no head found, some that only one of a group did."""
    masses = torch.randn(case.rows, case.heads[0], case.pages) * case.spread
    return masses.masked_fill(torch.rand_like(masses) < 0.1, -torch.inf)


def zones_of(case: Case) -> tuple[Tensor, Tensor]:
    """Windows at the end, in the middle and at the start of the pages."""
    lasts = torch.linspace(case.pages - 1, 0, case.rows).int()
    return (lasts - case.window + 1).clamp(min=0).int(), lasts


def run(backend: Backend, case: Case, masses: Tensor, zones: tuple[Tensor, Tensor]) -> TopPages:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    with use_backend(backend):
        chosen = top_pages(
            masses.to(device),
            *(zone.to(device) for zone in zones),
            heads=case.heads[1],
            sinks=case.sinks,
            window=case.window,
            budget=case.budget,
            epsilon=case.epsilon,
        )
    return TopPages(*(part.cpu() for part in chosen))


def assert_same(case: Case, masses: Tensor, zones: tuple[Tensor, Tensor]) -> TopPages:
    chosen, expected = (run(backend, case, masses, zones) for backend in ("triton", "reference"))
    assert chosen.pages.dtype == torch.int32
    assert torch.equal(chosen.pages, expected.pages)
    torch.testing.assert_close(chosen.kept, expected.kept, rtol=1e-5, atol=1e-6)
    return chosen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_lists_are_those_of_the_reference(case: Case) -> None:
    assert_same(case, masses_of(case), zones_of(case))


@pytest.mark.parametrize("budget", [1, 5, 9])
def test_of_equal_pages_the_lower_ones_are_taken(budget: int) -> None:
    case = Case(24, budget=budget)
    masses = torch.tensor([0.0, 1.0, 2.0]).repeat(3, 4, 8)
    chosen = assert_same(case, masses, zones_of(case))
    heaviest, next_ones = range(2, 21, 3), range(4, 21, 3)
    assert chosen.pages[0, 0].tolist() == sorted([0, 1, 21, 22, 23, *[*heaviest, *next_ones][:budget]])


def test_a_share_is_cut_between_equal_pages() -> None:
    case = Case(16, rows=1, sinks=0, window=1, budget=16, epsilon=0.45)
    chosen = assert_same(case, torch.zeros(1, 4, 16), (torch.tensor([15]).int(), torch.tensor([15]).int()))
    assert chosen.pages[0, 0].tolist() == [*range(8), 15, *[-1] * 7], "9 of 16 leave out 7 / 16 < 0.45"


def test_pages_whose_share_is_nothing_but_rounding_are_taken_where_the_budget_allows() -> None:
    case = Case(20, rows=1, budget=6)
    masses = torch.full((1, 4, 20), -200.0)
    masses[..., 0], masses[..., 7:12] = 0.0, -torch.inf
    chosen = assert_same(case, masses, zones_of(case))
    assert chosen.pages[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 12, 17, 18, 19]


def test_nothing_found_leaves_the_zones() -> None:
    case = Case(20)
    chosen = assert_same(case, torch.full((3, 4, 20), -torch.inf), zones_of(case))
    assert chosen.pages[0, 0].tolist() == [0, 1, 17, 18, 19, *[-1] * 6]
    assert not chosen.kept.any()


@pytest.mark.parametrize("epsilon", [0.2, 0.5, 0.7])
def test_a_head_without_a_share_leaves_its_part_out(epsilon: float) -> None:
    """The share left out is a mean over the heads of a group, including those that found no page."""
    case = Case(200, heads=(4, 2), budget=150, epsilon=epsilon)
    masses = torch.randn(3, 4, 200)
    masses[:, 1] = masses[1, 2:] = -torch.inf
    assert_same(case, masses, zones_of(case))


def test_neither_company_nor_longer_lists_change_a_bit() -> None:
    case = Case(700, rows=3, epsilon=0.2, budget=80)
    masses, zones = masses_of(case), (torch.tensor([60, 690, 300]).int(), torch.tensor([63, 699, 301]).int())
    together = run("triton", case, masses, zones)
    alone = run("triton", case, masses[:1, :, :70], (zones[0][:1], zones[1][:1]))
    assert torch.equal(together.kept[:1], alone.kept)
    assert torch.equal(together.pages[0, :, : alone.pages.shape[2]], alone.pages[0])


def test_no_rows_and_no_pages() -> None:
    case = Case(0, rows=2)
    none = torch.zeros(2, dtype=torch.int32)
    assert assert_same(case, torch.empty(2, 4, 0), (none, none - 1)).pages.shape == (2, 2, 0)
    assert run("triton", case, torch.empty(0, 4, 9), (none[:0], none[:0])).pages.shape == (0, 2, 9)


PIECES = {
    "pieces": Case(700),
    "a share": Case(700, epsilon=0.3, spread=3.0),
    "a share of equal pages": Case(500, epsilon=0.985, spread=0.0, budget=20),
    "equal pages": Case(500, spread=0.0),
    "the budget in one piece": Case(300, budget=30, spread=30.0),
    "no budget": Case(300, budget=0),
    "no budget and no zones": Case(300, budget=0, sinks=0, window=0),
    "as much as one program holds": Case(700, budget=80),
    "a group": Case(300, heads=(8, 1), epsilon=0.1),
    "a window over two pieces": Case(260, sinks=0, window=20),
}


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("case", PIECES.values(), ids=PIECES.keys())
def test_a_list_in_pieces_has_the_bits_of_a_whole_one(
    case: Case, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a row that has no share, a head that has none of it, and one that a single page takes it from."""
    masses, zones = masses_of(case), zones_of(case)
    if not case.window:
        zones = (zones[1] + 1, zones[1])
    masses[0, 1, 7], masses[1, 0] = value, -torch.inf
    whole = assert_same(case, masses, zones)
    monkeypatch.setattr("keysift.kvcache.ops.heaviest.triton.MAX_PAGES", 256)
    pieces = run("triton", case, masses, zones)
    assert torch.equal(pieces.pages, whole.pages)
    assert torch.equal(pieces.kept, whole.kept)


def test_a_row_does_not_know_of_a_longer_list_than_a_program_holds() -> None:
    case = Case(8200, heads=(2, 1), rows=2, epsilon=0.1, budget=40)
    masses, zones = masses_of(case), (torch.tensor([8190, 60]).int(), torch.tensor([8192, 62]).int())
    together = assert_same(case, masses, zones)
    alone = run("triton", replace(case, pages=63), masses[1:, :, :63], (zones[0][1:], zones[1][1:]))
    assert torch.equal(together.kept[1:], alone.kept)
    assert torch.equal(together.pages[1], alone.pages[0])


@pytest.mark.parametrize("masses", [torch.zeros(1, 1, 8193), torch.zeros(1, 1, 9, dtype=torch.float64)])
def test_calls_that_the_twin_cannot_do_are_refused(masses: Tensor) -> None:
    """Two pieces that find more pages than a program holds, and another dtype."""
    case = Case(masses.shape[2], heads=(1, 1), rows=1, budget=5000)
    with pytest.raises(BackendUnavailable, match="top_pages"):
        run("triton", case, masses, zones_of(case))


@pytest.mark.gpu
def test_the_device_is_never_waited_for() -> None:
    case = CASES["groups of three"]
    masses, zones = masses_of(case).cuda(), tuple(zone.cuda() for zone in zones_of(case))
    numbers = {"heads": 2, "sinks": 2, "window": 3, "budget": 100, "epsilon": 0.01}
    expected = top_pages(masses, *zones, **numbers)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = top_pages(masses, *zones, **numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*parts) for parts in zip(chosen, expected, strict=True))
