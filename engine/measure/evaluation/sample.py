"""One question behind a long context, and how its answer is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Match = Literal["all", "any"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt of tokens with the answers that it has."""

    task: str
    length: int
    """Tokens that it was made for: the prompt and room for the answer."""
    index: int
    """Its number among the samples of this task and length."""
    prompt: tuple[int, ...]
    """The context, the question last."""
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    """The right answer as the model would go on to say it."""
    max_new_tokens: int
    match: Match = "all"
    """`all`: the score is the share of the answers that are said; `any`: one of them is enough."""

    def score(self, text: str) -> float:
        """0 to 1, letters in any case, as RULER scores: answers may stand anywhere in what was said."""
        said = text.lower()
        found = [answer.lower() in said for answer in self.answers]
        return sum(found) / len(found) if self.match == "all" else float(any(found))
