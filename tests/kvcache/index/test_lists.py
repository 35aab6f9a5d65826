"""Inverted lists: clustering and scans, reference and native twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from keysift.kvcache.index.ivf.lists import Lists, cluster, list_masses, owner
from keysift.kvcache.ops import use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ways() -> list[str]:
    """The reference, and each instruction set of the native twin."""
    try:
        from keysift.kvcache.native import library
    except ImportError:
        return ["reference"]
    return ["reference", *library.isas()]


@contextmanager
def by(way: str) -> Iterator[None]:
    if way == "reference":
        with use_backend("reference"):
            yield
    else:
        from keysift.kvcache.native import library

        with use_backend("native"), library.use_isa(way):
            yield


WAYS = pytest.mark.parametrize("way", ways())
NATIVE = pytest.mark.parametrize("way", ways()[1:])


def scattered(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Keys [T, Hkv, D] on pages in random order, another for each head: k [N, Hkv, S, D], frames [1, Hkv, F]."""
    heads = keys.shape[1]
    pages = keys.unflatten(0, (-1, page_size)).transpose(1, 2)  # [F, Hkv, S, D]
    k = torch.full((len(pages) + 2, *pages.shape[1:]), torch.nan, dtype=keys.dtype)
    frames = torch.stack([torch.randperm(len(k))[: len(pages)] for _ in range(heads)])
    for head in range(heads):
        k[frames[head], head] = pages[:, head]
    return k, frames.int()[None]


def clouds(tokens: int, heads: int, dim: int, centres: int = 32) -> Tensor:
    """Keys [T, Hkv, D] around a few centres."""
    around = torch.randn(centres, heads, dim)[torch.randint(centres, (tokens,))]
    return around * 2 + 0.3 * torch.randn(tokens, heads, dim)


@WAYS
def test_every_key_is_in_the_list_whose_mean_is_nearest(way: str) -> None:
    keys = clouds(256, 2, 32)
    k, frames = scattered(keys, 8)
    with by(way):
        (lists,) = cluster(k, frames, lists=16, iterations=100)
    assert lists.tokens.long().sort(-1).values.equal(torch.arange(256).expand(2, -1))
    owners = owner(lists)
    for head in range(2):
        members, means = owners[head], lists.centroids[head].double()
        assert torch.cdist(keys[:, head].double(), means).argmin(-1).equal(members)
        for number in members.unique():
            torch.testing.assert_close(means[number], keys[members == number, head].double().mean(0), atol=1e-5, rtol=0)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lists", [4, 20, 64])
def test_the_native_twin_makes_the_lists_of_the_reference(way: str, dtype: torch.dtype, lists: int) -> None:
    """With small whole numbers and a power of two of them, all sums are exact and many distances equal."""
    k, frames = scattered(torch.randint(-2, 3, (256, 3, 64)).to(dtype), 4)
    halves = frames.unflatten(2, (2, -1)).transpose(1, 2)[0]  # [2, Hkv, F / 2]
    with by("reference"):
        expected = cluster(k, halves, lists=lists, iterations=1)
    with by(way):
        found = cluster(k, halves, lists=lists, iterations=1)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tokens.equal(theirs.tokens)
        assert mine.ends.equal(theirs.ends)
        torch.testing.assert_close(mine.centroids, theirs.centroids)


@NATIVE
def test_the_native_twin_ends_where_the_reference_does(way: str) -> None:
    k, frames = scattered(clouds(512, 2, 96), 16)
    with by("reference"):
        (expected,) = cluster(k, frames, lists=32, iterations=6)
    with by(way):
        (found,) = cluster(k, frames, lists=32, iterations=6)
    assert found.tokens.equal(expected.tokens)
    torch.testing.assert_close(found.centroids, expected.centroids)


def test_equal_keys_fill_one_list_and_leave_the_others_empty() -> None:
    k, frames = scattered(torch.ones(64, 1, 32), 4)
    (lists,) = cluster(k, frames, lists=8, iterations=4)
    assert lists.ends.tolist() == [[64] * 8]
    assert lists.centroids.isfinite().all()


