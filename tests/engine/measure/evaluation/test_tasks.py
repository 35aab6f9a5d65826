"""Samples of the built-in tasks, solved again from their prompts' text by rules of their own."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.evaluation.sample import Sample
from keysift.engine.measure.evaluation.tasks import TASKS, find, make
from keysift.engine.model.tokenizer import Tokenizer
from tests.models import CHAT_TEMPLATE, make_tokenizer

LENGTHS = (512, 777, 1003, 1024, 2048, 4095, 4096)
BYTES = 9000
"""A length that every task fits in with a token for every byte."""
RULER = {"cwe": 120, "fwe": 50, "vt": 30}
ROOM = {"copy": 48, "kv_retrieval": 64, "niah_eight": 16, "passkey": 32}
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for ([\w-]+) is: ([\w-]+)\.")
every_task = pytest.mark.parametrize("task", list(TASKS))
few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def text_of(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(sample.prompt)


def body(text: str) -> str:
    """The last question's context: what comes before it in a prompt, and behind a solved example."""
    return text[: text.rindex("Question:")] if "Question:" in text else text


# What a reader of the prompt would answer, task by task.


def solve_needles(text: str) -> set[str]:
    (asked,) = re.findall(r"What (?:is|are all) the special magic \w+ for ([\w, -]+?)(?: mentioned in .*| *)\?", text)
    keys = set(re.split(r", and |, ", asked))
    return {value for _, key, value in NEEDLE.findall(text) if key in keys}


def solve_tracking(text: str) -> set[str]:
    context = body(text)
    context = context[context.rindex("Memorize and track") :]
    (value,) = re.findall(r"assigned the value (\d{5}) in the text above\.", text[len(body(text)) :])
    known: dict[str, str] = {}
    for name, source in re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+)$", context, re.M):
        assert source.isdigit() or source in known, f"{name} is assigned {source} before that has a value"
        known[name] = source if source.isdigit() else known[source]
    return {name for name, held in known.items() if held == value}


def solve_list(text: str) -> set[str]:
    context = body(text)
    context = context[context.rindex("Memorize the ones that appear most often.") :]
    entries = re.findall(r"(\d+)\. ([a-z]+)", context)
    assert [int(place) for place, _ in entries] == list(range(1, len(entries) + 1))
    ranked = Counter(word for _, word in entries).most_common()
    assert ranked[9][1] >= 2 * ranked[10][1], "a common word is hardly more common than the others"
    return {word for word, _ in ranked[:10]}


def solve_coded(text: str) -> set[str]:
    context = body(text)
    coded = context[context.rindex("coded words.") + len("coded words.") :].split()
    ranked = Counter(word for word in coded if word.strip(".")).most_common()
    assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked)
    assert coded.count("...") > ranked[0][1]
    assert ranked[2][1] > ranked[3][1]
    return {word for word, _ in ranked[:3]}


def solve_pairs(text: str) -> set[str]:
    data = json.loads(text[text.index("{") : text.index("}") + 1])
    assert len(data) == text.count('": "')
    (key,) = re.findall(r'^Key: "([\w-]+)"', text, re.M)
    return {data[key]}


def solve_passkey(text: str) -> set[str]:
    (key,) = re.findall(r"The pass key is (\d{5})\. Remember it\.", text)
    assert text.count(key) == 2
    return {key}


def solve_copy(text: str) -> set[str]:
    (passage,) = re.findall(r"\n<passage>(.{20,})</passage>\n", text)
    return {passage}


SOLVERS: dict[str, Callable[[str], set[str]]] = {
    "copy": solve_copy,
    "cwe": solve_list,
    "fwe": solve_coded,
    "kv_retrieval": solve_pairs,
    "passkey": solve_passkey,
    "vt": solve_tracking,
}


