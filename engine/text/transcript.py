"""Text of a request, built from its tokens as far as it is final."""

from __future__ import annotations

from ..model.tokenizer import Detokenizer
from ..request import SamplingParams
from .stop import StopStrings


class Transcript:
    """Text of one request: whole characters only, without stop strings, up to the token that ends it.

    Stop strings are sought in all that the model said: special tokens that are not shown are spelled for them, and so
    is the token that ends the text.
    """

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams, eos_token_ids: frozenset[int]) -> None:
        self.matched: str | int | None = None
        """Stop string or token id that ended the text; where one token completes both, the string."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(params.stop_strings, params.include_stop_strings)
        self._ends = params.endings(eos_token_ids)
        self._min_new_tokens = params.min_new_tokens
        self._count = 0

    def push(self, token: int) -> str:
        """Text that becomes final with this token."""
        self._count += 1
        if self._may_end and token in self._ends:
            return self._end(token)
        if self._detokenizer.hides(token):
            return self._match(self._detokenizer.spelled(token), shown=False)
        return self._match(self._detokenizer.push(token))

    def flush(self) -> str:
        """Text that was held back, once no token follows."""
        return self._match(self._detokenizer.flush()) + self._stops.flush()

    @property
    def _may_end(self) -> bool:
        return self._count > self._min_new_tokens

    def _end(self, token: int) -> str:
        text = self._match(self._detokenizer.flush())
        if self.matched is None:
            text += self._match(self._detokenizer.spelled(token), shown=False)
        if self.matched is None:
            self.matched = token
        return text + self._stops.flush()

    def _match(self, text: str, shown: bool = True) -> str:
        out, stop = self._stops.push(text, shown, ends=self._may_end)
        self.matched = stop if self.matched is None else self.matched
        return out
