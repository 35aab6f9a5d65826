"""A single HTML file with style, script and charts inside, without network access."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from .blocks import Note, Section

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    subtitle: str
    sections: Sequence[Section]
    warnings: Sequence[Note] = ()

    def write(self, path: Path) -> None:
        """Replace the file at `path` by the page, as a whole."""
        replace(path, self.html())

    def html(self) -> str:
        script = part("page.js")
        template = environment().get_template("page.html")
        return template.render(
            page=self,
            sections=[section for section in self.sections if section.blocks],
            style=part("page.css"),
            script=script,
            script_hash=fingerprint(script),
        )


@functools.cache
def environment() -> Environment:
    """jinja2 environment that escapes everything not marked `safe`: style, script and charts."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(part),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=visible,
    )
    made.filters["breakable"] = breakable
    return made


def breakable(name: str) -> Markup:
    """A name with line break opportunities after signs."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([+,(])", r"\1<wbr>", str(escape(visible(name)))))


def visible(value: object) -> object:
    """Text without the control characters that HTML forbids."""
    return CONTROLS.sub("�", value) if type(value) is str else value


def part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def fingerprint(script: str) -> str:
    """Hash of the page's script for its content security policy, which blocks all other scripts."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def replace(path: Path, html: str) -> None:
    """Replace the file at `path` atomically, so that readers never see a partial page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(html, encoding="utf-8", errors="replace")
    draft.replace(path)
