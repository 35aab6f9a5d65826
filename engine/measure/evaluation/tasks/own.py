"""The user's tasks: a file of JSON lines, each a prompt or a conversation with its answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ....errors import InvalidRequest
from ..sample import Match, Sample
from .pieces import Pieces

if TYPE_CHECKING:
    from ....model.tokenizer import Tokenizer

ROOM = 64
"""Default room for an answer in tokens, unless its answers are longer."""
Text = Annotated[str, StringConstraints(min_length=1)]
Answer = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def _listed(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError(f"text or a list of texts is needed, got {_short(value)}")
    return [value] if isinstance(value, str) else value


class Message(BaseModel):
    """One turn of a conversation; fields such as `name` are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Text
    content: str


class Line(BaseModel):
    """Fields of one line."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    answer: Annotated[list[Answer], BeforeValidator(_listed), Field(min_length=1)]
    """Text, or a list of texts."""
    match: Match = "all"
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    id: int | str | None = None

    @model_validator(mode="after")
    def _one_question(self) -> Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt, messages: one of the two is needed, and not both")
        return self


def load_jsonl(path: Path, tokenizer: Tokenizer, chat: bool, limit: int) -> list[Sample]:
    """The samples of a file of JSON lines; the task has the file's name without its suffix.

    `chat` puts plain prompts into the model's template if it has one; conversations always use it. `limit` is the
    model's length in tokens. Raises `InvalidRequest` with file, line and field of the first error.
    """
    samples: list[Sample] = []
    seen: set[int | str] = set()
    for number, text in _lines(path):
        where = f"{path}: line {number}"
        line = _parsed(where, text)
        if line.id is not None and line.id in seen:
            raise InvalidRequest("tasks", f"{where}: id: {line.id!r} was there before")
        seen |= set() if line.id is None else {line.id}
        samples.append(_sample(where, path.stem, len(samples), line, tokenizer, chat, limit))
    if not samples:
        raise InvalidRequest("tasks", f"{path}: holds no questions")
    return samples


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidRequest("tasks", f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            problem = f"byte {error.start + 1} is {line[error.start]:#04x}, which is not UTF-8"
            raise InvalidRequest("tasks", f"{path}: line {number}: {problem}") from error
        if text:
            yield number, text


def _parsed(where: str, text: str) -> Line:
    try:
        return Line.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] in ("missing", "value_error") else f", got {_short(first['input'])}"
        raise InvalidRequest("tasks", f"{where}: {f'{field}: ' if field else ''}{problem}{found}") from None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _sample(where: str, task: str, index: int, line: Line, tokenizer: Tokenizer, chat: bool, limit: int) -> Sample:
    prompt, gold = _tokens(where, line, tokenizer, chat)
    room = line.max_new_tokens or max(ROOM, len(gold))
    needed = max(room, len(gold))
    if len(prompt) + needed > limit:
        raise InvalidRequest(
            "tasks",
            f"{where}: {len(prompt)} tokens of prompt and {needed} for the answer are more than the model's {limit}",
        )
    return Sample(task, len(prompt) + room, index, tuple(prompt), tuple(line.answer), tuple(gold), room, line.match)


def _tokens(where: str, line: Line, tokenizer: Tokenizer, chat: bool) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the answer after it; after plain text the answer begins a word."""
    pieces, answer = Pieces(tokenizer), ", ".join(line.answer) if line.match == "all" else line.answer[0]
    messages = [message.model_dump() for message in line.messages or ()]
    if line.prompt is not None and chat and tokenizer.around() is not None:
        messages = [{"role": "user", "content": line.prompt}]
    if not messages:
        assert line.prompt is not None
        space = "" if line.prompt[-1].isspace() else " "
        return tokenizer.encode(line.prompt), pieces(space + answer, line.prompt[-1])
    try:
        return tokenizer.chat(messages), pieces(answer)
    except InvalidRequest as error:
        raise InvalidRequest("tasks", f"{where}: messages: {error.problem}") from error
