"""A question after a long context, and the score of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Match = Literal["all", "any"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A tokenized prompt and its right answers."""

    task: str
    length: int
    """Target length in tokens: the prompt and room for the answer."""
    index: int
    """Number among the samples of this task and length."""
    prompt: tuple[int, ...]
    """The context, the question last."""
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    """The right answer as a continuation of the prompt."""
    max_new_tokens: int
    match: Match = "all"
    """`all`: the score is the share of answers that the text contains; `any`: one of them is enough."""

    def score(self, text: str) -> float:
        """Score from 0 to 1 as in RULER: answers may appear anywhere in the text, in any case."""
        lowered = text.lower()
        found = [answer.lower() in lowered for answer in self.answers]
        return sum(found) / len(found) if self.match == "all" else float(any(found))
