"""Tokens of a request's prompt."""

from __future__ import annotations

from keysift.engine.errors import InvalidRequest
from keysift.engine.model.tokenizer import Tokenizer

from . import inference_pb2 as pb

SHRINKAGE = 4
"""Most characters that a tokenizer's normalisation makes into one; composing accents makes three into one."""


def to_tokens(message: pb.GenerateRequest, tokenizer: Tokenizer, max_model_len: int) -> tuple[int, ...]:
    """Tokens of the prompt, truncated as requested.

    Raises `InvalidRequest`, for a text that cannot fit before the seconds that its tokenisation takes.
    """
    prompt = message.WhichOneof("prompt")
    if prompt is None:
        raise InvalidRequest("prompt", "one of text, token_ids and chat, got none")
    if prompt == "token_ids":
        return _last_tokens(message, max_model_len)
    num_tokens = _max_tokens(message, max_model_len)
    limit = num_tokens * tokenizer.longest_token * SHRINKAGE
    whole = num_tokens == max_model_len
    if whole:
        _check_length(_characters(message), limit, max_model_len)
    if prompt == "text":
        return _truncate(tuple(tokenizer.encode(message.text[-limit:])), message)
    special = message.chat.special_tokens_in_content
    written = tokenizer.write(_last_turns(message.chat, limit), special_tokens_in_content=special)
    if whole:
        _check_length(len(written.text), limit, max_model_len)
    return _truncate(tuple(tokenizer.read(written.last(limit))), message)


def _last_tokens(message: pb.GenerateRequest, max_model_len: int) -> tuple[int, ...]:
    """Tokens of a prompt of tokens, of which there may be millions more than the model takes."""
    ids, most = message.token_ids.ids, _max_tokens(message, max_model_len)
    if len(ids) > most and not message.HasField("truncate_prompt_tokens"):
        raise InvalidRequest(
            "prompt", f"1 to {max_model_len - 1} tokens (max_model_len is {max_model_len}), got {len(ids)}"
        )
    return _truncate(tuple(ids[-most:]), message)


def _max_tokens(message: pb.GenerateRequest, max_model_len: int) -> int:
    """Most tokens that the prompt can have after truncation."""
    if not message.HasField("truncate_prompt_tokens"):
        return max_model_len
    return min(max(message.truncate_prompt_tokens, 1), max_model_len)


def _last_turns(chat: pb.Chat, limit: int) -> list[dict[str, str]]:
    """All turns of a conversation, with the last `limit` characters of their contents."""
    turns = []
    for turn in reversed(chat.messages):
        content = turn.content[max(0, len(turn.content) - limit) :]
        limit -= len(content)
        turns.append({"role": turn.role, "content": content})
    return turns[::-1]


def _characters(message: pb.GenerateRequest) -> int:
    return len(message.text) + sum(len(turn.role) + len(turn.content) for turn in message.chat.messages)


def _check_length(characters: int, limit: int, max_model_len: int) -> None:
    if characters > limit:
        raise InvalidRequest(
            "prompt",
            f"1 to {max_model_len - 1} tokens (max_model_len is {max_model_len}), got {characters} characters, "
            f"which are more tokens than that",
        )


def _truncate(prompt: tuple[int, ...], message: pb.GenerateRequest) -> tuple[int, ...]:
    """Last `truncate_prompt_tokens` tokens: the question is at the end of a long document."""
    if not message.HasField("truncate_prompt_tokens"):
        return prompt
    if message.truncate_prompt_tokens < 1:
        raise InvalidRequest("truncate_prompt_tokens", "at least 1, got 0")
    return prompt[-message.truncate_prompt_tokens :]
