"""Attention problems on scattered pages of a poisoned cache, and their solutions by the softmax formula."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sequences of these lengths, all of whose tokens are cached, and the queries at their ends.

    Decode: the last token of each. Prefill (`chunk` > 0): the last `chunk` tokens of the only sequence.
    """

    lengths: tuple[int, ...]
    chunk: int = 0
    queries_per_row: int = 1
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    page_size: int = 4
    window: int = 0
    density: float = 1.0
    per_query_head: bool = False


@dataclass(frozen=True)
class Problem:
    """The arguments of the op, and the tokens of the pages for oracles that know no pages."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [N, Hkv, S, D]
    v: Tensor
    frames: Tensor  # [R, Hkv, F]
    pages: Tensor  # [R, H, P]
    starts: Tensor  # [R]
    queries_per_row: int
    window: int
    keys: list[Tensor]  # of each row's sequence, [length, Hkv, D]
    values: list[Tensor]

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Random sequences on frames that hold NaN where no token is, and where one has left every query's window."""
    num_heads, num_kv_heads = case.heads
    keys, values = make_tokens(case, dtype), make_tokens(case, dtype)
    table = make_table(case)
    sequences, starts = rows_of(case)
    packed = torch.randn(case.chunk or len(starts), num_heads + 2 * num_kv_heads, case.head_dim).to(dtype)
    return Problem(
        q=packed[:, :num_heads],  # as a slice of a fused projection
        k=scatter(keys, table, case.page_size),
        v=scatter(values, table, case.page_size),
        frames=table[sequences] if not case.chunk else table.expand(len(starts), -1, -1),
        pages=choose_pages(case, sequences),
        starts=torch.tensor(starts, dtype=torch.int32),
        queries_per_row=case.queries_per_row,
        window=case.window,
        keys=[keys[sequence] for sequence in sequences],
        values=[values[sequence] for sequence in sequences],
    )


def make_tokens(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """[length, Hkv, D] of each sequence."""
    sequences = [torch.randn(length, case.heads[1], case.head_dim).to(dtype) for length in case.lengths]
    for tokens in sequences if case.window else ():
        tokens[: max(0, len(tokens) - max(case.chunk, 1) - case.window + 1)] = torch.nan
    return sequences


def rows_of(case: Case) -> tuple[list[int], list[int]]:
    """The sequence of each row and the position of its first query."""
    if not case.chunk:
        return list(range(len(case.lengths))), [length - 1 for length in case.lengths]
    starts = list(range(case.lengths[0] - case.chunk, case.lengths[0], case.queries_per_row))
    return [0] * len(starts), starts


def make_table(case: Case) -> Tensor:
    """[B, Hkv, F]: frames in random order, another for each head."""
    num_pages = -(-max(case.lengths) // case.page_size)
    orders = [torch.randperm(len(case.lengths) * num_pages) for _ in range(case.heads[1])]
    return torch.stack(orders).view(case.heads[1], -1, num_pages).transpose(0, 1).int()


def scatter(tokens: list[Tensor], table: Tensor, page_size: int) -> Tensor:
    """Sequences of [length, Hkv, D] -> frames [N, Hkv, S, D], three of them in no table."""
    heads = torch.arange(table.shape[1])
    frames = torch.full((table[:, 0].numel() + 3, table.shape[1], page_size, tokens[0].shape[2]), torch.nan)
    for rows, pages in zip(tokens, table.long(), strict=True):
        for position, row in enumerate(rows):
            frames[pages[:, position // page_size], heads, position % page_size] = row.float()
    return frames.to(tokens[0].dtype)


def choose_pages(case: Case, sequences: list[int]) -> Tensor:
    """[R, H, P]: each list a random part of its sequence's pages; density 1 takes all, those of later rows too."""
    counts = torch.tensor(case.lengths)[sequences].add(case.page_size - 1) // case.page_size
    num_lists = case.heads[0] if case.per_query_head else case.heads[1]
    chosen = torch.rand(len(sequences), num_lists, int(counts.max())) < case.density
    numbers = torch.arange(chosen.shape[2], dtype=torch.int32)
    lists = keep(numbers.expand(chosen.shape), chosen & (numbers < counts[:, None, None]))
    return lists[..., : int((lists >= 0).sum(-1).max())]


def keep(pages: Tensor, mask: Tensor) -> Tensor:
    """The lists without the pages outside `mask`, -1 at the end again."""
    last = torch.iinfo(torch.int32).max
    kept = torch.where(mask & (pages >= 0), pages, last).sort(dim=-1).values
    return torch.where(kept == last, -1, kept)


def written_out(problem: Problem) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp64, one query and head at a time, over the tokens that it may see."""
    tokens, num_heads, dim = problem.q.shape
    out = torch.zeros(tokens, num_heads, dim, dtype=torch.float64)
    lse = torch.full((tokens, num_heads), -torch.inf, dtype=torch.float64)
    for token, head in itertools.product(range(tokens), range(num_heads)):
        row, kv_head = token // problem.queries_per_row, head * problem.k.shape[1] // num_heads
        if seen := tokens_seen(problem, token, head):
            scores = problem.keys[row][seen, kv_head].double() @ problem.q[token, head].double() * problem.scale
            weights = torch.exp(scores - scores.max())
            out[token, head] = weights @ problem.values[row][seen, kv_head].double() / weights.sum()
            lse[token, head] = scores.max() + torch.log(weights.sum())
    return out, lse


def tokens_seen(problem: Problem, token: int, head: int) -> list[int]:
    """Positions on chosen pages that are neither in the future nor out of the window."""
    row, offset = divmod(token, problem.queries_per_row)
    position = int(problem.starts[row]) + offset
    oldest = max(0, position - problem.window + 1) if problem.window else 0
    chosen = set(problem.pages[row, head * problem.pages.shape[1] // problem.q.shape[1]].tolist())
    return [j for j in range(oldest, position + 1) if j // problem.k.shape[2] in chosen]


def dense_attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Causal attention of a whole prompt in fp64, as the textbook has it: no page, no row, no list."""
    group = problem.q.shape[1] // problem.k.shape[1]
    keys, values = (x[0].double().repeat_interleave(group, dim=1) for x in (problem.keys, problem.values))  # [T, Hq, D]
    scores = torch.einsum("qhd,khd->hqk", problem.q.double(), keys) * problem.scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1).T


def built(module: str) -> bool:
    """True if a twin's compiler or package is installed."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
