"""Sampling: the effect of every option, and independence of the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from keysift.engine.errors import InvalidRequest, NoChoice
from keysift.engine.execution.sampler import SamplerState, check, derive_seed, sample
from keysift.engine.request import SamplingParams

VOCABULARY = 11
LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.5, -1.0, 0.5, 2.5, 1.5, -2.0, 0.25])
TOP = 4
EOS = frozenset({TOP})


def state(
    prompt: tuple[int, ...] = (1, 2), generated: tuple[int, ...] = (), default_seed: int = 0, **params: Any
) -> SamplerState:
    return SamplerState(
        params=SamplingParams(**params), prompt=prompt, generated=list(generated), eos_token_ids=EOS, seed=default_seed
    )


def pick(logits: Tensor = LOGITS, **fields: Any) -> int:
    return sample(logits[None], [state(**fields)])[0].token_id


def frequencies(draws: int = 3000, **params: Any) -> Tensor:
    """Counts [V] of the tokens that one request with these parameters draws from `LOGITS`."""
    one = state(**params)
    counts = Counter(sample(LOGITS[None], [one])[0].token_id for _ in range(draws))
    return torch.tensor([counts[token] / draws for token in range(VOCABULARY)])


def close(measured: Tensor, scores: Tensor) -> None:
    torch.testing.assert_close(measured, scores.softmax(-1), atol=0.03, rtol=0)


def only(*tokens: int) -> Tensor:
    """LOGITS [V] with all other tokens masked."""
    return torch.full((VOCABULARY,), -torch.inf).index_copy(0, torch.tensor(tokens), LOGITS[list(tokens)])


def test_greedy_takes_the_most_likely() -> None:
    assert pick() == TOP


def test_temperature_flattens_and_sharpens() -> None:
    close(frequencies(temperature=1.0), LOGITS)
    close(frequencies(temperature=2.0), LOGITS / 2)
    close(frequencies(temperature=0.5), LOGITS / 0.5)


def test_top_k() -> None:
    close(frequencies(temperature=1.0, top_k=3), only(3, 4, 7))


def test_top_p() -> None:
    close(frequencies(temperature=1.0, top_p=0.6), only(3, 4))


def test_min_p() -> None:
    close(frequencies(temperature=1.0, min_p=0.3), only(3, 4, 7))


def test_allowed_token_ids() -> None:
    assert pick(allowed_token_ids=(0, 5, 9)) == 0
    close(frequencies(temperature=1.0, allowed_token_ids=(1, 3, 3)), only(1, 3))


def test_logit_bias() -> None:
    assert pick(logit_bias={9: 6.0}) == 9
    assert pick(logit_bias={TOP: -1.0}) == 3
    assert pick(logit_bias={TOP: float("-inf")}) == 3


def test_presence_penalty_counts_generated_tokens_once() -> None:
    assert pick(generated=(4, 4), presence_penalty=0.4) == TOP
    assert pick(generated=(4, 4), presence_penalty=0.6) == 3
    assert pick(prompt=(4, 4), presence_penalty=2.0) == TOP


def test_frequency_penalty_counts_every_time() -> None:
    assert pick(generated=(4,), frequency_penalty=0.3) == TOP
    assert pick(generated=(4, 4), frequency_penalty=0.3) == 3
    assert pick(prompt=(4, 4, 4), frequency_penalty=2.0) == TOP


def test_repetition_penalty_covers_prompt_and_generated() -> None:
    assert pick(repetition_penalty=1.2) == TOP
    assert pick(prompt=(1, TOP), repetition_penalty=1.2) == 3
    assert pick(generated=(TOP,), repetition_penalty=1.2) == 3
    assert pick(-LOGITS, prompt=(9,), repetition_penalty=3.0) == 5


@pytest.mark.parametrize(
    ("fields", "token"),
    [
        ({"min_new_tokens": 2}, 3),
        ({"min_new_tokens": 2, "generated": (1,)}, 3),
        ({"min_new_tokens": 2, "generated": (1, 1)}, TOP),
        ({"min_new_tokens": 2, "ignore_eos": True}, TOP),
        ({"min_new_tokens": 2, "stop_token_ids": (3, 7)}, 2),
        ({"min_new_tokens": 2, "stop_token_ids": (3,), "ignore_eos": True}, TOP),
    ],
)
def test_min_new_tokens_masks_tokens_that_end_the_text(fields: dict[str, Any], token: int) -> None:
    assert pick(**fields) == token


def test_a_token_does_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.3, "min_p": 0.05, "seed": 4},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3, "temperature": 1.0},
        {"logit_bias": {5: 3.0}, "logprobs": 2},
    ]
    together = [state(default_seed=row, **variant) for row, variant in enumerate(variants)]
    alone = [state(default_seed=row, **variant) for row, variant in enumerate(variants)]
    for _ in range(20):
        logits = torch.randn(len(variants), 500, generator=generator)
        batch = sample(logits, together)
        assert batch == [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(alone)]
        for one, other, choice in zip(together, alone, batch, strict=True):
            one.generated.append(choice.token_id)
            other.generated.append(choice.token_id)


def test_seeds() -> None:
    def run(**fields: Any) -> list[int]:
        one = state(temperature=1.0, **fields)
        return [sample(LOGITS[None], [one])[0].token_id for _ in range(30)]

    assert run(default_seed=1) == run(default_seed=1) != run(default_seed=2)
    assert run(seed=1, default_seed=1) == run(seed=1, default_seed=2) != run(seed=2, default_seed=1)
    assert derive_seed(0, "a") == derive_seed(0, "a")
    assert len({derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a")}) == 3


def test_logprobs_are_of_the_raw_distribution() -> None:
    raw = LOGITS.log_softmax(-1)
    [(token, logprobs)] = sample(LOGITS[None], [state(logit_bias={6: 9.0}, logprobs=3)])
    assert token == 6
    assert [(entry.token_id, entry.rank) for entry in logprobs] == [(6, 7), (4, 1), (3, 2), (7, 3)]
    assert [entry.logprob for entry in logprobs] == pytest.approx([float(raw[entry.token_id]) for entry in logprobs])
    assert [entry.rank for entry in sample(LOGITS[None], [state(logprobs=0)])[0].logprobs] == [1]
    assert sample(LOGITS[None], [state()])[0].logprobs == ()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {11: 1.0}}, "logit_bias: token ids below the vocabulary size 11, got 11"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias: .* got nan for token 3"),
        ({"allowed_token_ids": (2, 40)}, "allowed_token_ids: .* 11, got 40"),
        ({"stop_token_ids": (12,)}, "stop_token_ids: .* got 12"),
        ({"allowed_token_ids": (TOP,), "min_new_tokens": 1}, "allowed_token_ids: at least one"),
    ],
)
def test_check_names_field_limit_and_value(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check(SamplingParams(**params), VOCABULARY, EOS)


def test_check_accepts_the_whole_vocabulary() -> None:
    ids = tuple(range(VOCABULARY))
    check(
        SamplingParams(allowed_token_ids=ids, stop_token_ids=ids[:3], logit_bias={10: float("-inf")}), VOCABULARY, EOS
    )


@pytest.mark.parametrize("later", [False, True], ids=["its own row", "a later row"])
def test_a_step_that_failed_has_drawn_nothing(later: bool) -> None:
    """A failed step is run again with the same result."""
    flat = torch.zeros(2, 1000)
    expected = [choice.token_id for choice in sample(flat, [state(temperature=1.0, seed=seed) for seed in (1, 2)])]
    states = [state(temperature=1.0, seed=seed) for seed in (1, 2)]

    def hungry(_generated: Tensor, _scores: Tensor) -> Tensor:
        return torch.empty(2**50)

    processors = states[later].processors
    states[later].processors = (hungry,)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        sample(flat, states)
    states[later].processors = processors
    assert [choice.token_id for choice in sample(flat, states)] == expected


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf], ids=str)
def test_logits_without_a_finite_greatest_fail_before_anything_is_drawn(wrong: float) -> None:
    flat = torch.zeros(3, 1000)
    seeds = (1, 2, 3)
    expected = sample(flat, [state(temperature=1.0, seed=seed) for seed in seeds])
    states = [state(temperature=1.0, seed=seed) for seed in seeds]
    with pytest.raises(NoChoice, match=rf"logits of row 1 of 3: .* got {wrong}"):
        sample(flat.index_put((torch.tensor(1), torch.tensor(7)), torch.tensor(wrong)), states)
    with pytest.raises(NoChoice, match=r"row 0 of 1: .* got -inf"):
        sample(torch.full((1, 9), -torch.inf), [state()])
    assert sample(flat, states) == expected


def test_a_model_may_mask_tokens_itself() -> None:
    masked = LOGITS.index_fill(0, torch.tensor([TOP]), -torch.inf)
    assert pick(masked) == 3
    assert pick(masked, temperature=1.0, top_k=1) == 3


class Watched(list[int]):
    """Generated tokens that count how many of them are read."""

    read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.read += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self) -> Any:
        raise AssertionError("all tokens are read again")


@pytest.mark.parametrize("penalty", [{"frequency_penalty": 0.1}, {"repetition_penalty": 1.1}, {"presence_penalty": 1}])
def test_penalties_read_each_generated_token_once(penalty: dict[str, float]) -> None:
    one = state(**penalty, temperature=1.0)
    one.generated = Watched([1, 2, 3])
    for token in range(5):
        sample(LOGITS[None], [one])
        one.generated.append(token)
    assert one.generated.read == 3 + 4


def test_other_parameters_read_no_generated_token() -> None:
    one = state(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, min_new_tokens=9, logit_bias={1: 1.0})
    one.generated = Watched([1, 2, 3])
    sample(LOGITS[None], [one])
    assert one.generated.read == 0


def test_a_step_that_runs_again_counts_nothing_twice() -> None:
    one, other = (state(generated=(4,), frequency_penalty=0.3, presence_penalty=0.1) for _ in range(2))
    for _ in range(3):
        assert sample(LOGITS[None], [one]) == sample(LOGITS[None], [one])
    assert sample(LOGITS[None], [one]) == sample(LOGITS[None], [other])
