"""Journal of an evaluation: findings on disk, line by line, from which an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ...checked import ready
from ...errors import InvalidRequest, KeysiftError

NAME = "journal.jsonl"
FIELDS = {"key", "value", "seconds"}
Key = tuple[str | int, ...]
"""Identity of a finding, such as ``("samples", "built-in", 1024, 0, "dense")``."""


@dataclass(slots=True)
class Journal:
    """Findings of one run; each line on disk is complete or ignored."""

    path: Path
    found: dict[Key, Any] = field(default_factory=dict)
    seconds: dict[Key, float] = field(default_factory=dict)
    """Time that each finding took."""

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], *, restart: bool) -> Journal:
        """Open or create the folder's journal.

        Raises:
            InvalidRequest: it belongs to another run, naming the differences, or cannot be written.
        """
        journal = cls(folder / NAME)
        ready(folder)
        try:
            lines = iter(()) if restart else journal._lines()
            if (first := next(lines, None)) is not None:
                _compare(first.get("run", {}), identity, folder)
                for line in (line for line in lines if line.keys() == FIELDS):
                    journal._take(tuple(line["key"]), line["value"], line["seconds"])
            journal._rewrite(identity)
        except OSError as error:
            raise InvalidRequest(
                "output_dir", f"a folder that can be written to, got {str(folder)!r} ({error})"
            ) from None
        return journal

    def add(self, key: Key, value: Any, seconds: float = 0.0) -> None:
        """Append a finding. Raises `KeysiftError` if it cannot be written."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(key, value, seconds))
        self._take(key, value, seconds)

    def _take(self, key: Key, value: Any, seconds: float) -> None:
        self.found[key], self.seconds[key] = value, seconds

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Parsed lines; {} for one that is no JSON object, such as the partial line of an interrupted write."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    found = json.loads(line)
                except ValueError:
                    found = None
                yield found if isinstance(found, dict) else {}

    def _rewrite(self, identity: dict[str, Any]) -> None:
        """Write the file anew, without incomplete lines."""
        with replacing(self.path) as file:
            file.write(json.dumps({"run": identity}) + "\n")
            file.writelines(_line(key, value, self.seconds[key]) for key, value in self.found.items())


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a second file that replaces `path` at the end, so that an interruption loses nothing.

    Writing in pieces avoids a second copy of the contents in memory.
    """
    unfinished = path.with_suffix(".new")
    with unfinished.open("w", encoding="utf-8") as file:
        yield file
    unfinished.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` while writing into the output folder, such as a full disk, into a `KeysiftError`."""
    try:
        yield
    except OSError as error:
        raise KeysiftError(f"output_dir: cannot write {path}: {error}") from None


def _line(key: Key, value: Any, seconds: float) -> str:
    return json.dumps({"key": key, "value": value, "seconds": seconds}) + "\n"


def _compare(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differing:
        listed = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in differing)
        raise InvalidRequest(
            "output_dir", f"{folder} holds another run ({listed}); name another folder, or --restart begins anew"
        )
