"""MkDocs hooks: generated tables in pages, and copies of the files outside docs/ that pages link to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from generate import GENERATORS, ROOT  # MkDocs has this folder in the path while it loads a hook
from mkdocs.structure.files import File, Files

MARK = re.compile(r"^<!-- generated: (\w+)(?: (\w+))? -->$", re.MULTILINE)
"""Mark in a page for a table of `generate.py`, with its argument."""
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
"""Link from a page of docs/ to a file of the repository."""
NEIGHBOUR = re.compile(r"\]\((?!https?://|#|\.\./)([^)#\s]+)")
"""Link from such a file to another one."""
FOLDER = "files"
"""Their place in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to, with the files that such a file links to itself."""
    linked = {name for page in files.documentation_pages() for name in OUTSIDE.findall(page.content_string)}
    linked |= {str(Path(name).parent / each) for name in linked for each in _neighbours(ROOT / name)}
    for name in sorted(linked):
        files.append(File.generated(config, f"{FOLDER}/{name}", abs_src_path=str(ROOT / name)))
    return files


def _neighbours(path: Path) -> list[str]:
    return NEIGHBOUR.findall(path.read_text(encoding="utf-8")) if path.suffix == ".md" else []


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its tables, and with links to the copies of `on_files`."""
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return markdown
    markdown = MARK.sub(lambda found: GENERATORS[found[1]](*filter(None, [found[2]])), markdown)
    return OUTSIDE.sub(rf"]({FOLDER}/\1", markdown)