def check(sample: Sample, tokenizer: Tokenizer) -> None:
    """Its length, and that its answers are those of an independent reader."""
    assert len(sample.prompt) + sample.max_new_tokens == sample.length
    text = text_of(sample, tokenizer)
    solved = SOLVERS.get(sample.task, solve_needles)(text)
    if sample.task == "copy":
        assert " ".join(sample.answers) == solved.pop()
    else:
        assert solved == set(sample.answers)
        assert len(solved) == len(sample.answers)
    assert sample.gold
    assert len(sample.gold) <= sample.max_new_tokens
    assert sample.score(tokenizer.decode(sample.gold)) == 1
    assert all(answer in text for answer in sample.answers)


@every_task
@pytest.mark.parametrize("chat", [False, True])
def test_every_length_is_met_to_the_token(task: str, chat: bool, real: Tokenizer) -> None:
    for length in LENGTHS:
        check(make(task, real, length, chat=chat), real)


@every_task
@few
@given(st.integers(512, 3000), st.integers(0, 99), st.integers(0, 2**64), st.booleans())
def test_any_seed_makes_a_question_with_an_answer(
    task: str, real: Tokenizer, length: int, index: int, seed: int, chat: bool
) -> None:
    check(make(task, real, length, index, seed, chat), real)


@every_task
@pytest.mark.parametrize("length", [BYTES, BYTES + 1])
def test_a_tokenizer_of_bytes(task: str, length: int, bytewise: Tokenizer) -> None:
    for chat in (False, True):
        sample = make(task, bytewise, length, chat=chat)
        assert len(sample.prompt) + sample.max_new_tokens == length
        text = text_of(sample, bytewise)
        assert all(answer in text for answer in sample.answers)
        solved = SOLVERS.get(task, solve_needles)(text)
        assert task == "copy" or solved == set(sample.answers)


@every_task
def test_a_tokenizer_that_puts_a_space_before_a_text(task: str, underscored: Tokenizer) -> None:
    """Pieces must not bring a space each: the text of the joined tokens is the text that was meant."""
    sample = make(task, underscored, BYTES)
    assert sample.prompt.count(0) == 1
    assert sample.prompt[0] == 0
    text = text_of(sample, underscored)
    assert not re.search(r"  |\n (?:The grass|One of|VAR|<passage>)", text)
    solved = SOLVERS.get(task, solve_needles)(text)
    assert task == "copy" or solved == set(sample.answers)


@every_task
def test_the_same_arguments_make_the_same_sample_and_others_do_not(task: str, real: Tokenizer) -> None:
    first = make(task, real, 1003, 3, 5)
    make(task, real, 1003, 4, 5)
    assert make(task, real, 1003, 3, 5) == first
    others = [make(task, real, 1003, 4, 5), make(task, real, 1003, 3, 6), make(task, real, 1004, 3, 5)]
    assert len({first.answers, *(other.answers for other in others)}) == 4


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("passkey", "9245b8fdefeabe7b"),
        ("vt", "73cd2a753cb8cc0d"),
        ("kv_retrieval", "5d993170ca1043c9"),
        ("niah_multikey_3", "221c42010263db37"),
    ],
)
def test_samples_are_the_same_everywhere(task: str, digest: str, bytewise: Tokenizer) -> None:
    """Where no text of the running Python is in them. Results from before a change of a digest compare with none."""
    text = text_of(make(task, bytewise, 4096), bytewise)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


@every_task
def test_the_question_comes_last_and_the_answer_is_begun(task: str, real: Tokenizer) -> None:
    raw, chat = (text_of(make(task, real, 1024, chat=chat), real) for chat in (False, True))
    assert re.search(r"( is| are|: ?|<passage>)$", raw)
    assert raw == raw.rstrip()
    begun = chat[chat.rindex("<|im_start|>assistant\n") :] if "<|im_start|>" in chat else chat.rsplit("assistant\n")[-1]
    assert raw.endswith(begun.removeprefix("<|im_start|>assistant\n"))
    assert begun[:1].strip()


