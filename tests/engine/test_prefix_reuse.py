"""Prefix hits save computation and change no token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from keysift.attention.registry import has_option
from keysift.engine import Engine, Finish, Output, Request, TokenOutput
from keysift.kvcache import Phase
from tests.engine.driver import Make, drain, finish_of, greedy, keys_and_values, said, tokens
from tests.strategies import Row, rows


def test_a_prefix_hit_changes_nothing_but_what_is_computed(make: Make, expected: Callable) -> None:
    engine = make()
    first, second = tokens(150), tokens(150)[:140] + tokens(30, 9)
    engine.add(Request("first", first, greedy(4)))
    drain(engine)
    engine.add(Request("second", second, greedy(8)))
    outputs = drain(engine)
    assert finish_of(outputs, "second").usage.cached_tokens == 128
    assert said(outputs, "second") == expected(list(second), 8)


@pytest.mark.parametrize(
    "change", [{"cache_salt": "other"}, {"strategy": "streaming"}, {"bypass_prefix_cache": True}], ids=str
)
def test_prefixes_are_not_shared_across_salt_strategy_or_bypass(make: Make, change: dict[str, object]) -> None:
    engine = make()
    engine.add(Request("first", tokens(150), greedy(1)))
    drain(engine)
    engine.add(Request("second", tokens(150), greedy(1), **change))  # type: ignore[arg-type]
    assert finish_of(drain(engine), "second").usage.cached_tokens == 0


@pytest.mark.parametrize(
    ("strategy", "args", "cached"),
    [
        ("dense", (), 128),
        ("dense+streaming", (), 128),
        ("dense+streaming", ("streaming.sink=0", "streaming.window=16"), 64),
    ],
    ids=["dense", "a window over everything", "a window that bites"],
)
def test_generated_pages_are_reused_while_decoding_is_exact(
    make: Make, strategy: str, args: tuple[str, ...], cached: int
) -> None:
    engine = make()
    engine.add(Request("first", tokens(64), greedy(70), strategy=strategy, strategy_args=args))
    answer = said(drain(engine), "first")
    engine.add(Request("next", (*tokens(64), *answer, *tokens(20)), greedy(1)))
    assert finish_of(drain(engine), "next").usage.cached_tokens == cached


SPARSE = [row for row in rows(16) if row.chooses(Phase.PREFILL)]
BETWEEN = 110
"""A `dense_below` whose work lies between that of a prompt's second chunk and its third: 64 x 128 and 64 x 192."""
BASE = tokens(300)


@dataclass(frozen=True)
class Pair:
    """A prompt whose pages stay cached, and one that begins alike."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    cached: tuple[int, int]
    """Tokens of the second one that are cached, with no dense rows at a prompt's end and with some."""
    answer: int = 0
    """The second one follows the first one and so many generated tokens; 0: it is a prompt of its own."""

    def prompt(self, answer: list[int]) -> tuple[int, ...]:
        return (*self.first, *answer, *self.second) if self.answer else self.second


PAIRS = {
    "another question": Pair((*BASE[:150], *tokens(60, 1)), (*BASE[:150], *tokens(70, 2)), (128, 128)),
    "a longer prompt": Pair(BASE[:192], BASE[:250], (192, 128)),
    "a shorter prompt": Pair(BASE, BASE[:200], (192, 128)),
    "the next turn": Pair(BASE[:165], tokens(20, 3), (128, 128), answer=30),
}


@pytest.mark.parametrize("row", SPARSE, ids=str)
@pytest.mark.parametrize(("last_rows", "dense_below"), [(0, BETWEEN), (1, 0), (2, BETWEEN)])
def test_a_sparse_prompt_holds_and_says_the_same_with_a_prefix_hit(
    make: Make, row: Row, last_rows: int, dense_below: int
) -> None:
    args = row.arguments(dense_below=dense_below, last_rows_dense=last_rows, coverage=0.0)
    some_dense = "last_rows_dense=0" not in args and has_option(row.name, "last_rows_dense")
    engine = make(strategy=row.name, strategy_args=args, queries_per_row=16, prefill_chunk=64)
    for name, pair in PAIRS.items():
        engine.add(Request("first", pair.first, greedy(max(pair.answer, 1)), cache_salt=name))
        prompt = pair.prompt(said(drain(engine), "first"))
        cold = witness(engine, Request("cold", prompt, greedy(3, logprobs=20), bypass_prefix_cache=True))
        warm = witness(engine, Request("warm", prompt, greedy(3, logprobs=20), cache_salt=name))
        assert cold.finish.usage.cached_tokens == 0
        assert warm.finish.usage.cached_tokens == pair.cached[some_dense], name
        assert cold.finish.sparsity.prefill_density < 0.99, name
        assert torch.equal(warm.held, cold.held), name
        assert warm.output == cold.output, name


