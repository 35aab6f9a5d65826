"""Head of every report: model, machine, settings, and a warning for an unfinished run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from . import units
from .blocks import Facts, Note, Section

Json = Mapping[str, Any]
GROUPS = (
    ("model", "Model"),
    ("engine", "Engine"),
    ("environment", "Machine and versions"),
    ("settings", "Settings"),
)
NAMES = {
    "keysift": "Keysift",
    "max_model_len": "longest context",
    "kv_heads": "key/value heads",
    "input_lens": "input lengths",
    "output_len": "output length",
    "strategy_args": "strategy arguments",
    "warmup": "warm-up runs",
    "chat": "chat template",
}
LENGTHS = {"lengths", "input_lens", "max_model_len"}


def rows_of(results: Json, key: str) -> list[Json]:
    """The list under `key`; empty if it is missing or null."""
    return list(results.get(key) or [])


def strategies_of(results: Json, *rows: Iterable[Json]) -> list[str]:
    """Strategies named by the settings or by rows, dense first."""
    names = list((results.get("settings") or {}).get("strategies") or [])
    names += [row["strategy"] for part in rows for row in part if row.get("strategy")]
    return sorted(dict.fromkeys(names), key=lambda name: name != "dense")


def what_was_run(results: Json, total: float | None = None) -> Section:
    """Section on model, machine and settings."""
    groups = [(title, facts(results.get(key) or {})) for key, title in GROUPS]
    when = [("created", str(results["created"]))] if results.get("created") else []
    took = [("took", units.seconds(total))] if total is not None else []
    run = ("Run", [*when, *took, ("result schema", str(results.get("schema", units.NOTHING)))])
    return Section("run", "What was run", [Facts([run, *((title, rows) for title, rows in groups if rows)])])


def facts(values: Json) -> list[tuple[str, str]]:
    return [(NAMES.get(key, key.replace("_", " ")), fact(key, value)) for key, value in values.items()]


def fact(key: str, value: object) -> str:
    """A value of any kind in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(fact(key, one) for one in value) or "none"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if key in LENGTHS and isinstance(value, int):
        return units.tokens(value)
    return units.NOTHING if value is None else str(value)


def subtitle(results: Json, strategies: list[str]) -> str:
    model = (results.get("model") or {}).get("name", "unknown model")
    on = (results.get("environment") or {}).get("processor")
    settings = results.get("settings") or {}
    counts = [f"{settings['samples']} samples each"] if settings.get("samples") else []
    counts += [f"seed {settings['seed']}"] if settings.get("seed") is not None else []
    listed = ", ".join(strategies) if strategies else "no strategy"
    return " · ".join(str(part) for part in (model, listed, *counts, on, (results.get("created") or "")[:10]) if part)


def unfinished(results: Json, again: str) -> list[Note]:
    """A warning for an unfinished run; `again` is what the same command would do next."""
    if results.get("finished", True):
        return []
    text = f"This run did not come to its end: what is shown is what was done by then. The same command {again}."
    return [Note(text, warning=True)]
