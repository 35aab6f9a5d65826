"""Text of a request, built from its tokens as far as it is final."""

from __future__ import annotations

from ..model.tokenizer import Detokenizer
from ..request import SamplingParams
from .stop import StopStrings


class Transcript:
    """Text of one request: whole characters only, without stop strings, up to the token that ends it."""

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams, eos_token_ids: frozenset[int]) -> None:
        self.matched: str | int | None = None
        """Stop string or token id that ended the text."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(params.stop_strings, params.include_stop_strings)
        self._ends = params.endings(eos_token_ids)
        self._min_new_tokens = params.min_new_tokens
        self._count = 0

    def push(self, token: int) -> str:
        """Text that becomes final with this token."""
        self._count += 1
        if self._count > self._min_new_tokens and token in self._ends:
            self.matched = token
            return self.flush()
        return self._push_text(self._detokenizer.push(token))

    def flush(self) -> str:
        """Text that was held back, once no token follows."""
        rest = self._detokenizer.flush()
        return self._stops.flush() + rest if self.matched is not None else self._push_text(rest) + self._stops.flush()

    def _push_text(self, text: str) -> str:
        if self._count <= self._min_new_tokens:
            return text
        out, stop = self._stops.push(text)
        self.matched = stop if self.matched is None else self.matched
        return out