@dataclass(frozen=True)
class Question:
    """Rows at random positions of one poisoned sequence, some of whose segments have lists."""

    heads: tuple[int, int] = (6, 2)
    dim: int = 32
    page_size: int = 4
    segment: int = 32
    segments: int = 3
    probes: int = 5
    dtype: torch.dtype = torch.float32

    def make(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, list[Lists], Tensor], dict[str, float]]:
        room, rows = self.segment * self.segments + 48, 9
        keys = torch.randn(room, self.heads[1], self.dim).to(self.dtype)
        k, frames = scattered(keys, self.page_size)
        last = room - self.page_size - 2
        k[frames[0, :, -1].long(), torch.arange(self.heads[1])] = torch.nan  # the last page is unwritten
        q = torch.randn(rows, self.heads[0] + 1, self.dim).to(self.dtype)[:, 1:]
        positions = torch.cat([torch.tensor([0, 3, self.segment - 1, last]), torch.randint(last, (rows - 4,))]).int()
        pages = self.segment // self.page_size
        runs = [frames[:, :, i * pages : (i + 1) * pages] for i in range(self.segments)]
        lists = [cluster(k, run, lists=8, iterations=2)[0] for run in runs]
        order = torch.randperm(self.segments)
        which = order.argsort().int().expand(rows, -1)
        numbers = {"scale": self.dim**-0.5, "segment": self.segment, "probes": self.probes}
        return (q, k, frames.expand(rows, -1, -1), positions, [lists[i] for i in order], which), numbers


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, list[Lists], Tensor]


def single_tokens(
    q: Tensor, k: Tensor, frames: Tensor, positions: Tensor, lists: list[Lists], places: Tensor
) -> Arguments:
    """The same arguments of `list_masses` with pages of one token, whose masses are the scores of single keys."""
    size = k.shape[2]
    slots = (frames[..., None] * size + torch.arange(size, dtype=torch.int32)).flatten(2)
    return q, k.transpose(1, 2).flatten(0, 1)[:, :, None], slots, positions, lists, places


QUESTIONS = [
    Question(),
    Question(heads=(8, 1), probes=1),
    Question(heads=(2, 2), dim=64, page_size=8, segment=64),
    Question(heads=(4, 2), dim=96, dtype=torch.float16),
    Question(heads=(3, 1), dim=64, page_size=16, segment=64, dtype=torch.bfloat16, probes=100),
    Question(heads=(5, 1), dim=128, dtype=torch.bfloat16, segments=0),
]


@NATIVE
@pytest.mark.parametrize("question", QUESTIONS, ids=range(len(QUESTIONS)))
def test_the_native_twin_finds_what_the_reference_finds(way: str, question: Question) -> None:
    arguments, numbers = question.make()
    with by("reference"):
        masses, keys = list_masses(*arguments, **numbers), list_masses(*single_tokens(*arguments), **numbers)
    with by(way):
        found_masses, found_keys = (
            list_masses(*arguments, **numbers),
            list_masses(*single_tokens(*arguments), **numbers),
        )
    assert found_keys.isfinite().equal(keys.isfinite())
    torch.testing.assert_close(found_keys, keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_masses, masses, atol=1e-5, rtol=1e-5)


@WAYS
def test_of_equal_lists_the_first_are_scanned(way: str) -> None:
    arguments, numbers = (question := Question(probes=8)).make()
    nothing = torch.zeros_like(arguments[0])
    with by(way):
        keys = list_masses(*single_tokens(nothing, *arguments[1:]), **numbers)
    for row, position in zip(keys, arguments[3].tolist(), strict=True):
        covered = min(position // 4 * 4 // question.segment, question.segments) * question.segment
        expected = torch.arange(keys.shape[2])
        expected = (expected <= position) & ((expected < question.segment) | (expected >= covered))
        assert (row.isfinite() == expected).all()


@WAYS
def test_a_head_scans_its_own_lists_and_what_no_list_covers(way: str) -> None:
    """By the definition, one query and head at a time."""
    (q, k, frames, positions, lists, which), numbers = (question := Question(probes=2)).make()
    with by(way):
        scanned = list_masses(*single_tokens(q, k, frames, positions, lists, which), **numbers).isfinite()
    for row, head in [(row, head) for row in range(len(q)) for head in range(q.shape[1])]:
        position, kv_head = int(positions[row]), head // 3
        count = min(position // 4 * 4 // question.segment, question.segments)
        ranked = []
        for segment in range(count):
            part = lists[int(which[row, segment])]
            first = [0, *part.ends[kv_head].tolist()]
            ranked += [
                (
                    -float(part.centroids[kv_head, i] @ q[row, head]),
                    segment,
                    part.tokens[kv_head, first[i] : first[i + 1]],
                )
                for i in range(8)
                if first[i] < first[i + 1]
            ]
        ranked.sort(key=lambda entry: entry[0])
        tokens = {segment * question.segment + token for _, segment, part in ranked[:2] for token in part.tolist()}
        tokens |= set(range(count * question.segment, position + 1))
        assert set(scanned[row, head].nonzero().flatten().tolist()) == tokens