def test_the_template_stands_around_the_prompt(bytewise: Tokenizer, plain: Tokenizer) -> None:
    chat = bytewise.decode(make("passkey", bytewise, 2000).prompt, skip_special_tokens=False)
    assert chat.startswith("<|start|>user\nThere is an important info")
    assert chat.endswith("What is the pass key?<|end|>\n<|start|>assistant\nThe pass key is")
    assert make("passkey", plain, 2000) == make("passkey", bytewise, 2000, chat=False)


def test_a_template_that_ends_with_a_bracket_is_answered_with_a_space() -> None:
    instructed = Tokenizer(make_tokenizer("[INST] {{ messages[0]['content'] }}[/INST]"))
    text = instructed.decode(make("passkey", instructed, 2000).prompt)
    assert text.startswith("[INST] There is")
    assert text.endswith("?[/INST] The pass key is")


def test_a_template_must_show_the_message_once() -> None:
    twice = CHAT_TEMPLATE.replace("message['content'] +", "message['content'] + message['content'] +")
    with pytest.raises(InvalidRequest, match=r"chat: .* 2 times"):
        make("passkey", Tokenizer(make_tokenizer(twice)), 2000)


@pytest.mark.parametrize(
    ("task", "needles"),
    [
        ("niah_single_1", 1),
        ("niah_single_2", 1),
        ("niah_multikey_1", 4),
        ("niah_multivalue", 4),
        ("niah_multiquery", 4),
        ("niah_eight", 8),
    ],
)
def test_as_many_needles_as_said(task: str, needles: int, real: Tokenizer) -> None:
    for index in range(20):
        sample = make(task, real, 1024, index)
        found = NEEDLE.findall(text_of(sample, real))
        assert len(found) == needles
        assert len({value for _, _, value in found}) == needles
        assert len({key for _, key, _ in found}) == {"niah_multivalue": 1}.get(task, needles)
        digits = 6 if task == "niah_eight" else 7
        assert all(len(value) == digits for _, _, value in found)


@pytest.mark.parametrize(("task", "kind"), [("niah_multikey_2", "numbers"), ("niah_multikey_3", "uuids")])
def test_a_haystack_of_needles(task: str, kind: str, real: Tokenizer) -> None:
    text = text_of(make(task, real, 4096), real)
    found = NEEDLE.findall(text)
    assert {name for name, _, _ in found} == {kind}
    assert len(found) == len({key for _, key, _ in found}) == len({value for _, _, value in found})
    lines = text[text.index("afterwards.\n") : text.index("\nWhat is")].splitlines()[2:]
    assert len(found) in (len(lines), len(lines) + 1)


def test_haystacks(real: Tokenizer) -> None:
    noise = text_of(make("niah_single_1", real, 2048), real)
    assert (
        noise.count("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n") > 70
    )
    prose = text_of(make("niah_single_2", real, 2048), real)
    assert "The grass is green" not in prose
    assert prose.count('"') > 10
    other = text_of(make("niah_single_2", real, 2048, 1), real)
    assert prose[1500:1600] not in other


def test_needles_lie_at_every_depth(real: Tokenizer) -> None:
    depths = []
    for index in range(60):
        text = text_of(make("niah_single_1", real, 1024, index), real)
        (found,) = NEEDLE.finditer(text)
        depths.append(found.start() / len(text))
    quarters = Counter(int(4 * depth) for depth in depths)
    assert all(quarters[quarter] >= 5 for quarter in range(4))
    assert min(depths) < 0.15
    assert max(depths) > 0.8


def test_where_nothing_is_cut_tokens_are_those_of_the_whole_text(real: Tokenizer) -> None:
    """The pieces of a prompt fit together as if the tokenizer had seen it whole."""
    for task in ("niah_single_1", "niah_single_2", "niah_eight", "vt", "fwe", "passkey", "copy", "niah_multikey_3"):
        sample = make(task, real, 2048, chat=False)
        assert tuple(real.encode(real.decode(sample.prompt))) == sample.prompt


