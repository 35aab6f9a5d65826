"""Intervals and errors against values worked out elsewhere, and against simulated repetitions."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysift.engine.measure.evaluation.statistics import interval, paired, perplexity_change

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(hits: int, count: int, low: float, high: float) -> None:
    """The four examples of Newcombe (1998), to the four digits that are printed there."""
    found = interval([1.0] * hits + [0.0] * (count - hits))
    assert found == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_other_levels() -> None:
    """Solved by hand: at 8 of 10 and z = 1.6449 the bounds are the roots of (p - 0.8)^2 = z^2 p(1 - p) / 10."""
    z = 1.6448536269514722
    a, b, c = 1 + z * z / 10, -(1.6 + z * z / 10), 0.64
    roots = [(-b + sign * math.sqrt(b * b - 4 * a * c)) / (2 * a) for sign in (-1, 1)]
    assert interval([1.0] * 8 + [0.0] * 2, 0.9) == pytest.approx(roots, rel=1e-12)


@given(SCORES)
def test_an_interval_holds_its_mean_and_narrows_with_more_of_the_same(scores: list[float]) -> None:
    low, high = interval(scores)
    mean = sum(scores) / len(scores)
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1
    more = interval(scores * 4)
    assert more[1] - more[0] < high - low
    wide = interval(scores, 0.99)
    assert wide[0] <= low
    assert wide[1] >= high
    mirrored = interval([1 - score for score in scores])
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("shares", [(0.0, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)])
def test_an_interval_covers_as_often_as_it_says(shares: tuple[float, ...]) -> None:
    """Of 2000 repeated experiments of 30 samples; with shares between 0 and 1 more often than said."""
    dice, truth, covered = Random(0), sum(shares) / len(shares), 0
    for _ in range(2000):
        low, high = interval(dice.choices(shares, k=30))
        covered += low <= truth <= high
    assert 0.93 < covered / 2000 <= (0.98 if len(shares) == 2 else 1)
    if len(shares) > 2:
        assert covered / 2000 > 0.98


@pytest.mark.parametrize(
    ("scores", "level", "named"),
    [
        ([], 0.95, "scores"),
        ([0.5, 1.5], 0.95, "1.5"),
        ([math.nan], 0.95, "nan"),
        ([1.0], 1.0, "level"),
        ([1.0], 0.0, "level"),
    ],
)
def test_what_has_no_interval_is_refused(scores: list[float], level: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        interval(scores, level)


def test_paired() -> None:
    assert paired([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))
    assert paired([-0.25]) == (-0.25, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        paired([])


def test_perplexity_change() -> None:
    """A rise by log 1.1 everywhere is a tenth, with no doubt; its error is what repetitions scatter by."""
    assert perplexity_change([math.log(1.1)] * 50) == pytest.approx((0.1, 0.0), abs=1e-12)
    dice = Random(1)
    runs = [perplexity_change([dice.gauss(0.05, 0.5) for _ in range(400)]) for _ in range(500)]
    changes = [change for change, _ in runs]
    mean = sum(changes) / len(changes)
    scatter = math.sqrt(sum((change - mean) ** 2 for change in changes) / len(changes))
    assert sum(error for _, error in runs) / len(runs) == pytest.approx(scatter, rel=0.1)
    assert mean == pytest.approx(math.expm1(0.05), abs=0.005)
