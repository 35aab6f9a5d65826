"""Tables of the documentation that are made from the code: strategies, flags, limits, metrics, tasks and modules.

`python docs/generate.py NAME` prints one of them; the site takes them through `hooks.py`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("kvcache", "attention", "engine", "server")
ARXIV = re.compile(r"arXiv:? ?(\d{4}\.\d{5})")
PHASES = {"prefill": "prompts", "decode": "generated tokens"}
WORDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
LARGEST = 2**31 - 1
"""The bound of every whole number, which a page states once."""


def strategies() -> str:
    """A section for each registered strategy: summary, source, and a table of its options."""
    from keysift.attention import known

    return "\n\n".join(_strategy(name, kind) for name, kind in sorted(known().items()))


def _strategy(name: str, kind: Any) -> str:
    from keysift.server.commands.strategies import describe

    facts = describe(name, kind)
    phases = " and ".join(PHASES[phase] for phase in facts["phases"])
    source = f"`{_path(kind.__module__)}`" + (f", after {_linked(kind.source)}" if kind.source else "")
    rows = [
        (_code(each["name"]), each["type"], _code(each["default"]), _bounds(each["bounds"]), each["description"])
        for each in facts["options"]
    ]
    options = table(("option", "type", "default", "bounds", "meaning"), rows)
    return f"### `{name}`\n\n{_summary(kind)}\n\nChooses for {phases}. Source: {source}.\n\n{options}"


def _bounds(bounds: dict[str, Any]) -> str:
    """`{"minimum": 1, "enum": [..]}` as `at least 1` or the list of values."""
    choices = [_code(value) for value in bounds.get("enum", ())]
    limits = [f"{word} {bounds[key]:g}" for key, word in WORDS.items() if bounds.get(key, LARGEST) != LARGEST]
    return ", ".join(choices + limits) or "-"


def _linked(source: str) -> str:
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", source.strip().removesuffix("."))


def _summary(kind: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _path(module: str) -> str:
    """The file of a module, from the root of the repository; the module itself where it is another package's."""
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return str(path.relative_to(ROOT)) if module.startswith("keysift.") and path.exists() else module


def flags(command: str) -> str:
    """The flags of a command by panel: spelling, default and meaning, as `keysift COMMAND --help` has them."""
    panels: dict[str, list[tuple[str, ...]]] = {}
    for each in commands()[command].params:
        if each.name != "help" and not getattr(each, "hidden", False):
            panel = getattr(each, "rich_help_panel", None) or "Other"
            panels.setdefault(panel, []).append((_spelling(each), _default(each), getattr(each, "help", "") or ""))
    parts = [f"**{panel}**\n\n{table(('flag', 'default', 'meaning'), rows)}" for panel, rows in panels.items()]
    return "\n\n".join(parts)


def commands() -> dict[str, Any]:
    """Commands of `keysift` by name, as objects of its parser."""
    import typer

    from keysift.server.commands.cli import app

    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    default = parameter.default
    if default in (None, (), [], ""):
        return "-"
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(_code(each) for each in (default if isinstance(default, list | tuple) else [default]))


def limits() -> str:
    """Limits of what callers may send: flag, default, bounded field of a message, and meaning."""
    from keysift.server.limits import RULES, Limits

    fields = {rule.limit: rule.field for rules in reversed(RULES.values()) for rule in reversed(rules)}
    rows = [
        (
            f"`--{name.replace('_', '-')}`",
            _size(each.default),
            f"`{fields[name]}`" if name in fields else "-",
            each.description or "",
        )
        for name, each in Limits.model_fields.items()
    ]
    return table(("flag", "default", "field", "bounds"), rows)


def _size(value: Any) -> str:
    return _code(value.human_readable() if hasattr(value, "human_readable") else value)


def combinations() -> str:
    """Values of the engine's options that are refused beside others."""
    from keysift.engine.support import rows

    cells = ((f"`--{option.replace('_', '-')}`", values, where, reason) for option, values, where, reason in rows())
    return table(("flag", "must be", "condition", "as"), cells)


def metrics() -> str:
    """Every Prometheus metric: name, kind, labels and meaning."""
    from prometheus_client import REGISTRY

    import keysift.server.metrics  # noqa: F401  # registers them, with those of the engine

    found = {
        each for each in REGISTRY._names_to_collectors.values() if getattr(each, "_name", "").startswith("keysift_")
    }
    rows = [
        (f"`{_exported(each)}`", each._type, ", ".join(each._labelnames) or "-", each._documentation)
        for each in sorted(found, key=lambda each: each._name)
    ]
    return table(("metric", "kind", "labels", "meaning"), rows)


def _exported(metric: Any) -> str:
    return f"{metric._name}_total" if metric._type == "counter" else str(metric._name)


def tasks() -> str:
    """Every built-in task of `keysift eval`."""
    from keysift.engine.measure.evaluation.tasks import TASKS

    return table(("task", "what it asks"), ((f"`{name}`", task.summary) for name, task in TASKS.items()))


def modules() -> str:
    """Every module of the product with the first line of its docstring, a table for each package."""
    return "\n\n".join(f"### {package}/\n\n{table(('module', 'content'), _modules(package))}" for package in PACKAGES)


def _modules(package: str) -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / package).rglob("*.py"), key=_order):
        if "_pb2" not in path.name and (first := first_line(path)):
            yield f"`{_shown(path)}`", first


def _order(path: Path) -> tuple[str, ...]:
    """A folder's own line, then its files, then its folders."""
    *folders, name = path.relative_to(ROOT).parts
    return (*(f"1{folder}" for folder in folders), "" if name == "__init__.py" else f"0{name}")


def _shown(path: Path) -> str:
    shown = path.relative_to(ROOT)
    return f"{shown.parent}/" if path.name == "__init__.py" else str(shown)


def first_line(path: Path) -> str:
    """The first line of a module's docstring; empty where it has none."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0].replace("``", "`")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).replace("``", "`").split()).replace("|", "\\|")


def _code(value: object) -> str:
    """A value as a command line spells it, in a code span; an option without a default is required."""
    if value is None:
        return "required"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`"


GENERATORS: dict[str, Callable[..., str]] = {
    "strategies": strategies,
    "flags": flags,
    "limits": limits,
    "combinations": combinations,
    "metrics": metrics,
    "tasks": tasks,
    "modules": modules,
}

if __name__ == "__main__":
    print(GENERATORS[sys.argv[1]](*sys.argv[2:]))
