"""What to profile."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from keysift.attention import DEFAULT

from ..checked import Checked
from ..errors import InvalidRequest


class Cell(NamedTuple):
    """One row of the table: a strategy, tokens of each prompt, and prompts at once."""

    strategy: str
    input_len: int
    batch_size: int


class ProfileSettings(Checked):
    """The cells, and how each of them is measured."""

    strategy: tuple[str, ...] = Field(
        ("dense", DEFAULT), min_length=1, description="strategy to profile, or PROMPT+TOKEN for one each; repeatable"
    )
    input_lens: tuple[int, ...] = Field(
        (2000, 8000), min_length=1, description="tokens of each prompt, such as 2000,8000; repeatable"
    )
    output_len: int = Field(32, ge=2, description="tokens to generate after each prompt")
    batch_sizes: tuple[int, ...] = Field(
        (1,), min_length=1, description="prompts that start at once, such as 1,4; repeatable"
    )
    runs: int = Field(3, ge=1, description="undisturbed runs of each cell, of which medians are taken")
    warmup: int = Field(1, ge=0, description="runs of each cell before those that count")
    attempts: int = Field(6, ge=1, description="most runs of a cell, the disturbed ones included, but at least `runs`")
    text: Path | None = Field(None, description="text file to cut prompts from; none: CPython's documentation")

    @field_validator("strategy", "input_lens", "batch_sizes", mode="before")
    @classmethod
    def _apart(cls, values: Any) -> tuple[Any, ...]:
        """Several values may stand in one word, as command lines like to spell them. Each counts once."""
        several = [values] if isinstance(values, str | int) else list(values)
        words = [value.split(",") if isinstance(value, str) else [value] for value in several]
        return tuple(dict.fromkeys(part for parts in words for part in parts))

    @field_validator("input_lens", "batch_sizes")
    @classmethod
    def _positive(cls, values: tuple[int, ...], info: Any) -> tuple[int, ...]:
        if min(values) < 1:
            raise InvalidRequest(info.field_name, f"at least 1, got {min(values)}")
        return values

    def cells(self) -> list[Cell]:
        """Short ones first, so that there is soon something to see; the strategies beside each other."""
        sizes = product(sorted(self.input_lens), sorted(self.batch_sizes), self.strategy)
        return [Cell(strategy, length, count) for length, count, strategy in sizes]


def arguments_of(strategy: str, arguments: Iterable[str]) -> tuple[str, ...]:
    """Those of the ``NAME.FIELD=VALUE`` arguments that belong to this strategy; without a name they are everybody's."""
    parts = {strategy, *strategy.split("+")}
    heads = ((argument, argument.partition("=")[0].rpartition(".")[0].strip()) for argument in arguments)
    return tuple(argument for argument, name in heads if not name or name in parts)
