"""Offline inference: order, clean-up, concurrent iterators."""

from __future__ import annotations

from pathlib import Path

import pytest

from keysift.engine import LLM, FinishReason, InvalidRequest
from tests.engine.driver import greedy


def test_llm_yields_in_order_and_cleans_up_when_left_early(llm: LLM) -> None:
    prompts = ["one", "two and more", [5, 6, 7]]
    completions = list(llm.generate(prompts, greedy(6), progress=False))
    assert [completion.prompt for completion in completions] == prompts
    assert all(len(completion.token_ids) == 6 for completion in completions)
    assert all(completion.finish and completion.finish.reason is FinishReason.LENGTH for completion in completions)
    stream = llm.generate(prompts, greedy(30), progress=False)
    assert next(stream).prompt == "one"
    stream.close()
    assert llm.engine.status.running == llm.engine.status.waiting == 0


def test_llm_iterators_may_be_read_in_turns(llm: LLM) -> None:
    left = llm.generate(["abc", "defg"], greedy(5), progress=False)
    right = llm.generate(["hi", "jklm"], greedy(9), progress=False)
    read = [next(left), next(right), next(right), next(left)]
    assert [completion.prompt for completion in read] == ["abc", "hi", "jklm", "defg"]
    assert [len(completion.token_ids) for completion in read] == [5, 9, 9, 5]


def test_llm_refuses_before_it_starts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt: .* got 600"):
        llm.generate(["fine", "x" * 600], greedy(5), progress=False)
    assert not llm.engine.has_work


@pytest.fixture
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), dtype="float32", kv_memory=2**22, max_num_seqs=2)
