"""One HTML file that opens anywhere: style, script and charts are inside, and it asks the network nothing."""

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
        """Write the page to `path`, whole or not at all."""
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
    """jinja2 with everything escaped but what `safe` names: the style, the script and the charts made here."""
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
    """A name that may go on in the next line after a sign, not within a word."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([+,(])", r"\1<wbr>", str(escape(visible(name)))))


def visible(value: object) -> object:
    """Text without the control characters that HTML forbids."""
    return CONTROLS.sub("�", value) if type(value) is str else value


def part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def fingerprint(script: str) -> str:
    """What the page's policy knows its one script by: any other script, however it got in, does not run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def replace(path: Path, html: str) -> None:
    """Put the text in the place of `path` in one move: a reader never meets half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(html, encoding="utf-8", errors="replace")
    draft.replace(path)
