"""Settings of `keysift profile`."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, Field

from keysift.attention import DEFAULT

from ...checked import Checked, split
from ..variants import DENSE, Variant, variants

Count = Annotated[int, Field(ge=1)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(split)]


class Cell(NamedTuple):
    """One row of the table: a strategy, tokens of each prompt, and prompts at once."""

    variant: Variant
    input_len: int
    batch_size: int


class Profile(Checked):
    """The cells of a profile, and the runs of each."""

    strategies: tuple[str, ...] = Field(
        (DENSE, DEFAULT),
        min_length=1,
        description="NAME or PROMPT+TOKEN, repeatable; its own options after commas: "
        "sift+retrieval,sift.threshold=0.002",
    )
    strategy_args: tuple[str, ...] = Field(
        (), description="NAME.FIELD=VALUE for every strategy with that part, FIELD=VALUE for all that have it"
    )
    input_lens: Counts = Field((2000, 8000), min_length=1, description="tokens of each prompt, such as 2000,8000")
    output_len: int = Field(32, ge=1, description="tokens to generate after each prompt")
    batch_sizes: Counts = Field((1,), min_length=1, description="prompts that start at once, such as 1,4")
    runs: int = Field(3, ge=1, description="undisturbed runs of each cell, of which medians are taken")
    warmup: int = Field(1, ge=0, description="runs of each cell before those that count")
    attempts: int = Field(6, ge=1, description="most runs of a cell to get the undisturbed ones; at least `runs` run")
    text: Path | None = Field(None, description="text file to cut prompts from; none: CPython's documentation")
    output_dir: Path = Field(
        Path("keysift-profile"),
        description="gets profile.json, trace.json.gz and report.html; an older one is replaced",
    )

    @property
    def variants(self) -> list[Variant]:
        """Variants of the strategies, `dense` first if it is among them."""
        return [each for each in variants(self.strategies, self.strategy_args) if each.label in self.strategies]

    def cells(self) -> list[Cell]:
        """Cells in order of length and batch size, for early results; strategies follow each other."""
        sizes = product(sorted(self.input_lens), sorted(self.batch_sizes), self.variants)
        return [Cell(variant, length, count) for length, count, variant in sizes]