@pytest.mark.parametrize("row", SPARSE, ids=str)
def test_a_chunk_is_reused_with_all_of_its_tokens_or_not_at_all(make: Make, row: Row) -> None:
    """What a page of a sparse prompt holds depends on later tokens of its chunk, too."""
    args = row.arguments(dense_below=0, last_rows_dense=0, coverage=0.0)
    engine = make(strategy=row.name, strategy_args=args, queries_per_row=32, prefill_chunk=64)
    first, prompt = (*BASE[:80], *tokens(120, 1)), BASE[:200]  # they part within the second chunk and its first row
    cold = witness(engine, Request("cold", prompt, greedy(3, logprobs=20), bypass_prefix_cache=True))
    for name, each, cached in (("first", first, 0), ("second", prompt, 64)):
        engine.add(Request(name, each, greedy(1)))
        assert finish_of(drain(engine), name).usage.cached_tokens == cached
    warm = witness(engine, Request("warm", prompt, greedy(3, logprobs=20)))
    assert warm.finish.usage.cached_tokens == 192
    assert torch.equal(warm.held, cold.held)
    assert warm.output == cold.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_reproducible_dense_prompt_holds_and_says_the_same_with_a_prefix_hit(
    make: Make, pair: str, dtype: str
) -> None:
    warm, cold = both(make(reproducible=True, dtype=dtype, queries_per_row=16), PAIRS[pair])
    assert warm.finish.usage.cached_tokens == {"a shorter prompt": 192, "a longer prompt": 192}.get(pair, 128)
    assert torch.equal(warm.held, cold.held)
    assert warm.output == cold.output


@pytest.mark.parametrize("pair", PAIRS)
def test_a_dense_prompt_says_nearly_the_same_with_a_prefix_hit(make: Make, pair: str) -> None:
    warm, cold = both(make(dtype="bfloat16", queries_per_row=16), PAIRS[pair])
    assert warm.finish.usage.cached_tokens >= 128
    assert torch.allclose(warm.held.float(), cold.held.float(), atol=0.02)


def both(engine: Engine, pair: Pair) -> tuple[Witness, Witness]:
    """The second prompt of a pair after the first one, and without the prefix cache."""
    engine.add(Request("first", pair.first, greedy(max(pair.answer, 1))))
    prompt = pair.prompt(said(drain(engine), "first"))
    cold = witness(engine, Request("cold", prompt, greedy(3, logprobs=20), bypass_prefix_cache=True))
    return witness(engine, Request("warm", prompt, greedy(3, logprobs=20))), cold


def test_the_statistics_of_a_reused_prompt_are_those_of_its_computation(make: Make) -> None:
    """Not those of the few tokens that are computed after the hit."""
    args = ("dense_below=0", "last_rows_dense=0", "min_budget=0", "coverage=0.0", "sink=16", "local=32")
    engine = make(strategy="ashape", strategy_args=args)
    outputs: list[Output] = []
    for name in ("cold", "warm"):
        engine.add(Request(name, (*BASE[:256], *tokens(44, 1)), greedy(2)))
        outputs += drain(engine)
    cold, warm = (finish_of(outputs, name) for name in ("cold", "warm"))
    assert (cold.usage.cached_tokens, warm.usage.cached_tokens) == (0, 256)
    assert cold.sparsity.prefill_density < 0.9
    assert warm.sparsity.prefill_density == pytest.approx(cold.sparsity.prefill_density)
    assert warm.sparsity.coverage == pytest.approx(cold.sparsity.coverage)
    assert warm.sparsity.kv_bytes_read < cold.sparsity.kv_bytes_read


@dataclass(frozen=True)
class Witness:
    finish: Finish
    held: Tensor
    """Keys and values of the prompt."""
    output: list[object]
    """Tokens, and the log probabilities of the likeliest."""


def witness(engine: Engine, request: Request) -> Witness:
    engine.add(request)
    outputs: list[Output] = []
    while not said(outputs, request.request_id):
        outputs += engine.step()
    held = keys_and_values(engine, request.request_id)
    outputs += drain(engine)
    output: list[object] = [(each.token_ids, each.logprobs) for each in outputs if isinstance(each, TokenOutput)]
    return Witness(finish_of(outputs, request.request_id), held, output)


def test_pairs_share_the_prefixes_of_their_prompt_strategy(make: Make) -> None:
    engine = make()
    engine.add(Request("first", tokens(150), greedy(1), strategy="dense+streaming"))
    drain(engine)
    engine.add(Request("second", tokens(150), greedy(1), strategy="dense"))
    assert finish_of(drain(engine), "second").usage.cached_tokens == 128
