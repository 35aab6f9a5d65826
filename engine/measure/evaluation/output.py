"""``results.json`` and ``report.html``, replaced as a whole after every unit of work."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..environment import about, chosen, environment
from .journal import replacing, writing
from .results import tables
from .runner import Run

SCHEMA = "keysift.eval/1"


def results(run: Run) -> dict[str, Any]:
    """All findings so far as one JSON object."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": run.finished,
        "environment": environment(run.engine.model.device),
        "model": about(run.engine.model),
        "engine": chosen(run.engine.config),
        "settings": run.settings.model_dump(mode="json", exclude={"restart"}),
        "seconds": run.seconds,
        **tables(run.found, run.strategies),
    }


def write_results(run: Run) -> dict[str, Any]:
    """Write and return the results."""
    found = results(run)
    path = run.settings.output_dir / "results.json"
    with writing(path), replacing(path) as file:
        json.dump(found, file, indent=1, ensure_ascii=False)
    return found


def write_page(run: Run, found: dict[str, Any]) -> Path:
    from .report import write_report

    path = run.settings.output_dir / "report.html"
    with writing(path):
        write_report(found, path)
    return path
