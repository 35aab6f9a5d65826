"""All cells of a profile, one after the other, with the results file replaced after each."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keysift.attention import StrategyError, parse

from ...config import EngineConfig
from ...engine import Engine
from ...errors import InvalidRequest, KeysiftError
from ..environment import about, chosen, environment
from ..variants import DENSE
from . import trace
from .measure import Bench
from .prompts import Prompts, read
from .settings import Cell, Profile

SCHEMA = "keysift.profile/1"
RESULTS, TRACE = "profile.json", "trace.json.gz"
TOKEN_COST = 25
"""Weight of a generated token in prompt tokens, for the progress estimate."""

Results = dict[str, Any]
Progress = Callable[[int, int, str], None]
"""Receives work done, work in all, and the title of the present cell."""


def make_engine(settings: Profile, config: EngineConfig, report: Callable[[str], None]) -> Engine:
    """One engine for all cells, after a check of the settings.

    Its own strategy is dense: the index of another one would be kept up to date in every cell.
    """
    if settings.output_len < 2:
        raise InvalidRequest("output_len", f"at least 2, for a time between two tokens, got {settings.output_len}")
    for each in settings.variants:
        try:
            parse(each.name, each.args)
        except StrategyError as error:
            raise InvalidRequest(error.field, error.problem) from None
    return Engine(config.model_copy(update={"strategy": DENSE, "strategy_args": ()}), report)


class Profiler:
    """Measures all cells of the settings on one engine and stores the results in the output folder."""

    def __init__(self, settings: Profile, engine: Engine) -> None:
        """Raises `InvalidRequest` or `Unsupported` for a cell that cannot run, before anything is written."""
        self.settings, self.engine = settings, engine
        longest = max(settings.input_lens) * max(settings.batch_sizes)
        prompts = Prompts(engine.tokenizer, read(settings.text), engine.config.seed, longest)
        self.bench = Bench(engine, settings, prompts)
        for cell in settings.cells():
            self.bench.check(cell)
        self.results = self._empty()

    @property
    def results_file(self) -> Path:
        return self.settings.output_dir / RESULTS

    @property
    def trace_file(self) -> Path:
        return self.settings.output_dir / TRACE

    def go(self, progress: Progress) -> Results:
        """Measure all cells, then record the trace. A cell that fails is a row with its error."""
        self._keep()
        self.trace_file.unlink(missing_ok=True)  # of an earlier run
        work = _Work(self.settings.cells(), self.bench.passes(), self.settings.output_len, progress)
        for cell in self.settings.cells():
            self.results["cells"].append(self._row(cell, work))
            self._keep()
        self._trace(work)
        self.results["finished"] = True
        self._keep()
        return self.results

    def _row(self, cell: Cell, work: _Work) -> dict[str, Any]:
        row: dict[str, Any] = {
            "strategy": cell.variant.label,
            "input_len": cell.input_len,
            "output_len": self.settings.output_len,
            "batch_size": cell.batch_size,
        }
        work.begin(cell)
        try:
            row |= self.bench.measure(cell, work.advance)
        except KeysiftError as error:
            row["error"] = str(error)
        work.end()
        return row

    def _trace(self, work: _Work) -> None:
        """Trace the longest prompt under each strategy without errors."""
        broken = {row["strategy"] for row in self.results["cells"] if "error" in row}
        traces = []
        for variant in self.settings.variants:
            if variant.label not in broken:
                cell = Cell(variant, max(self.settings.input_lens), 1)
                work.report(f"trace of {variant.label}")
                title = f"{variant.label}, {cell.input_len} tokens"
                traces.append(trace.record(self.engine, self.bench.requests(cell)[0], title))
        if traces:
            trace.write(traces, self.trace_file)

    def _empty(self) -> Results:
        settings, model = self.settings, self.engine.model
        return {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": False,
            "environment": environment(model.device),
            "model": about(model),
            "engine": chosen(self.engine.config),
            "settings": {
                "strategies": [variant.label for variant in settings.variants],
                "strategy_args": list(settings.strategy_args),
                "input_lens": list(settings.input_lens),
                "output_len": settings.output_len,
                "batch_sizes": list(settings.batch_sizes),
                "runs": settings.runs,
                "warmup": settings.warmup,
                "seed": self.engine.config.seed,
                "text": str(settings.text) if settings.text else "CPython documentation",
            },
            "cells": [],
        }

    def _keep(self) -> None:
        """Replace the results file as a whole."""
        file = self.results_file
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}")
        unfinished.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(file)


class _Work:
    """Progress over all cells, weighted by tokens."""

    def __init__(self, cells: list[Cell], passes: int, output_len: int, progress: Progress) -> None:
        self._passes, self._output_len, self._progress = passes, output_len, progress
        self._total = sum(passes * self._pass(cell) for cell in cells)
        self._done, self._left, self._title = 0, 0, ""
        self._one = 0

    def _pass(self, cell: Cell) -> int:
        return cell.batch_size * (cell.input_len + TOKEN_COST * self._output_len)

    def begin(self, cell: Cell) -> None:
        self._one = self._pass(cell)
        self._left = self._passes
        count = f" x {cell.batch_size}" if cell.batch_size > 1 else ""
        self.report(f"{cell.variant.label}, {cell.input_len:,} tokens{count}")

    def advance(self) -> None:
        """Count one pass; runs beyond the expected ones count nothing."""
        if self._left > 1:
            self._left -= 1
            self._done += self._one
        self.report(self._title)

    def end(self) -> None:
        self._done += self._left * self._one
        self.report(self._title)

    def report(self, title: str) -> None:
        self._title = title
        self._progress(self._done, self._total, title)
