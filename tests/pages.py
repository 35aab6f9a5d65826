"""Fenced blocks, inline code and commands of the documentation pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
ENDS_OF_A_COMMAND = ("|", "||", "&&", ";", "&", ">")
PLACEHOLDER = re.compile(r"[A-Z]+|<.*>|\.\.\.")


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """Attributes and text of each fenced block in these languages."""
    for language, attributes, text in BLOCK.findall(page.read_text()):
        if language in languages:
            yield attributes, text


def inline(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in INLINE.findall(BLOCK.sub("", page.read_text()))]


def split(line: str) -> Iterator[list[str]]:
    """Commands of a shell line, without the variables set before them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in (*lexer, ";"):
        if word not in ENDS_OF_A_COMMAND:
            words.append(word)
            continue
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words:
            yield words
        words = []


def written_commands() -> list[tuple[str, list[str]]]:
    """Every command of the pages, with the name of its page."""
    found = []
    for page in PAGES:
        lines = [line for _, text in blocks(page, "sh") for line in text.replace("\\\n", " ").splitlines()]
        lines += [code for code in inline(page) if re.match(r"(keysift|make|python) ", code)]
        found += [(page.name, words) for line in lines for words in split(line)]
    return [(name, words) for name, words in found if not any(PLACEHOLDER.fullmatch(word) for word in words)]


def undocumented(names: set[str]) -> set[str]:
    """Fields that docs/results-schema.md does not name, but for what differs from a named one in the metric only."""
    documented = set(inline(ROOT / "docs" / "results-schema.md"))
    return {name for name in names if re.sub(r"_(tpot|itl|e2el)_", "_ttft_", name) not in documented} - {"schema"}
