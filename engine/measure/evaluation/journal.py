"""What an evaluation has found so far, on disk line by line, so that a run that was killed goes on."""

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
"""What a line is about, such as ``("samples", 1024, 0, "dense")``."""


@dataclass(slots=True)
class Journal:
    """Lines of one run, each a finding that is whole or not there."""

    path: Path
    found: dict[Key, Any] = field(default_factory=dict)
    seconds: dict[Key, float] = field(default_factory=dict)
    """What each of them took."""

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], *, restart: bool) -> Journal:
        """The folder's journal, made if there is none.

        Raises `InvalidRequest` naming what differs where it is that of another run, or where it cannot be written.
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
        """Raises `KeysiftError` where it cannot be written any more."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(key, value, seconds))
        self._take(key, value, seconds)

    def _take(self, key: Key, value: Any, seconds: float) -> None:
        self.found[key], self.seconds[key] = value, seconds

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Whatever is no object says nothing: the half line that a kill leaves, and a file that is not ours."""
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
        """Without the half line."""
        with replacing(self.path) as file:
            file.write(json.dumps({"run": identity}) + "\n")
            file.writelines(_line(key, value, self.seconds[key]) for key, value in self.found.items())


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Writes a second file that then takes the place of `path`: a kill loses nothing.

    It is written piece by piece, as its text would take as much memory as what it tells once more.
    """
    unfinished = path.with_suffix(".new")
    with unfinished.open("w", encoding="utf-8") as file:
        yield file
    unfinished.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing a file of the output folder: a disk that is full is told as `KeysiftError`."""
    try:
        yield
    except OSError as error:
        raise KeysiftError(f"output_dir: cannot write {path}: {error}") from None


def _line(key: Key, value: Any, seconds: float) -> str:
    return json.dumps({"key": key, "value": value, "seconds": seconds}) + "\n"


def _compare(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differing:
        told = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in differing)
        raise InvalidRequest(
            "output_dir", f"{folder} holds another run ({told}); name another folder, or --restart begins anew"
        )
