"""MkDocs hooks: put generated tables into pages, and take along the files that pages link to outside docs/."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from generate import GENERATORS, ROOT

sys.path.pop(0)

MARK = re.compile(r"^<!-- generated: (\w+)(?: (\w+))? -->$", re.MULTILINE)
"""Stands in a page for a table of `generate.py`."""
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
"""A link from a page of docs/ to a file of the repository."""
INSIDE = re.compile(r"\]\((?!https?://|#|\.\./)([^)#\s]+)")
FOLDER = "files"
"""Holds those files in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Adds every file outside docs/ that a page links to, and what such a page links to itself."""
    linked = {name for page in files.documentation_pages() for name in OUTSIDE.findall(page.content_string)}
    for name in sorted(linked):
        linked |= {str(Path(name).parent / each) for each in _links(ROOT / name)}
    for name in sorted(linked):
        files.append(File.generated(config, f"{FOLDER}/{name}", abs_src_path=str(ROOT / name)))
    return files


def _links(path: Path) -> list[str]:
    return INSIDE.findall(path.read_text(encoding="utf-8")) if path.suffix == ".md" else []


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its tables, and with links to where `on_files` put the files."""
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return markdown
    markdown = MARK.sub(lambda found: GENERATORS[found[1]](*filter(None, [found[2]])), markdown)
    return OUTSIDE.sub(rf"]({FOLDER}/\1", markdown)
