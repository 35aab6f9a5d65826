"""Tokenizer and incremental detokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError

from ..errors import InvalidRequest, Unsupported, shortened
from .quoting import Quoting, Written, check_text

PASSED_ON = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)
"""What says nothing about the text that was being read."""
TAIL = 20
"""Tokens before a stream, for decoders that treat the start of a text differently, and at the end of a window: its last
characters, of up to four bytes each, begin within them."""
HEAD = 4
"""Tokens that decide whether a run of bytes can still be valid text."""
WINDOW = 64
"""Most tokens that wait for the rest of a character; at most as many before them are decoded with them."""
UNKNOWN = "\ufffd"
"""What stands in decoded text for bytes that are no character, or none yet."""
BYTES = 4
"""Most bytes of a character."""
MARK = "keysift0message"
"""A message that no template contains."""


LONGEST = 300
"""Characters kept of a template's message, which may repeat what it was given."""
WRONG_MESSAGES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What templates raise for messages of a form that they do not expect."""


@contextmanager
def _reading() -> Iterator[None]:
    """Block in which the library reads what a request says: what it cannot read is the request's error."""
    try:
        yield
    except (InvalidRequest, *PASSED_ON):
        raise
    except BaseException as error:  # a Rust panic is no Exception
        raise InvalidRequest("prompt", f"the tokenizer cannot read it: {shortened(error)}") from error


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
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        """Tokens that are left out of shown text."""
        self.longest_token = max(map(len, self.backend.get_vocab()))
        """Length of the longest token in characters."""
        plain, whole = self._ids("x", False), self._ids("x", True)
        starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        self.opening = tuple(whole[: next(starts, 0)])
        """Special tokens that the model expects before a text."""
        template = hf_tokenizer.chat_template
        self._quoting = Quoting(self.backend, str(template), hf_tokenizer.unk_token_id) if template else None

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
        """Tokens of `text`, with the special tokens that the model expects around a text.

        A text that begins with them, as one in the model's template does, gets no second ones. Other threads run
        meanwhile. Raises `InvalidRequest` for what is no text.
        """
        check_text(text)
        with _reading():
            ids = self._ids(text, add_special_tokens)
        begun = len(self.opening) if add_special_tokens else 0
        return ids[begun:] if begun and tuple(ids[begun : 2 * begun]) == self.opening else ids

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # Unlike `encode`, this releases the interpreter's lock.
        return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def knows(self, token_id: int) -> bool:
        """True for the id of a token; a model may have more outputs than there are tokens."""
        return self.backend.id_to_token(token_id) is not None

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        special_tokens_in_content: bool = False,
    ) -> list[int]:
        """Tokens of a conversation in the model's own template; messages carry ``role`` and ``content``.

        Raises what `write` raises.
        """
        return self.read(self.write(messages, add_generation_prompt, special_tokens_in_content))

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        special_tokens_in_content: bool = False,
    ) -> Written:
        """A conversation in the model's template, for `read`.

        Control tokens that messages spell are plain text, so that none forges a turn, unless
        `special_tokens_in_content`. Raises `InvalidRequest` where the model has no template or the template rejects the
        messages, and for roles and names with characters that none has.
        """
        if self._quoting is None or special_tokens_in_content:
            return Written(self.render(messages, add_generation_prompt), {})
        with _reading():
            quoted, stand_ins = self._quoting.quote(messages)
        return Written(self.render(quoted, add_generation_prompt), stand_ins)

    def read(self, written: Written) -> list[int]:
        """Tokens of a conversation."""
        if not written.quoted or self._quoting is None:
            return self.encode(written.text, add_special_tokens=False)
        check_text(written.text)
        with _reading():
            return self._quoting.tokens(written)

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

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any) -> str:
        """Text of a conversation in the model's template; `options` are those of transformers.

        Control tokens that messages spell are among it, as if the template had written them.
        """
        if not self._hf.chat_template:
            raise InvalidRequest("chat", "the model has no chat template")
        try:
            return self._hf.apply_chat_template(  # type: ignore[no-any-return]
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
        except (TemplateError, *WRONG_MESSAGES) as error:
            raise InvalidRequest(
                "chat", f"the model's template rejects the messages: {str(error)[:LONGEST]}"
            ) from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Incremental detokenizer: turns a stream of tokens into text that is final as soon as it is returned.

    All that `push` and `flush` return joins to the decoded text of all tokens, but for a space where bytes that are not
    valid text were skipped. `prompt` precedes the stream, so that a first word keeps its leading space. A token costs
    the same whatever came before it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decode = partial(tokenizer.backend.decode, skip_special_tokens=skip_special_tokens)
        self._context = self._whole_characters(prompt[-TAIL:])
        self._pending: list[int] = []
        self._returned = self._decode(self._context)
        """What was returned of the text of context and pending tokens."""

    def push(self, token_id: int) -> str:
        """Text that becomes final with this token; empty while a character is incomplete."""
        if token_id in self._hidden:
            return ""
        text = self._decode([*self._context, *self._pending, token_id])
        if not text.startswith(self._returned):  # the token has changed the meaning of bytes before it
            rest = self.flush()
            self._context, self._returned = [], ""
            return rest + self.push(token_id)
        fresh = text[len(self._returned) :]
        if not fresh or fresh[-1] == UNKNOWN:
            return self._wait(token_id, fresh)
        self._context, self._pending = [*self._pending, token_id], []
        self._returned = self._decode(self._context)
        return fresh

    def flush(self) -> str:
        """Text of tokens that are held back for the rest of a character, which does not follow."""
        text = self._decode([*self._context, *self._pending])
        rest = text[len(self._returned) :]
        self._context, self._pending = self._pending or self._context, []
        self._returned = self._decode(self._context)
        return rest

    def hides(self, token_id: int) -> bool:
        """True for a special token that is left out of the text."""
        return token_id in self._hidden

    def spelled(self, token_id: int) -> str:
        """Text of one token alone, of a special one too."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _wait(self, token_id: int, fresh: str) -> str:
        """Text that is final although the last character may not be complete: some once many tokens are pending.

        Of those the first and the last are kept: the first keep a run of invalid bytes invalid, the last hold the
        character that may follow.
        """
        if not self._tokenizer.knows(token_id):
            return ""
        self._pending.append(token_id)
        if len(self._pending) < WINDOW:
            return ""
        self._context, self._pending = [], [*self._pending[:HEAD], *self._pending[-TAIL:]]
        self._returned = self._decode(self._pending)
        if not self._returned.endswith(fresh[-BYTES:]):
            return fresh
        open_end = fresh[-BYTES:][1:]
        self._returned = self._returned.removesuffix(open_end)
        return fresh.removesuffix(open_end)

    def _whole_characters(self, prompt: Sequence[int]) -> list[int]:
        """`prompt` without an incomplete last character: a stream seeded with one repeats the prompt's text."""
        ids = list(prompt)
        while ids and self._decode(ids).endswith(UNKNOWN):
            ids.pop()
        return ids
