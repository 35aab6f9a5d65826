"""Settings of `keysift eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ...checked import Checked, split
from ..variants import Variant, variants

Length = Annotated[int, Field(ge=64)]


class Evaluation(Checked):
    """Strategies, tasks, lengths and number of samples of an evaluation."""

    strategies: tuple[str, ...] = Field(
        ("sift+retrieval",),
        min_length=1,
        description="NAME or PROMPT+TOKEN to compare with dense, repeatable; its own options after commas: "
        "sift+retrieval,sift.threshold=0.002",
    )
    strategy_args: tuple[str, ...] = Field(
        (), description="NAME.FIELD=VALUE for every strategy with that part, FIELD=VALUE for all that have it"
    )
    always_sparse: bool = Field(
        False,
        description="have strategies choose at every length, also where they would read everything as it is faster",
    )
    tasks: Annotated[tuple[str, ...], BeforeValidator(split)] = Field(
        ("all",),
        min_length=1,
        description="built-in tasks (see `keysift eval --list-tasks`), all, none, or a .jsonl file of your own",
    )
    lengths: Annotated[tuple[Length, ...], BeforeValidator(split)] = Field(
        (1024, 2048, 4096), min_length=1, description="tokens of a prompt and room for its answer"
    )
    samples: int = Field(2, ge=1, description="questions of each task and length")
    texts: tuple[Path, ...] = Field(
        (), description="text files to compare with dense along, in addition to CPython's documentation; repeatable"
    )
    agreement: bool = Field(
        True,
        description="compare next-token distributions with dense along texts; along questions and answers they always "
        "are",
    )
    chat: bool = Field(True, description="ask in the model's chat template, if it has one")
    seed: int = Field(0, ge=0, description="of the questions; the same seed gives the same results")
    output_dir: Path = Field(
        Path("keysift-eval"), description="gets results.json and report.html; an unfinished run there goes on"
    )
    restart: bool = Field(False, description="begin anew where output_dir holds another run")
    lm_eval: Annotated[tuple[str, ...], BeforeValidator(split)] = Field(
        (),
        description="tasks of lm-evaluation-harness to run instead, at each of --lengths; takes the extra lm-eval",
    )
    max_loss: float | None = Field(
        None, ge=0, le=1, description="exit with 1 if a strategy scores lower than dense by more than this"
    )

    @property
    def variants(self) -> tuple[Variant, ...]:
        return variants(self.strategies, self.strategy_args, always_sparse=self.always_sparse)

    def identity(self) -> dict[str, Any]:
        """Settings that two runs must share to be parts of one."""
        return self.model_dump(mode="json", exclude={"output_dir", "restart", "max_loss", "samples", "lm_eval"})
