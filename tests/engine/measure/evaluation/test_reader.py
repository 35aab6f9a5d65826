"""What is read by hand, step by step, is what the engine serves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from keysift.engine import Engine, Request, ResourceExhausted
from keysift.engine.measure.evaluation.divergence import Divergence, logs
from keysift.engine.measure.evaluation.reader import Reader
from keysift.engine.measure.evaluation.witness import Ledger
from keysift.kvcache import Phase
from tests.engine.driver import Make, drain, greedy, said, tokens

PROMPTS = [tokens(length, seed=length) for length in (200, 97, 33)]
SPARSE = {
    "streaming": ("streaming.window=32", "streaming.sink=16"),
    "sift+retrieval": ("sift.threshold=0.02", "retrieval.budget=32", "retrieval.dense_below=0", "retrieval.window=16"),
    "dense+nosa": ("nosa.budget=64", "nosa.dense_below=0", "nosa.window=16", "nosa.sink=16"),
    "flexprefill+quest": ("quest.budget=32", "quest.dense_below=0", "quest.window=16"),
    "dense+retrieval": ("retrieval.budget=32", "retrieval.dense_below=0", "retrieval.window=16", "retrieval.sink=16"),
}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
"""Beyond 32 rows, and where a layer's width is no multiple of 32, torch's bits depend on the company."""


def served(engine: Engine, prompt: tuple[int, ...], name: str, count: int) -> list[int]:
    engine.add(Request("one", prompt, greedy(count), strategy=name, strategy_args=SPARSE[name]))
    return said(drain(engine), "one")


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_goes_on_as_the_engine_does(make: Make, name: str) -> None:
    engine = make()
    expected = [served(engine, prompt, name, 20) for prompt in PROMPTS]
    reader = Reader(engine)
    with reader.open(PROMPTS, engine.strategy(name, SPARSE[name]), 20) as readings:
        for reading in readings:
            reader.read(reading)
        reader.generate(readings, lambda reading: len(reading.generated) == 20)
        assert [reading.generated for reading in readings] == expected


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_follows_what_it_would_have_said_with_the_same_logits(make: Make, name: str) -> None:
    """64 at once, and again one by one after forgetting, and all of it gives the pages back."""
    engine = make()
    reader, strategy = Reader(engine), engine.strategy(name, SPARSE[name])
    with reader.open(PROMPTS[:1], strategy, 80) as (reading,):
        reader.read(reading)
        mark = reading.mark()
        reader.generate([reading], lambda reading: len(reading.generated) == 80)
        answer, density = reading.generated, reading.sparsity.decode_density
        reader.rewind(reading, mark)
        together = reader.follow(reading, answer)
        assert together.argmax(-1).tolist() == answer
        assert reading.sparsity.decode_density == pytest.approx(density, abs=0.01)
        reader.rewind(reading, mark)
        alone = torch.cat([reader.follow(reading, [token]) for token in answer])
    torch.testing.assert_close(together, alone, **CLOSE)
    assert engine.cache.free_pages == engine.cache.allocator.total


def test_an_extended_prompt_reads_as_one_and_rewinds(make: Make) -> None:
    engine, prompt = make(), tokens(220)
    reader, dense = Reader(engine), engine.strategy("dense")
    with reader.open([prompt], dense, 0) as (reading,):
        reader.read(reading)
        expected = reading.next_logits
    with reader.open([prompt[:200]], dense, 20) as (reading,):
        reader.read(reading)
        mark = reading.mark()
        for _ in range(2):
            reader.extend(reading, prompt[200:])
            reader.read(reading)
            torch.testing.assert_close(reading.next_logits, expected, **CLOSE)
            reader.rewind(reading, mark)
            assert reading.mark() == mark
    assert engine.cache.free_pages == engine.cache.allocator.total


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_a_rewound_reading_goes_on_from_its_mark(make: Make, name: str) -> None:
    """A mark amid decoded tokens, at a page border; `nosa` needs the history that a rewind drops."""
    engine, given = make(), tokens(80, seed=1)
    reader, found = Reader(engine), []
    with reader.open(PROMPTS[:1], engine.strategy(name, SPARSE[name]), 80) as (reading,):
        reader.read(reading)
        reader.follow(reading, given[:24])
        mark = reading.mark()
        for _ in range(2):
            found.append(reader.follow(reading, given[24:48]))
            reader.rewind(reading, mark)
            assert tuple(reading.generated) == given[:24]
            assert reading.sequence.reads == mark.reads
    torch.testing.assert_close(found[0][0], found[1][0])
    if "nosa" not in name:
        torch.testing.assert_close(*found)


def test_hears_what_transformers_computes(make: Make, tiny_llama: Path) -> None:
    engine, heard = make(), dict[int, torch.Tensor]()
    reader, positions = Reader(engine), [0, 5, 63, 64, 130, 199]
    with reader.open(PROMPTS[:1], engine.strategy("dense"), 0) as (reading,):
        reader.read(reading, positions, heard.__setitem__)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(torch.tensor(PROMPTS[:1])).logits[0]
    assert list(heard) == positions
    torch.testing.assert_close(torch.stack(list(heard.values())), expected[positions], atol=1e-4, rtol=1e-4)


def test_witnesses_what_is_really_kept(make: Make) -> None:
    """All of it under dense, less under a window, whose share of the attention the densities bound from nowhere."""
    engine = make()
    reader = Reader(engine)
    kept = {}
    for name in ("dense", "streaming"):
        strategy = engine.strategy(name, SPARSE.get(name, ()))
        with reader.watching(ledger := Ledger()), reader.open(PROMPTS[:1], strategy, 4) as (reading,):
            reader.read(reading)
            reader.follow(reading, [1, 2, 3])
        kept[name] = ledger
    assert kept["dense"].mean == kept["dense"].least == 1.0
    assert kept["streaming"].mean is not None
    assert kept["streaming"].least is not None
    assert 0 < kept["streaming"].least < kept["streaming"].mean < 1.0
    coverage, density = kept["streaming"].coverage(), kept["streaming"].densities()
    assert [len(layer) for layer in coverage] == [4, 4]
    assert all(0 < share < 1 for layer in coverage for share in layer if share is not None)
    assert all(0 < share < 1 for layer in density for share in layer if share is not None)


@pytest.mark.parametrize("name", ["streaming", "sift+retrieval"])
def test_densities_of_heads_are_shares_of_the_pairs(make: Make, name: str) -> None:
    """As the engine books them for the request: later chunks, whose queries see more, weigh more."""
    engine = make()
    few = ("sift.threshold=0.1", "sift.coverage=0", "sift.sink=16", "sift.local=32") if "sift" in name else ()
    reader, strategy = Reader(engine), engine.strategy(name, (*SPARSE[name][-3:], *few, "dense_below=0"))
    for phase in (Phase.PREFILL, Phase.DECODE):
        with reader.open([tokens(448)], strategy, 40) as (reading,):
            with reader.watching(ledger := Ledger()):
                reader.read(reading)
            if phase is Phase.DECODE:
                with reader.watching(ledger := Ledger()):
                    reader.follow(reading, list(tokens(40)))
            booked = reading.sequence.reads[phase].density
        shares = torch.tensor(
            [[math.nan if share is None else share for share in layer] for layer in ledger.densities()]
        )
        assert booked < 0.9
        assert float(shares.mean()) == pytest.approx(booked, abs=1e-5)


def test_gives_pages_back_where_the_cache_cannot(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    reserve, calls = engine.cache.reserve, list[int]()

    def fails_later(sequence: int, length: int) -> None:
        calls.append(length)
        if len(calls) == 2:
            raise RuntimeError("on purpose")
        reserve(sequence, length)

    monkeypatch.setattr(engine.cache, "reserve", fails_later)
    with pytest.raises(RuntimeError, match="on purpose"), Reader(engine).open(PROMPTS, engine.strategy("dense"), 1):
        pass
    assert engine.cache.free_pages == engine.cache.allocator.total
    assert len({engine.cache.open() for _ in range(engine.config.max_num_seqs)}) == engine.config.max_num_seqs


def test_refuses_what_does_not_fit_and_returns_what_it_took(make: Make) -> None:
    engine = make(max_num_seqs=2)
    reader = Reader(engine)
    with pytest.raises(ResourceExhausted, match="kv_memory"), reader.open(PROMPTS, engine.strategy("dense"), 1):
        pass
    with pytest.raises(RuntimeError, match="on purpose"), reader.open(PROMPTS[:2], engine.strategy("dense"), 1):
        raise RuntimeError("on purpose")
    assert engine.cache.free_pages == engine.cache.allocator.total


def test_counts_prompts_and_tokens_apart(make: Make) -> None:
    engine = make()
    reader = Reader(engine)
    strategy = engine.strategy("dense+retrieval", SPARSE["dense+retrieval"])
    with reader.open(PROMPTS[:1], strategy, 8) as (reading,):
        reader.read(reading)
        reader.follow(reading, [1, 2, 3, 4])
        assert reading.sequence.reads[Phase.PREFILL].density == 1.0
        assert reading.sparsity.decode_density < 0.7


def test_a_tier_that_takes_one_token_at_a_time(make: Make, tmp_path: Path) -> None:
    plain, home = make(), make(kv_offload=str(tmp_path), kv_memory=2**21)
    found = []
    for engine in (plain, home):
        reader = Reader(engine)
        with reader.open(PROMPTS[:1], engine.strategy("dense+retrieval", SPARSE["dense+retrieval"]), 8) as (reading,):
            reader.read(reading)
            found.append(reader.follow(reading, [9, 8, 7, 6, 5]))
    torch.testing.assert_close(*found, **CLOSE)


def test_divergence_of_known_distributions() -> None:
    dense = logs(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    sparse = logs(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    found = Divergence.of(dense, sparse, torch.tensor([0, 0]))
    p = torch.tensor([2.0, 0.0]).softmax(0)
    expected = float((p * (p / p.flip(0)).log()).sum())
    assert found.kl == [0.0, pytest.approx(expected, rel=1e-5)]
    assert found.agrees == [True, False]
    assert found.loss == [0.0, pytest.approx(2.0, rel=1e-5)]
