"""What an evaluation has found so far, on disk line by line, so that a run that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest

NAME = "journal.jsonl"
Key = tuple[str | int, ...]
"""What a line is about, such as ``("samples", 1024, 0, "dense")``."""


@dataclass(slots=True)
class Journal:
    """Lines of one run, each a finding that is whole or not there."""

    path: Path
    found: dict[Key, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], *, restart: bool) -> Journal:
        """The folder's journal, made if there is none.

        Raises `InvalidRequest` naming what differs where it is that of another run, or where it cannot be written.
        """
        journal = cls(folder / NAME)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [] if restart else list(journal._lines())
            if lines:
                _compare(lines[0].get("run", {}), identity, folder)
                journal.found = {tuple(line["key"]): line["value"] for line in lines[1:]}
            journal._rewrite(identity)
        except OSError as error:
            raise InvalidRequest(
                "output_dir", f"a folder that can be written to, got {str(folder)!r} ({error})"
            ) from None
        return journal

    def add(self, key: Key, value: Any) -> None:
        self.found[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(key, value))

    def _lines(self) -> Iterator[dict[str, Any]]:
        """All but what a kill has left half written."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return

    def _rewrite(self, identity: dict[str, Any]) -> None:
        """Without the half line; through a second file, so that a kill here loses nothing either."""
        lines = [json.dumps({"run": identity}) + "\n", *(_line(*item) for item in self.found.items())]
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.replace(self.path)


def _line(key: Key, value: Any) -> str:
    return json.dumps({"key": key, "value": value}) + "\n"


def _compare(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differing:
        told = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in differing)
        raise InvalidRequest(
            "output_dir", f"{folder} holds another run ({told}); name another folder, or --restart begins anew"
        )
