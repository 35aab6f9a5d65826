"""Oracles of prompt strategies: the papers' steps in float64, one head, row and page at a time.

Every oracle returns a mask [R, Hq, F]. `slack` widens each threshold a little, or narrows it where it is negative: a
selection in float32 lies between the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Pages = set[int]


@dataclass(frozen=True)
class Prompt:
    """The chunk at the end of a prompt: float64 queries [Nq, Hq, D] and all keys [Nk, Hkv, D]."""

    q: Tensor
    k: Tensor
    page: int
    row: int
    scale: float

    @property
    def start(self) -> int:
        return len(self.k) - len(self.q)

    @property
    def heads(self) -> range:
        return range(self.q.shape[1])

    @property
    def num_pages(self) -> int:
        return -(-len(self.k) // self.page)

    @property
    def rows(self) -> list[range]:
        """Queries of each row, counted in the chunk."""
        return [range(i, min(i + self.row, len(self.q))) for i in range(0, len(self.q), self.row)]

    @cached_property
    def scores(self) -> Tensor:
        """[Hq, Nq, Nk], without a causal mask."""
        keys = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        return torch.einsum("qhd,khd->hqk", self.q, keys) * self.scale

    @cached_property
    def weights(self) -> Tensor:
        """[Hq, Nq, Nk], causal softmax."""
        future = torch.arange(len(self.k)) > torch.arange(self.start, len(self.k))[:, None]
        return self.scores.masked_fill(future, float("-inf")).softmax(-1)

    @cached_property
    def shares(self) -> list[list[list[float]]]:
        """Mass of each head, query and page."""
        return torch.stack([part.sum(-1) for part in torch.split(self.weights, self.page, -1)], -1).tolist()

    @cached_property
    def crossed(self) -> list[dict[int, Pages]]:
        """Of each row, the pages that each band of distances crosses."""
        found: list[dict[int, Pages]] = [{} for _ in self.rows]
        for query, key in itertools.product(range(len(self.q)), range(len(self.k))):
            if (distance := self.start + query - key) >= 0:
                found[query // self.row].setdefault(distance // self.page, set()).add(key // self.page)
        return found

    def key(self, head: int, position: int) -> Tensor:
        return self.k[position, head // (self.q.shape[1] // self.k.shape[1])]

    def with_bands(self, pages: Pages, bands: Pages, r: int) -> Pages:
        """Pages, and those that the bands cross in row r."""
        return pages.union(*(self.crossed[r].get(band, set()) for band in bands))


def mask_of(prompt: Prompt, chosen: Callable[[int, int], Pages], *, sink: int, local: int) -> Tensor:
    """`chosen` (head, row), with sinks, every query's last tokens and the row's own pages."""
    mask = torch.zeros(len(prompt.rows), len(prompt.heads), prompt.num_pages, dtype=torch.bool)
    for r, row in enumerate(prompt.rows):
        first, last = prompt.start + row[0], prompt.start + row[-1]
        near = range(max(min(first, first - local + 1), 0), last + 1)
        forced = {token // prompt.page for token in itertools.chain(range(sink), near)}
        for head in prompt.heads:
            pages = chosen(head, r) | forced
            mask[r, head, [page for page in pages if page <= last // prompt.page]] = True
    return mask


def fewest(masses: Sequence[float], share: float, least: int = 0) -> Pages:
    """Entries from the greatest down until they hold the share and are `least`; of equals the earlier first."""
    if share >= 1:
        return set(range(len(masses)))
    total, kept, chosen = sum(masses), 0.0, Pages()
    for entry in sorted(range(len(masses)), key=lambda e: (-masses[e], e)):
        if kept >= share * total and len(chosen) >= least:
            break
        chosen.add(entry)
        kept += masses[entry]
    return chosen


def columns(prompt: Prompt, head: int, queries: Sequence[int]) -> list[float]:
    """Mean mass of each page over these queries."""
    shares = [prompt.shares[head][query] for query in queries]
    return [sum(each) / len(queries) for each in zip(*shares, strict=True)]


def diagonals(prompt: Prompt, head: int, queries: Iterable[int]) -> list[float]:
    """Mass of each band of distances over these queries."""
    bands = [0.0] * prompt.num_pages
    for query in queries:
        weights = prompt.weights[head, query].tolist()
        for position in range(prompt.start + query + 1):
            bands[(prompt.start + query - position) // prompt.page] += weights[position]
    return bands


def last_queries(prompt: Prompt, count: int) -> list[int]:
    """The chunk's last queries; a last row that is shorter is joined by the row before it."""
    count = min(count, prompt.row)
    final = prompt.rows[-1]
    before = prompt.rows[-2][-count:] if len(final) < count and len(prompt.rows) > 1 else range(0)
    return [*before, *final[-count:]]


