"""The base class of every strategy: dense attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from keysift.kvcache import CacheSpec, Context, Phase, Selection
from keysift.kvcache.index import IndexSpec

T = TypeVar("T")

LARGEST = 2**31 - 1
"""Positions are int32 on the device."""

Tokens = Annotated[int, Field(ge=0, le=LARGEST)]
"""A number of tokens."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Few = Annotated[int, Field(ge=1, le=4096)]
"""A number of results that memory is allocated for, query by query."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def option(default: T, description: str) -> T:
    """A dataclass field with a default and a description, which `registry.options` lists.

    A subclass that changes only the default keeps the description: ``window: Positive = 512``.
    """
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Chooses the pages that each row of queries reads. This base chooses all of them: dense attention.

    A strategy is frozen and holds no state of any sequence; its fields are its options. A subclass states only what it
    does differently. Whatever it chooses must be ascending, unique and causal, and must contain the row's own pages.
    """

    dense_below: Tokens = option(
        0,
        "tokens of a context up to which everything is read, faster than choosing; a prompt's chunk of N queries is "
        "sparse once its context exceeds dense_below^2 / N",
    )
    source: ClassVar[str] = ""
    """Paper of the method: authors, title and arXiv number. Empty: none."""
    yardstick: ClassVar[bool] = False
    """A reference for measuring others, never faster than dense, so it is not calibrated."""
    replayable: ClassVar[bool] = False
    """Decode steps can be recorded as a CUDA graph: the same ops every time, on nothing but tensors of the device.

    As long as its index, if any, keeps nothing outside the cache.
    """
    config_key: ClassVar[str | None] = None
    """Key of a model's configuration that holds the options which it was trained with; see `from_config`."""
    removed: ClassVar[Mapping[str, str]] = {}
    """Options that were removed, each with what to use instead."""

    @property
    def scans(self) -> bool:
        """Selection needs every key of the layer resident."""
        return False

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the first field whose value is out of its bounds."""
        for name, check in validators(type(self)).items():
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
        """The index over cached keys that `decode` reads, if any; for a pair that of its part for tokens."""
        return None

    def check(self, spec: CacheSpec) -> None:
        """Raises `ValueError` for a cache of a shape that the strategy does not support."""

    @classmethod
    def from_config(cls, stated: Mapping[str, object]) -> dict[str, object]:
        """Options from what a model's configuration holds under `config_key`.

        Raises `ValueError` naming an entry that is not supported.
        """
        return dict(stated)

    def part(self, phase: Phase) -> Strategy:
        """The strategy that chooses in a phase: itself, the part of a pair, or `Dense`."""
        return self

    @property
    def remembers(self) -> bool:
        """A token's selection depends on those of earlier tokens, so recomputing it means decoding them again."""
        return False

    @property
    def rows_at_the_end(self) -> int:
        """Rows at the end of a prompt with a selection of their own; inside a longer prompt they would read less."""
        return 0

    def at(self, phase: Phase, context_len: int, queries: int) -> Strategy:
        """The strategy of a step: the part for its phase, or `Dense` where choosing would cost more than it saves.

        A generated token is compared by its context. A prompt's chunk is compared by its work, queries x context, with
        a prompt of `dense_below` tokens: Nq queries are sparse when their context, themselves included, exceeds
        dense_below**2 / Nq. So a short chunk after a long prefix may be worth choosing for.
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
    """Every page: exact attention, the reference for all others."""

    replayable = True
    dense_below: Tokens = option(0, "no effect: everything is read at any length")

    def part(self, phase: Phase) -> Strategy:
        """`Dense` without options, as they change nothing: below `dense_below` it is the same strategy, no fallback."""
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


def validators(strategy: type[Strategy]) -> dict[str, TypeAdapter[object]]:
    """Pydantic's validator of each option. The parts of a `Split` are no options: they validate themselves."""
    return _validators(strategy)  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _validators(strategy: type[Strategy]) -> dict[str, TypeAdapter[object]]:
    hints = get_type_hints(strategy, include_extras=True)
    options = {field.name: hints[field.name] for field in fields(strategy)}
    return {name: TypeAdapter(hint) for name, hint in options.items() if hint is not Strategy}
