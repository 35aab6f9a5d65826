"""Texts of an engine's requests: what ends them, and what one request's broken logits do to the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keysift.engine import FinishReason, Request, SamplingParams, TokenOutput
from keysift.engine.execution import runner
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens

START = "<|start|>"


def test_a_hidden_special_token_ends_the_text(make: Make) -> None:
    engine = make()
    forced = {"logit_bias": {1: 10_000.0}, "stop_strings": (START * 2,)}
    engine.add(Request("a", tokens(20), greedy(9, **forced)))
    engine.add(Request("b", tokens(20), greedy(9, **forced, include_stop_strings=True, min_new_tokens=4)))
    outputs = drain(engine)
    texts = dict.fromkeys("ab", "")
    for output in outputs:
        if isinstance(output, TokenOutput):
            texts[output.request_id] += output.text
    assert texts == {"a": "", "b": START * 2}
    for name, count in (("a", 2), ("b", 5)):
        finish = finish_of(outputs, name)
        assert (finish.reason, finish.matched_stop) == (FinishReason.STOP, START * 2)
        assert finish.usage.completion_tokens == count


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_none_end_their_own_request(
    make: Make, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    names = ("a", "victim", "c")

    def run(broken: bool) -> Any:
        sample = runner.sample

        def poisoned(logits: torch.Tensor, states: Any) -> Any:
            rows = [
                row for row, state in enumerate(states) if state.prompt == tokens(20, 1) and len(state.generated) == 3
            ]
            return sample(logits.index_fill(0, torch.tensor(rows, dtype=torch.long), torch.nan), states)

        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(runner, "sample", poisoned)
            engine = make()
            for seed, name in enumerate(names):
                params = SamplingParams(max_new_tokens=9, ignore_eos=True, temperature=temperature)
                engine.add(Request(name, tokens(20, seed), params))
            return drain(engine)

    clean, outputs = run(broken=False), run(broken=True)
    finish = finish_of(outputs, "victim")
    assert finish.reason is FinishReason.ERROR
    assert "the greatest must be finite, got nan" in finish.error
    assert said(outputs, "victim") == said(clean, "victim")[:3]
    for name in ("a", "c"):
        assert said(outputs, name) == said(clean, name)
