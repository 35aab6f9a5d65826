"""Tokenizer and incremental detokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from ..errors import InvalidRequest, Unsupported

TAIL = 16
"""Prompt tokens that seed a stream, for decoders that treat the start of a text differently."""
MARK = "keysift0message"
"""A message that no template contains."""


class Tokenizer:
    """A model's tokenizer and chat template. Immutable, so that threads can share it.

    Raises `Unsupported` for a tokenizer that has no fast implementation.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise Unsupported(f"{type(hf_tokenizer).__name__}: has no fast tokenizer (tokenizer.json)")
        # transformers sets truncation and padding on its backend call by call, which threads must not share.
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self._hf = hf_tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """Token that begins a text; None: the model has none."""
        return self._hf.bos_token_id  # type: ignore[no-any-return]

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a text; None: the model has none."""
        return self._hf.eos_token_id  # type: ignore[no-any-return]

    @property
    def chat_template(self) -> str | None:
        return self._hf.chat_template  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, in the format of transformers."""
        self._hf.save_pretrained(folder)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of `text`, with the special tokens that the model expects around a text."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Tokens of a conversation in the model's own template; messages carry ``role`` and ``content``.

        Raises `InvalidRequest` where the model has no template or the template rejects the messages.
        """
        return self.encode(self.render(messages, add_generation_prompt), add_special_tokens=False)

    def around(self) -> tuple[str, str] | None:
        """Text of the chat template before and after a single user message; None: there is no template.

        Raises `InvalidRequest` where the template does not contain the message unchanged, once.
        """
        if not self._hf.chat_template:
            return None
        parts = self.render([{"role": "user", "content": MARK}], add_generation_prompt=True).split(MARK)
        if len(parts) != 2:
            raise InvalidRequest("chat", f"the model's template shows a message {len(parts) - 1} times instead of once")
        return parts[0], parts[1]

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, **options: Any) -> str:
        """Text of a conversation in the model's template; `options` are those of transformers."""
        if not self._hf.chat_template:
            raise InvalidRequest("chat", "the model has no chat template")
        try:
            return self._hf.apply_chat_template(  # type: ignore[no-any-return]
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise InvalidRequest("chat", f"the model's template rejects the messages: {error}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Incremental detokenizer: turns a stream of tokens into text that is final as soon as it is returned.

    All that `push` and `flush` return joins to the decoded text of all tokens, but for a space where bytes that are not
    valid text were skipped. `prompt` precedes the stream, so that a first word keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context = self._whole_characters(prompt[-TAIL:])
        self._pending: list[int] = []
        self._stream = self._start(self._context)

    def push(self, token_id: int) -> str:
        """Text that becomes final with this token; empty while a character is incomplete."""
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:
            # The library rejects invalid bytes once they have changed the meaning of earlier ones.
            return self._restart(token_id)
        self._pending.append(token_id)
        if not text:
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Text of tokens that are held back for the rest of a character, which does not follow."""
        before, after = self._decode(self._context), self._decode([*self._context, *self._pending])
        self._context, self._pending = self._pending or self._context, []
        return after[len(before) :]

    def _restart(self, token_id: int) -> str:
        rest = self.flush()
        self._stream = self._start(())
        return rest + self.push(token_id)

    def _start(self, prompt: Sequence[int]) -> DecodeStream:
        return DecodeStream(ids=list(prompt), skip_special_tokens=self._skip)

    def _whole_characters(self, prompt: Sequence[int]) -> list[int]:
        """`prompt` without an incomplete last character: a stream seeded with one repeats the prompt's text."""
        ids = list(prompt)
        while ids and self._decode(ids).endswith("\ufffd"):
            ids.pop()
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)
