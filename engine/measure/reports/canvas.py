"""Charts as inline SVG: drawn by matplotlib in placeholder colours, which the style sheet replaces."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from .series import GRID, GROUND, INK, MARKS, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 380
"""Width of a chart in pixels, near a phone's, so that its text stays readable there."""
HEIGHT = 260
STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 11.0,
    "axes.labelsize": 11.0,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
    "text.color": MARKS[INK],
    "axes.labelcolor": MARKS[INK],
    "xtick.color": MARKS[MUTED],
    "ytick.color": MARKS[MUTED],
    "xtick.labelcolor": MARKS[INK],
    "ytick.labelcolor": MARKS[INK],
    "axes.edgecolor": MARKS[MUTED],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": MARKS[GRID],
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.0,
    "lines.markeredgewidth": 1.2,
    "patch.edgecolor": MARKS[GROUND],
}
ROLE_OF = {mark: f"var(--{role})" for role, mark in MARKS.items()}
NUMBER = re.compile(r"-?\d+\.\d{2,}")
LINK = re.compile(r"url\(#([^)]+)\)")


def draw(paint: Callable[[Axes], None], label: str, height: int = HEIGHT) -> str:
    """Axes drawn by `paint` as one `<svg>` element, `WIDTH` by `height`, labelled for screen readers.

    The user's own matplotlib settings have no say, no global figure is made, and the same data give the same text.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE], after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has more fonts
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
        paint(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", dpi=72, metadata={"Date": None})
    return inline(out.getvalue(), label)


def inline(svg: str, label: str) -> str:
    """matplotlib's SVG as an element of a page: without namespaces and style rules, with unique ids."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        bare(element)
    drop(root, {"metadata", "style"})
    rename(root)
    box = root.get("viewBox", "")
    root.attrib = {"viewBox": box, "class": "chart", "role": "img", "aria-label": label}
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")).strip()


def bare(element: ElementTree.Element) -> None:
    """Strip namespaces, use the page's colours and font, round coordinates to a tenth of a pixel."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for name, value in element.attrib.items():
        if name == "style":
            element.attrib[name] = coloured(value)
        elif name == "href":
            element.attrib[name] = "".join(value.split())
        elif name in ("d", "x", "y", "transform", "width", "height", "points"):
            element.attrib[name] = NUMBER.sub(rounded, " ".join(value.split()))
    if element.tag == "text" and "rotate(-0 " in element.get("transform", ""):
        del element.attrib["transform"]


def coloured(style: str) -> str:
    """A style attribute with variables for placeholder colours and without fonts."""
    rules = (rule.strip() for rule in style.split(";"))
    kept = "; ".join(rule for rule in rules if rule and not rule.startswith(("font-family", "stroke-dashoffset")))
    return re.sub("#0f0e[0-9a-f]{2}", lambda mark: ROLE_OF[mark[0]], kept)


def rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def drop(root: ElementTree.Element, tags: set[str]) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in tags:
                parent.remove(child)


def rename(root: ElementTree.Element) -> None:
    """Remove unreferenced ids; rename the others after a hash of the drawing."""
    used = {name for element in root.iter() for name in references(element)}
    names: dict[str, str] = {}
    stem = "c" + hashlib.sha256(drawing(root).encode()).hexdigest()[:10]
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            names[name] = element.attrib["id"] = f"{stem}-{len(names)}"
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "href" and value.startswith("#"):
                element.attrib[key] = "#" + names[value[1:]]
            elif "url(#" in value:
                element.attrib[key] = LINK.sub(lambda link: f"url(#{names[link[1]]})", value)


def references(element: ElementTree.Element) -> list[str]:
    link = element.get("href", "")
    return ([link[1:]] if link.startswith("#") else []) + LINK.findall(" ".join(element.attrib.values()))


def drawing(root: ElementTree.Element) -> str:
    """The drawing as text, without its ids, which are random."""
    keep = (
        [element.tag, element.text or "", *(v for k, v in sorted(element.attrib.items()) if "#" not in v and k != "id")]
        for element in root.iter()
    )
    return "\n".join(part for parts in keep for part in parts)