def pooled(prompt: Prompt, head: int, queries: Iterable[int], end: int) -> list[float]:
    """Softmax of the mean of these queries over the mean keys of full pages that begin by position `end`."""
    mean = torch.stack([prompt.q[query, head] for query in queries]).mean(0)
    scores = [-math.inf] * prompt.num_pages
    for page in range(min(end // prompt.page + 1, len(prompt.k) // prompt.page)):
        tokens = range(page * prompt.page, (page + 1) * prompt.page)
        key = torch.stack([prompt.key(head, token) for token in tokens]).mean(0)
        scores[page] = float(mean @ key) * prompt.scale
    return softmax(scores)


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    if top == -math.inf:
        return [0.0] * len(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    """Square root of the Jensen-Shannon divergence."""
    terms = [x * math.log(2 * x / (x + y)) for a, b in ((p, q), (q, p)) for x, y in zip(a, b, strict=True) if x > 0]
    return math.sqrt(max(sum(terms) / 2, 0))


def filled(prompt: Prompt, row: range) -> list[int]:
    """The row's queries, the last repeated where the row is short."""
    return [min(query, row[-1]) for query in range(row[0], row[0] + prompt.row)]


def query_aware(prompt: Prompt, head: int, tau: float, reps: list[int]) -> bool:
    """True if the representatives' estimate agrees with their attention to full pages."""
    full = len(prompt.k) // prompt.page
    true = columns(prompt, head, reps)[:full]
    guess = pooled(prompt, head, reps, len(prompt.k) - 1)[:full]
    apart = divergence(guess, [mass / max(sum(true), 1e-30) for mass in true])
    assert tau == 0 or abs(apart - tau) > 1e-4, "too close to call: take another seed"
    return apart < tau


def flexprefill(
    prompt: Prompt, slack: float, *, gamma: float, tau: float, min_budget: int, block_size: int, sink: int, local: int
) -> Tensor:
    least, reps = -(-min_budget // prompt.page), last_queries(prompt, block_size)
    probes = [mine for row in prompt.rows if (mine := [query for query in reps if query in row])]

    def blocks(masses: list[float]) -> Pages:
        """Pages of the fewest blocks that hold gamma."""
        size = max(block_size // prompt.page, 1)
        sums = [sum(masses[page : page + size]) for page in range(0, len(masses), size)]
        kept = fewest(sums, gamma + slack, -(-least // size))
        return {page for page in range(len(masses)) if page // size in kept}

    def slashes(head: int) -> list[Pages]:
        kept = set().union(*(blocks(columns(prompt, head, mine)) for mine in probes))
        bands = set().union(*(blocks(diagonals(prompt, head, mine)) for mine in probes))
        return [prompt.with_bands(kept, bands, r) for r in range(len(prompt.rows))]

    def estimates(head: int) -> list[Pages]:
        ends = ((filled(prompt, row), prompt.start + row[-1]) for row in prompt.rows)
        return [blocks(pooled(prompt, head, queries, end)) for queries, end in ends]

    def enough(head: int, mask: Tensor) -> bool:
        """The representatives of each row keep gamma."""
        for r, row in enumerate(prompt.rows):
            if mine := [query for query in reps if query in row]:
                masses = torch.tensor(columns(prompt, head, mine), dtype=torch.float64)
                if float(masses @ mask[r, head].double()) < gamma:
                    return False
        return True

    aware = {head: estimates(head) for head in prompt.heads if query_aware(prompt, head, tau, reps)}
    empty: list[Pages] = [set() for _ in prompt.rows]
    guess = mask_of(prompt, lambda head, r: aware.get(head, empty)[r], sink=sink, local=local)
    other = {head: slashes(head) for head in prompt.heads if head not in aware or not enough(head, guess)}
    chosen = aware | other
    return mask_of(prompt, lambda head, r: chosen[head][r], sink=sink, local=local)


def minference(
    prompt: Prompt, slack: float, *, vertical_size: int, slash_size: int, last_q: int, sink: int, local: int
) -> Tensor:
    reps = last_queries(prompt, last_q)

    def greatest(masses: list[float], size: int, always: int) -> Pages:
        first = range(min(-(-always // prompt.page), len(masses)))
        order = [*first, *sorted(range(len(first), len(masses)), key=lambda entry: (-masses[entry], entry))]
        return set(order[: max(-(-size // prompt.page), len(first))])

    kept = [greatest(columns(prompt, head, reps), vertical_size, 30) for head in prompt.heads]
    bands = [greatest(diagonals(prompt, head, reps), slash_size, 100) for head in prompt.heads]
    return mask_of(prompt, lambda head, r: prompt.with_bands(kept[head], bands[head], r), sink=sink, local=local)


def sampleattention(
    prompt: Prompt,
    slack: float,
    *,
    alpha: float,
    slash_alpha: float,
    window_ratio: float,
    row_ratio: float,
    sampling: str,
    sink: int,
    local: int,
) -> Tensor:
    every = round(1 / row_ratio)
    sampled = [query for query in range(len(prompt.q)) if (prompt.start + query + 1) % every == 0]
    sampled = sorted({*sampled, len(prompt.q) - 1})
    if sampling == "tail":
        ends = [row for row in prompt.rows if (prompt.start + row[-1] + 1) % (every * prompt.row) == 0]
        sampled = sorted({query for row in ends for query in row} | set(last_queries(prompt, prompt.row)))
    kept = [fewest(columns(prompt, head, sampled), alpha + slack) for head in prompt.heads]
    bands = [
        fewest(diagonals(prompt, head, sampled), slash_alpha + slack) if slash_alpha else set() for head in prompt.heads
    ]

    def chosen(head: int, r: int) -> Pages:
        last = prompt.start + prompt.rows[r][-1]
        window = math.ceil(window_ratio * (last + 1))
        first = max(prompt.start + prompt.rows[r][0] - window + 1, 0)
        near = range(first // prompt.page, last // prompt.page + 1)
        return prompt.with_bands(kept[head].union(near), bands[head], r)

    return mask_of(prompt, chosen, sink=sink, local=local)


def xattention(prompt: Prompt, slack: float, *, threshold: float, stride: int, sink: int, local: int) -> Tensor:
    stride, scores = math.gcd(stride, prompt.page, prompt.row), prompt.scores.tolist()

    def tile(head: int, queries: range, first_key: int) -> float:
        """Mean score along the antidiagonal, of the pairs that exist."""
        keys = [(query, first_key + stride - 1 - place) for place, query in enumerate(queries)]
        pairs = [scores[head][query][key] for query, key in keys if key < len(prompt.k)]
        return sum(pairs) / len(pairs) if pairs else -math.inf

    def masses(head: int, row: range) -> list[float]:
        mass = [0.0] * prompt.num_pages
        for first in range(row[0], row[-1] + 1, stride):
            queries = range(first, min(first + stride, row[-1] + 1))
            begins = range(0, prompt.start + queries[-1] + 1, stride)
            for key, share in zip(begins, softmax([tile(head, queries, key) for key in begins]), strict=True):
                mass[key // prompt.page] += share
        return mass

    def chosen(head: int, r: int) -> Pages:
        return fewest(masses(head, prompt.rows[r]), threshold + slack)

    return mask_of(prompt, chosen, sink=sink, local=local)


def oracle(prompt: Prompt, slack: float, *, threshold: float, sink: int, local: int) -> Tensor:
    def chosen(head: int, r: int) -> Pages:
        shares = [prompt.shares[head][query] for query in prompt.rows[r]]
        return {page for page, seen in enumerate(zip(*shares, strict=True)) if max(seen) >= threshold - slack}

    return mask_of(prompt, chosen, sink=sink, local=local)


def sift(
    prompt: Prompt, slack: float, *, threshold: float, looks: int, group: int, trust: float, sink: int, local: int
) -> Tensor:
    looks, group = min(looks, prompt.row), math.gcd(group, prompt.row)

    def chosen(head: int, r: int) -> Pages:
        queries = filled(prompt, prompt.rows[r])
        seen = [prompt.shares[head][queries[(i + 1) * prompt.row // looks - 1]] for i in range(looks)]
        for first in range(0, prompt.row, group):
            mates = queries[first : first + group]
            guess = pooled(prompt, head, mates, prompt.start + mates[-1])
            seen.append([share * trust for share in guess])
        return {page for page, shares in enumerate(zip(*seen, strict=True)) if max(shares) >= threshold - slack}

    return mask_of(prompt, chosen, sink=sink, local=local)
