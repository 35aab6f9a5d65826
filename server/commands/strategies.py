"""The list behind `keysift strategies`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from keysift.attention import Strategy, known


def describe(strategy: type[Strategy]) -> dict[str, Any]:
    """What a strategy does in one sentence, and its options with their defaults; an option without one is required."""
    fields = [field for field in dataclasses.fields(strategy) if field.init]
    return {
        "about": (inspect.getdoc(strategy) or "").partition("\n")[0],
        "fields": {field.name: _default(field) for field in fields},
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def print_json() -> None:
    print(json.dumps({name: describe(strategy) for name, strategy in sorted(known().items())}, default=str))


def print_table() -> None:
    table = Table("strategy", "what it does", "options", box=None, pad_edge=False)
    for name, strategy in sorted(known().items()):
        about = describe(strategy)
        options = "\n".join(f"{name}.{field}={default}" for field, default in about["fields"].items())
        table.add_row(name, about["about"], options)
    Console().print(table)
