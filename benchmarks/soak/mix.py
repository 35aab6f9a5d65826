"""The mix of requests: strategies, prompts, sampling and endings, drawn from shuffled decks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from typing import Any, NamedTuple, TypeVar

from keysift.attention import Dense, known, make
from keysift.attention.registry import options
from keysift.engine.measure.evaluation.texts import documentation
from keysift.engine.request import SamplingParams
from keysift.kvcache import Phase
from keysift.server.options import Prompt

T = TypeVar("T")
SHORT, MEDIUM, LONG = range(3)
SIZES = (SHORT,) * 11 + (MEDIUM,) * 7 + (LONG,) * 2
"""One deck of sizes of prompts."""
DOCUMENTS = 4
"""Beginnings that prompts share."""
SALTS = ("", "", "", "one", "two")
PRIORITIES = (0, 0, 0, -1, 1)
STOPS = ((), (), (), (".",), ("\n\n", "the"))
BUDGET = 256
"""Tokens that an index finds for a token: little, so that it has to choose."""


class Ending(Enum):
    """Planned ending of a request."""

    COMPLETE = "complete"
    ABORTED = "aborted"
    DROPPED = "dropped"
    LATE = "late"


ENDINGS = (Ending.COMPLETE,) * 17 + (Ending.ABORTED, Ending.DROPPED, Ending.LATE)
"""One deck of endings."""


class Recipe(NamedTuple):
    """A strategy with options of its own."""

    strategy: str
    arguments: Mapping[str, str] = {}

    def __str__(self) -> str:
        return " ".join([self.strategy, *(f"{name}={value}" for name, value in self.arguments.items())])


@dataclass(frozen=True, slots=True)
class Order:
    """One request to make."""

    recipe: Recipe
    prompt: Prompt
    params: SamplingParams
    ending: Ending = Ending.COMPLETE
    fields: dict[str, Any] = field(default_factory=dict)
    """Other keywords of `Client.generate`."""
    patience: float = 0.0
    """Outputs until an abort or a drop; share of a second until a deadline."""


def recipes() -> list[Recipe]:
    """Every strategy as it comes and choosing at every length, every index, every pair of a prompt and a token one."""
    every = sorted(known())
    eager = [Recipe(name, {"dense_below": "0"}) for name in every if "dense_below" in _bounds(name)]
    indexed = [
        Recipe(name, {"dense_below": "0", "budget": str(BUDGET), "index": index})
        for name in every
        for index in _bounds(name).get("index", {}).get("enum", ())
    ]
    prompts, tokens = (_choosing(phase) for phase in (Phase.PREFILL, Phase.DECODE))
    pairs = [
        Recipe(f"{prompt}+{token}", {"dense_below": "0"})
        for prompt, token in product(prompts, tokens)
        if prompt != token
    ]
    return [*map(Recipe, every), *eager, *indexed, *pairs]


def _bounds(name: str) -> dict[str, dict[str, Any]]:
    return {option.name: option.bounds for option in options(known()[name])}


def _choosing(phase: Phase) -> list[str]:
    """Strategies that choose pages in this phase."""
    return [name for name in sorted(known()) if not isinstance(make(name).part(phase), Dense)]


def deck(cards: Sequence[T], chance: random.Random) -> Iterator[T]:
    """The cards without end, in a new order each time all were drawn: every stretch of time gets the same mix."""
    while True:
        yield from chance.sample(cards, len(cards))


def orders(recipes: Sequence[Recipe], lengths: Sequence[int], token_size: float, seed: int) -> Iterator[Order]:
    """Requests of one client without end. `lengths`: most tokens of a short, a medium and a long prompt."""
    chance = random.Random(seed)
    text = documentation()
    drawn = zip(deck(recipes, chance), deck(SIZES, chance), deck(ENDINGS, chance), strict=True)
    for recipe, size, ending in drawn:
        tokens = chance.randint(max(lengths[size] // 2, 1), lengths[size])
        prompt = _prompt(text, max(int(tokens * token_size), 1), chance)
        yield Order(recipe, prompt, _params(chance), ending, _fields(chance), chance.random())


def _prompt(text: str, size: int, chance: random.Random) -> Prompt:
    """About `size` characters: text or a chat, with a beginning that others share or one of its own."""
    shared = chance.random() < 0.5
    start = len(text) // DOCUMENTS * chance.randrange(DOCUMENTS) if shared else chance.randrange(len(text) - size)
    content = f"{text[start : start + size]} {chance.randrange(1000)}"
    return [{"role": "user", "content": content}] if chance.random() < 0.3 else content


def _params(chance: random.Random) -> SamplingParams:
    sampled = chance.random() < 0.5
    return SamplingParams(
        temperature=chance.choice((0.7, 1.0)) if sampled else 0.0,
        top_k=chance.choice((0, 40)) if sampled else 0,
        top_p=chance.choice((1.0, 0.9)) if sampled else 1.0,
        min_p=chance.choice((0.0, 0.05)) if sampled else 0.0,
        seed=chance.randrange(2**31) if sampled else None,
        repetition_penalty=chance.choice((1.0, 1.0, 1.1)),
        presence_penalty=chance.choice((0.0, 0.0, 0.5)),
        logprobs=chance.choice((None, None, 0, 5)),
        max_new_tokens=chance.randint(4, 40),
        min_new_tokens=chance.choice((0, 0, 4)),
        stop_strings=chance.choice(STOPS),
        ignore_eos=chance.random() < 0.3,
    )


def _fields(chance: random.Random) -> dict[str, Any]:
    return {
        "cache_salt": chance.choice(SALTS),
        "priority": chance.choice(PRIORITIES),
        "bypass_prefix_cache": chance.random() < 0.1,
    }