def test_common_words_come_as_often_as_in_ruler(real: Tokenizer) -> None:
    for length, often, seldom, example in ((4096, 30, 3, 190), (2048, 6, 1, 40), (512, 3, 1, 0)):
        sample = make("cwe", real, length)
        *shown, context, _ = text_of(sample, real).split("Question:")
        entries = re.findall(r"\d+\. ([a-z]+)", context[context.rindex("appear most often.") :])
        counts = Counter(entries)
        assert {counts[word] for word in sample.answers} == {often}
        assert Counter(counts.values()).most_common(1)[0][0] == seldom
        assert sum(len(re.findall(r"\d+\. [a-z]+", part)) for part in shown) == example


def test_the_list_goes_on_where_words_run_out(real: Tokenizer) -> None:
    """Then all of them come more often: at this length every word of the documentation is in it three times."""
    sample = make("cwe", real, 80_000)
    assert len(sample.prompt) + 120 == 80_000
    assert solve_list(text_of(sample, real)) == set(sample.answers)


def test_frequent_words_follow_zipf(real: Tokenizer) -> None:
    sample = make("fwe", real, 4096)
    counts = Counter(text_of(sample, real).split())
    first, second, third = (counts[word] for word in sample.answers)
    assert first / second == pytest.approx(9 / 4, rel=0.05)
    assert second / third == pytest.approx(16 / 9, rel=0.05)


def test_the_example_of_variable_tracking_is_another_chain(real: Tokenizer) -> None:
    sample = make("vt", real, 4096)
    text = text_of(sample, real)
    example, task = text[: text.rindex("Memorize")], text[text.rindex("Memorize") :]
    assert example.count("VAR ") == task.count("VAR ") == 9
    assert len(re.findall(r"they are:(?: [A-Z]{3}){5}\n", example)) == 1
    assert not any(answer in example for answer in sample.answers)


@every_task
def test_answers_get_the_room_that_ruler_gives(task: str) -> None:
    assert TASKS[task].max_new_tokens == (RULER | ROOM).get(task, 128)
    assert TASKS[task].name == task


@every_task
@pytest.mark.parametrize("length", [-1, 0, 1, 130, 200])
def test_too_short_a_length_names_the_least(task: str, length: int, bytewise: Tokenizer) -> None:
    with pytest.raises(
        InvalidRequest, match=rf"^lengths: {task} takes \d+ tokens or more here, got {length}$"
    ) as caught:
        make(task, bytewise, length, 2, 3)
    (least,) = re.findall(r"takes (\d+)", str(caught.value))
    assert make(task, bytewise, int(least), 2, 3).length == int(least)
    with pytest.raises(InvalidRequest):
        make(task, bytewise, int(least) - 32, 2, 3)


def test_the_registry() -> None:
    assert list(TASKS) == sorted(TASKS)
    assert len(TASKS) == 14
    assert [task.name for task in find(["vt", "copy", "vt"])] == ["vt", "copy"]
    with pytest.raises(InvalidRequest, match=r"^tasks: vtt, x: unknown; there are copy, cwe, .*vt$"):
        find(["vt", "vtt", "x"])
    with pytest.raises(InvalidRequest, match="tasks: ruler"):
        make("ruler", Tokenizer(make_tokenizer()), 512)


@pytest.mark.parametrize(
    ("match", "said", "score"),
    [
        ("all", "They are 1234567 and 7654321.", 1.0),
        ("all", "They are 1234567 and 7654320.", 0.5),
        ("all", "none", 0.0),
        ("all", "", 0.0),
        ("any", "it is 7654321", 1.0),
        ("any", "it is 765432", 0.0),
    ],
)
def test_scores_are_ruler_s(match: str, said: str, score: float) -> None:
    """Its string_match_all is the share of the answers in the text, its string_match_part the best of them."""
    sample = Sample("t", 9, 0, (1,), ("1234567", "7654321"), (1,), 8, "any" if match == "any" else "all")
    assert sample.score(said) == score


def test_scores_ignore_case() -> None:
    assert Sample("t", 9, 0, (1,), ("AbC",), (1,), 8).score("xaBcx") == 1
