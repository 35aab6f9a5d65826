"""A page as its tests read it: elements with their attributes, and the text inside them."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Document(HTMLParser):
    """`elements` in order, as (tag, attributes); texts by the tag and by the section that they stand in."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._texts: list[tuple[tuple[str, ...], str]] = []
        self._section = ""
        self._joins = False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        self._joins = tag == "wbr"
        if tag == "section":
            self._section = attributes["id"]
            self.sections[self._section] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes {self._open}"
        self._open.pop()
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        self._texts.append((tuple(self._open), data))
        if self._section and self._joins:
            self.sections[self._section][-1] += data
        elif self._section and data.strip():
            self.sections[self._section].append(data.strip())
        self._joins = False

    def inside(self, *tags: str) -> list[str]:
        """The texts that stand within all of these elements."""
        return [text for stack, text in self._texts if all(tag in stack for tag in tags)]

    def attributes(self, *names: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements for name in names if name in attributes]

    def text(self, section: str) -> str:
        """The words of a section; a name that `<wbr>` may break is one piece."""
        return " ".join(self.sections[section])
