"""The base class of every strategy: dense attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from keysift.kvcache import CacheSpec, Context, Phase, Selection
from keysift.kvcache.index import IndexSpec

LARGEST = 2**31 - 1
"""Positions are int32 on the device."""

Tokens = Annotated[int, Field(ge=0, le=LARGEST)]
"""A number of tokens."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Few = Annotated[int, Field(ge=1, le=4096)]
"""A number of things that each query makes room for."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Chooses the pages that each row of queries reads. This base chooses all of them: dense attention.

    A strategy is frozen and holds no state of any sequence; its fields are its options. A subclass states only what it
    does differently. Whatever it chooses must be ascending, unique and causal, and must contain the row's own pages.
    """

    dense_below: Tokens = 0
    """Tokens up to which reading everything is faster than choosing: of a prompt that is one chunk, or of the context.

    A chunk of Nq queries of a longer prompt is sparse once its context exceeds dense_below**2 / Nq; see `at`.
    """
    yardstick: ClassVar[bool] = False
    """It is there to measure others by and never saves time, so nothing asks from which length on it does."""
    replayable: ClassVar[bool] = False
    """What it does for generated tokens follows from tensors on the device alone, with the same ops each time, so that
    a recorded step can be replayed for others of its shape; as long as its index, if any, keeps nothing itself."""
    config_key: ClassVar[str | None] = None
    """Under which name the configuration of a model states options that it was trained with, if any does."""

    @property
    def scans(self) -> bool:
        """It looks at all keys of a layer at once, beside those that it chooses."""
        return False

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first field whose value is out of its bounds."""
        for name, check in _checks(type(self)).items():  # type: ignore[arg-type]  # a class is hashable
            try:
                check.validate_python(value := getattr(self, name), strict=True)
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg']}, got {value!r}") from None

    def prefill(self, q: Tensor, context: Context) -> Selection:
        """Pages for the rows of one prompt chunk, q [T, Hq, D] after rotary embedding."""
        return context.all()

    def decode(self, q: Tensor, context: Context) -> Selection:
        """Pages for one token of each sequence, q [B, Hq, D]; by default as for a prompt."""
        return self.prefill(q, context)

    def index_spec(self) -> IndexSpec | None:
        """The index over cached keys that it searches, if any; a pair's is that of its part for tokens."""
        return None

    def check(self, spec: CacheSpec) -> None:
        """Raises `ValueError` where it cannot work on a cache of this shape."""

    def part(self, phase: Phase) -> Strategy:
        """The strategy that is responsible for a phase."""
        return self

    @property
    def remembers(self) -> bool:
        """What a token reads follows from what those before it read: they have to be decoded to decode it again."""
        return False

    @property
    def rows_at_the_end(self) -> int:
        """Rows at the end of a prompt that are treated as such; inside a longer prompt they would read less."""
        return 0

    def at(self, phase: Phase, context_len: int, queries: int) -> Strategy:
        """What runs for a step: the part for its phase, or `Dense` where choosing would cost more than it saves.

        A generated token decides by its context. A prompt, or a chunk of one, decides by its work, queries x context,
        against that of a prompt of `dense_below` tokens: a chunk of Nq queries is sparse when its context, itself
        included, exceeds dense_below**2 / Nq. So a short chunk behind a long prefix may be worth choosing for.
        """
        part = self.part(phase)
        work, least = context_len, part.dense_below
        if phase is Phase.PREFILL:
            work, least = queries * context_len, part.dense_below**2
        return part if work > least else Dense()

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(Strategy):
    """Every page: exact attention, the reference of all others."""

    replayable = True

    def part(self, phase: Phase) -> Strategy:
        """Without its options, which change nothing: dense below some length is no fallback of dense."""
        return Dense()


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(Strategy):
    """One strategy for the prompt, another for the generated tokens."""

    prompt: Strategy
    token: Strategy

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return self.prompt.prefill(q, context)

    def decode(self, q: Tensor, context: Context) -> Selection:
        return self.token.decode(q, context)

    def index_spec(self) -> IndexSpec | None:
        return self.token.index_spec()

    @property
    def remembers(self) -> bool:
        return self.token.remembers

    def check(self, spec: CacheSpec) -> None:
        for part in (self.prompt, self.token):
            part.check(spec)

    def part(self, phase: Phase) -> Strategy:
        return (self.prompt if phase is Phase.PREFILL else self.token).part(phase)

    @property
    def name(self) -> str:
        return f"{self.prompt.name}+{self.token.name}"


@functools.cache
def _checks(strategy: type[Strategy]) -> dict[str, TypeAdapter[object]]:
    """A validator for each option; the parts of a `Split` have checked themselves."""
    hints = get_type_hints(strategy, include_extras=True)
    options = {field.name: hints[field.name] for field in fields(strategy)}
    return {name: TypeAdapter(hint) for name, hint in options.items() if hint is not Strategy}
