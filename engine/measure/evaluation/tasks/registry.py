"""Registry of the built-in tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ....errors import InvalidRequest
from .counting import common_words, frequent_words
from .needles import Needles, copy, eight, passkey
from .pairs import pairs
from .pieces import Build
from .tracking import tracking


@dataclass(frozen=True, slots=True)
class Task:
    """A task that generates samples of any length."""

    name: str
    summary: str
    max_new_tokens: int
    """Room for the answer, part of a sample's length."""
    build: Build


_ALL = (
    Task("copy", "repeat a marked passage of prose", 48, copy),
    Task("cwe", "the ten common words of a numbered list", 120, common_words),
    Task("fwe", "the three frequent words of a coded text", 50, frequent_words),
    Task("kv_retrieval", "one value of a JSON object of random names", 64, pairs),
    Task("niah_eight", "one of eight numbers of six digits in prose", 16, eight),
    Task("niah_multikey_1", "one of four numbers in prose", 128, Needles("prose", keys=4).build),
    Task("niah_multikey_2", "one number among nothing but needles", 128, Needles("needles").build),
    Task(
        "niah_multikey_3",
        "one random name among nothing but needles",
        128,
        Needles("needles", key="uuids", value="uuids").build,
    ),
    Task("niah_multiquery", "all of four numbers in prose", 128, Needles("prose", keys=4, queries=4).build),
    Task("niah_multivalue", "the four numbers of one key in prose", 128, Needles("prose", values=4).build),
    Task("niah_single_1", "one number in noise", 128, Needles("noise").build),
    Task("niah_single_2", "one number in prose", 128, Needles("prose").build),
    Task("passkey", "one number, stated twice, in noise", 32, passkey),
    Task("vt", "the variables along a chain of assignments in noise", 30, tracking),
)
TASKS = {task.name: task for task in sorted(_ALL, key=lambda task: task.name)}


def find(names: Iterable[str]) -> list[Task]:
    """The tasks of these names, in their order. Raises `InvalidRequest` for an unknown one."""
    chosen = list(dict.fromkeys(names))
    if unknown := [name for name in chosen if name not in TASKS]:
        raise InvalidRequest("tasks", f"{', '.join(unknown)}: unknown; there are {', '.join(TASKS)}")
    return [TASKS[name] for name in chosen]
