"""Questions from a file: what a line may hold, and where and what is wrong with one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.evaluation.tasks import load_jsonl
from keysift.engine.model.tokenizer import Tokenizer

GOOD = {"prompt": "What is 2 + 2?", "answer": "4"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sums.jsonl"


def write(file: Path, *lines: Any) -> Path:
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_a_plain_prompt(file: Path, plain: Tokenizer) -> None:
    (sample,) = load_jsonl(write(file, GOOD), plain, True, 4096)
    assert plain.decode(sample.prompt) == GOOD["prompt"]
    assert plain.decode(sample.gold) == " 4"
    assert (sample.task, sample.index, sample.answers, sample.match) == ("sums", 0, ("4",), "all")
    assert sample.length == len(sample.prompt) + sample.max_new_tokens
    assert sample.max_new_tokens == 64


def test_a_prompt_that_ends_with_a_space(file: Path, plain: Tokenizer) -> None:
    (sample,) = load_jsonl(write(file, GOOD | {"prompt": "2 + 2 = "}), plain, True, 4096)
    assert plain.decode(sample.prompt + sample.gold) == "2 + 2 = 4"


def test_the_template_is_put_around(file: Path, bytewise: Tokenizer) -> None:
    messages = [{"role": "user", "content": GOOD["prompt"]}]
    write(file, GOOD, {"messages": messages, "answer": "4"})
    wrapped, told = load_jsonl(file, bytewise, True, 4096)
    assert wrapped.prompt == told.prompt == tuple(bytewise.chat(messages))
    assert bytewise.decode(wrapped.gold) == "4"
    raw, told = load_jsonl(file, bytewise, False, 4096)
    assert raw.prompt == tuple(bytewise.encode(GOOD["prompt"]))
    assert told.prompt == wrapped.prompt
    assert [sample.index for sample in (raw, told)] == [0, 1]


def test_conversations_keep_their_turns(file: Path, bytewise: Tokenizer) -> None:
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?")]
    messages = [{"role": role, "content": content, "name": "x"} for role, content in turns]
    (sample,) = load_jsonl(write(file, {"messages": messages, "answer": "4"}), bytewise, False, 4096)
    expected = "".join(f"<|start|>{role}\n{content}<|end|>\n" for role, content in turns) + "<|start|>assistant\n"
    assert bytewise.decode(sample.prompt, False) == expected


def test_several_answers(file: Path, plain: Tokenizer) -> None:
    line = {"prompt": "q", "answer": [" four ", "4"], "max_new_tokens": 5, "id": "a"}
    both, one = load_jsonl(write(file, line, line | {"match": "any", "id": 7}), plain, True, 4096)
    assert both.answers == one.answers == ("four", "4")
    assert (plain.decode(both.gold), plain.decode(one.gold)) == (" four, 4", " four")
    assert (both.score("4"), one.score("4")) == (0.5, 1)
    assert (both.max_new_tokens, both.length) == (5, 6)


def test_room_for_a_long_answer(file: Path, plain: Tokenizer) -> None:
    (sample,) = load_jsonl(write(file, GOOD | {"answer": "a" * 200}), plain, True, 4096)
    assert sample.max_new_tokens == len(sample.gold) == 201


def test_blank_lines_and_other_systems_files(file: Path, plain: Tokenizer) -> None:
    second = json.dumps(GOOD | {"prompt": "höchste Zahl\u2028?"}, ensure_ascii=False)
    file.write_bytes(f"\ufeff{json.dumps(GOOD)}\r\n\r\n  \r\n{second}\r\n".encode())
    samples = load_jsonl(file, plain, True, 4096)
    assert [plain.decode(sample.prompt) for sample in samples] == [GOOD["prompt"], "höchste Zahl\u2028?"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x", ', ["Invalid JSON", 'got \'{"prompt": "x",']),
        ("[1]", ["object", "got [1]"]),
        ({"answer": "x"}, ["prompt, messages: one of the two is needed"]),
        (GOOD | {"messages": [{"role": "user", "content": "x"}]}, ["prompt, messages:", "not both"]),
        ({"prompt": "x"}, ["answer: Field required"]),
        (GOOD | {"answer": ""}, ["answer.0:", "at least 1 character", "got ''"]),
        (GOOD | {"answer": "  "}, ["answer.0:", "at least 1 character", "got '  '"]),
        (GOOD | {"answer": []}, ["answer:", "at least 1 item", "got []"]),
        (GOOD | {"answer": ["x", ""]}, ["answer.1:", "at least 1 character"]),
        (GOOD | {"answer": 4}, ["answer: text or a list of texts", "got 4"]),
        (GOOD | {"prompt": ""}, ["prompt:", "at least 1 character"]),
        (GOOD | {"prompt": 4}, ["prompt:", "string", "got 4"]),
        (GOOD | {"match": "some"}, ["match:", "'all' or 'any'", "got 'some'"]),
        (GOOD | {"max_new_tokens": 0}, ["max_new_tokens:", "greater than or equal to 1", "got 0"]),
        (GOOD | {"max_new_tokens": "8"}, ["max_new_tokens:", "integer", "got '8'"]),
        (GOOD | {"answers": ["4"]}, ["answers:", "not permitted"]),
        ({"messages": [], "answer": "x"}, ["messages:", "at least 1 item"]),
        ({"messages": [{"role": "user"}], "answer": "x"}, ["messages.0.content: Field required"]),
        ({"messages": [{"role": "wizard", "content": "x"}], "answer": "x"}, ["messages:", "unknown role"]),
        (GOOD | {"id": 1}, ["id: 1 was there before"]),
        (GOOD | {"prompt": "x" * 4096}, ["tokens of prompt", "64 for the answer", "more than the model's 4096"]),
        (GOOD | {"max_new_tokens": 9000}, ["9000 for the answer", "4096"]),
        (GOOD | {"prompt": ["x" * 500]}, ["prompt:", "...", "xxx"]),
    ],
)
def test_what_is_wrong_is_said(line: Any, said: list[str], file: Path, bytewise: Tokenizer) -> None:
    write(file, GOOD | {"id": 1}, "", line)
    with pytest.raises(InvalidRequest) as caught:
        load_jsonl(file, bytewise, True, 4096)
    message = str(caught.value)
    assert message.startswith(f"tasks: {file}: line 3: ")
    assert all(part in message for part in said), message
    assert len(message) < 300 + len(str(file))
    assert caught.value.field == "tasks"


def test_a_conversation_needs_a_template(file: Path, plain: Tokenizer) -> None:
    write(file, {"messages": [{"role": "user", "content": "x"}], "answer": "x"})
    with pytest.raises(InvalidRequest, match="line 1: messages: the model has no chat template"):
        load_jsonl(file, plain, True, 4096)


def test_bytes_that_are_no_text(file: Path, plain: Tokenizer) -> None:
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "answer": "x"}\n')
    with pytest.raises(InvalidRequest, match="line 2: byte 16 is 0xe9, which is not UTF-8"):
        load_jsonl(file, plain, True, 4096)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_questions(text: str, file: Path, plain: Tokenizer) -> None:
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=r"tasks: .*sums\.jsonl: holds no questions"):
        load_jsonl(file, plain, True, 4096)


def test_a_file_that_is_not_there(tmp_path: Path, plain: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        load_jsonl(tmp_path / "none.jsonl", plain, True, 4096)
    with pytest.raises(InvalidRequest, match="directory"):
        load_jsonl(tmp_path, plain, True, 4096)
