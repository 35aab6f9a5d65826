"""`keysift strategies`: all strategies in a table, or the options of one."""

from __future__ import annotations

import inspect
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from keysift.attention import Strategy, StrategyError, find, known, make
from keysift.attention.registry import Option, broken, options
from keysift.attention.strategy import LARGEST
from keysift.engine.errors import InvalidRequest
from keysift.kvcache import Phase

BOUND_WORDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def describe(name: str, strategy: type[Strategy]) -> dict[str, Any]:
    """A strategy and its options as JSON values. An option whose default is null is required."""
    listed, description = options(strategy), _description(strategy)
    return {
        "about": description.partition("\n")[0],
        "fields": {option.name: option.default for option in listed},
        "description": description,
        "phases": _phases(name),
        "source": strategy.source,
        "options": [option._asdict() for option in listed],
    }


def print_json(name: str | None) -> None:
    listed = {each: describe(each, strategy) for each, strategy in _selected(name).items()}
    faults = broken() if name is None else {}
    print(json.dumps(listed | {each: {"broken": problem} for each, problem in faults.items()}, default=str))


def print_table(name: str | None) -> None:
    console = Console(markup=False, highlight=False)
    if name is None:
        console.print(_overview(), "\nkeysift strategies NAME explains one with its options.")
        for each, problem in broken().items():
            console.print(f"\nbroken: {each}: {problem}")
        return
    for each, strategy in _selected(name).items():
        _explain(console, each, strategy)


def _selected(name: str | None) -> dict[str, type[Strategy]]:
    """All strategies by name, or those of a pair. Raises `InvalidRequest` for an unknown one."""
    if name is None:
        return dict(sorted(known().items()))
    try:
        return {part: find(part) for part in name.split("+")}
    except StrategyError as error:
        raise InvalidRequest(error.field, error.problem) from None


def _overview() -> Table:
    table = Table("strategy", "what it does", "options", box=None, pad_edge=False)
    for name, strategy in _selected(None).items():
        listed = " ".join(f"{name}.{option.name}={_text(option.default)}" for option in options(strategy))
        table.add_row(name, _description(strategy).partition("\n")[0], listed)
    return table


def _explain(console: Console, name: str, strategy: type[Strategy]) -> None:
    console.print(name, style="bold")
    console.print(_description(strategy), end="\n\n")
    console.print("chooses in:", " and ".join(_phases(name)) or "unknown")
    console.print("source:", strategy.source or "none", end="\n\n")
    table = Table("option", "type", "default", "bounds", "meaning", box=None, pad_edge=False)
    for option in options(strategy):
        table.add_row(option.name, option.type, _text(option.default), _bounds(option), option.description)
    console.print(table, "")


def _description(strategy: type[Strategy]) -> str:
    """The docstring with one line for each paragraph, and an empty one between them."""
    paragraphs = (inspect.getdoc(strategy) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _phases(name: str) -> list[str]:
    """Phases that a strategy chooses in: prefill, decode. Empty for one that has required options."""
    try:
        strategy = make(name)
    except StrategyError:
        return []
    return [phase.value for phase in Phase if strategy.part(phase).name == strategy.name]


def _bounds(option: Option) -> str:
    if "enum" in option.bounds:
        return ", ".join(map(str, option.bounds["enum"]))
    stated = {key: bound for key, bound in option.bounds.items() if abs(bound) != LARGEST}
    return ", ".join(f"{word} {_text(stated[key])}" for key, word in BOUND_WORDS.items() if key in stated)


def _text(value: object) -> str:
    """An option's value as a command line spells it."""
    if value is None:
        return "required"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
