"""How likely a text is, against a forward pass of transformers under dense, and the engine's own log otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from keysift.engine import Engine, Request, SamplingParams, TokenOutput
from keysift.engine.measure import likelihood
from keysift.engine.measure.evaluation.reader import Reader
from keysift.engine.measure.likelihood import Likelihood, score
from tests.engine.driver import Make

Truth = Callable[[list[int], int], tuple[float, bool]]
SPARSE = {"strategy": "streaming", "strategy_args": ("streaming.sink=16", "streaming.window=32", "dense_below=0")}


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def truth(tiny_llama: Path) -> Truth:
    """Of ``tokens[first:]``, by one forward pass of a model of transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")

    def score(tokens: list[int], first: int) -> tuple[float, bool]:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, first - 1 : -1].double()
        chosen = torch.tensor(tokens[first:])
        logs = logits.log_softmax(-1)[torch.arange(len(chosen)), chosen]
        return float(logs.sum()), bool((logits.argmax(-1) == chosen).all())

    return score


def all_pages_are_free(engine: Engine) -> bool:
    return engine.status.pages_free == engine.status.pages_total


@pytest.mark.parametrize("length", [1, 15, 16, 64, 65, 200])
def test_what_follows_a_context(make: Make, truth: Truth, length: int) -> None:
    engine = make()
    context, followers = some_tokens(length), [some_tokens(count, seed=count) for count in (1, 7, 90, 1)]
    found = likelihood.continuations(Reader(engine), engine.default, context, followers)
    for each, tokens in zip(found, followers, strict=True):
        total, greedy = truth(context + tokens, length)
        assert each.total == pytest.approx(total, abs=1e-3)
        assert each.greedy == greedy
    assert all_pages_are_free(engine)


def test_a_follower_knows_nothing_of_the_others(make: Make) -> None:
    """Under a strategy with an index too, which has to forget what the others have left."""
    for strategy in ("dense", "streaming", "retrieval"):
        engine = make(strategy=strategy, strategy_args=("dense_below=0",))
        context, followers = some_tokens(150), [some_tokens(40, seed=seed) for seed in (1, 2, 1)]
        together = likelihood.continuations(Reader(engine), engine.default, context, followers)
        alone = [likelihood.continuations(Reader(engine), engine.default, context, [each])[0] for each in followers]
        assert together == alone
        assert together[0] == together[2] != together[1]


def test_a_long_follower_is_judged_in_slices(make: Make, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "SLICE", 70)
    engine, tokens = make(), some_tokens(300)
    (found,) = likelihood.continuations(Reader(engine), engine.default, tokens[:10], [tokens[10:]])
    assert found.total == pytest.approx(truth(tokens, 10)[0], abs=2e-3)


@pytest.mark.parametrize(("length", "first"), [(2, 1), (65, 1), (66, 65), (200, 130), (512, 1)])
def test_a_prompt(make: Make, truth: Truth, length: int, first: int) -> None:
    engine, tokens = make(), some_tokens(length)
    found = likelihood.prompt(Reader(engine), engine.default, tokens, first)
    assert found.total == pytest.approx(truth(tokens, first)[0], abs=2e-3)
    assert all_pages_are_free(engine)


def test_what_the_model_would_say_is_greedy(make: Make, expected: Callable[[list[int], int], list[int]]) -> None:
    engine, context = make(), some_tokens(70)
    said = expected(context, 12)
    wrong = [*said[:11], (said[11] + 1) % 259]
    found = likelihood.continuations(Reader(engine), engine.default, context, [said, wrong])
    assert [each.greedy for each in found] == [True, False]
    assert likelihood.prompt(Reader(engine), engine.default, context + said, 70).greedy
    assert not likelihood.prompt(Reader(engine), engine.default, context + wrong, 70).greedy


def generated(engine: Engine, prompt: list[int], count: int) -> tuple[list[int], float]:
    """What the engine itself says, and how likely it found that."""
    engine.add(Request("r", tuple(prompt), SamplingParams(max_new_tokens=count, ignore_eos=True, logprobs=0)))
    tokens, total = [], 0.0
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, TokenOutput):
                tokens += output.token_ids
                total += sum(candidates[0].logprob for candidates in output.logprobs)
    return tokens, total


@pytest.mark.parametrize("strategy", ["streaming", "retrieval", "sift+streaming"])
def test_what_a_strategy_has_said_is_as_likely_as_it_found_it(make: Make, strategy: str) -> None:
    """So a context is prefilled sparsely, and what follows is decoded sparsely."""
    arguments = [f"{part}.dense_below=0" for part in strategy.split("+")]
    if "streaming" in strategy:
        arguments += ["streaming.sink=16", "streaming.window=32"]
    engine, context = make(strategy=strategy, strategy_args=tuple(arguments), prefix_cache=False), some_tokens(300)
    said, total = generated(engine, context, 30)
    (found,) = likelihood.continuations(Reader(engine), engine.default, context, [said])
    assert found.total == pytest.approx(total, abs=1e-3)
    assert found.greedy


def test_a_strategy_counts_in_both_halves(make: Make, truth: Truth) -> None:
    engine, tokens = make(**SPARSE), some_tokens(300)
    exact = truth(tokens, 200)[0]
    (decoded,) = likelihood.continuations(Reader(engine), engine.default, tokens[:200], [tokens[200:]])
    assert abs(decoded.total - exact) > 0.1
    assert abs(likelihood.prompt(Reader(engine), engine.default, tokens, 200).total - exact) > 0.1


def test_judging() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    logs = logits.double().log_softmax(-1)
    assert score(logits, [2, 0]) == Likelihood(pytest.approx(float(logs[0, 2] + logs[1, 0])), True)
    assert score(logits, [2, 1]) == Likelihood(pytest.approx(float(logs[0, 2] + logs[1, 1])), False)
    assert Likelihood(-1.0, True) + Likelihood(-2.0, False) == Likelihood(-3.0, False)
