"""Joining parts of a context: the same however they are joined."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keysift.attention.ops.merge import merge

EMPTY = float("-inf")


def parts(seed: int, heights: list[float]) -> list[tuple[Tensor, Tensor]]:
    """Attention over a few keys each, whose scores lie around these heights; -inf: over none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for height in heights:
        scores = torch.randn(5, generator=generator) + (0.0 if height == EMPTY else height)
        values = torch.randn(5, 8, generator=generator)
        if height == EMPTY:
            made.append((torch.zeros(1, 8), torch.tensor([EMPTY])))
        else:
            made.append(((scores.softmax(0) @ values)[None], scores.logsumexp(0, keepdim=True)))
    return made


HEIGHT = st.one_of(st.just(EMPTY), st.floats(-80, 80))


@given(st.integers(0, 1000), st.tuples(HEIGHT, HEIGHT, HEIGHT))
def test_merging_is_associative_and_commutative(seed: int, heights: tuple[float, float, float]) -> None:
    a, b, c = parts(seed, list(heights))
    for left, right in (
        (merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))),
        (merge(*a, *b), merge(*b, *a)),
    ):
        torch.testing.assert_close(left[0], right[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(left[1], right[1])


@given(st.integers(0, 1000), HEIGHT)
def test_nothing_changes_no_bit(seed: int, height: float) -> None:
    part, empty = parts(seed, [height, EMPTY])
    assert torch.equal(merge(*part, *empty)[0], part[0])
    assert torch.equal(merge(*empty, *part)[0], part[0])


def test_two_halves_are_the_whole() -> None:
    scores, values = torch.randn(3, 40).double() * 6, torch.randn(40, 8).double()
    halves = [
        (scores[:, cut].softmax(-1) @ values[cut], scores[:, cut].logsumexp(-1))
        for cut in (slice(0, 13), slice(13, 40))
    ]
    out, lse = merge(*halves[0], *halves[1])
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1))
