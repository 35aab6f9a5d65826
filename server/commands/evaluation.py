"""Work of `keysift eval`: the built-in evaluation or lm-evaluation-harness, and the tables of the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from keysift.engine.checked import ready
from keysift.engine.config import EngineConfig
from keysift.engine.engine import Engine
from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.evaluation.journal import writing
from keysift.engine.measure.evaluation.output import write_page, write_results
from keysift.engine.measure.evaluation.runner import Run
from keysift.engine.measure.evaluation.settings import Evaluation
from keysift.engine.measure.evaluation.tasks import TASKS
from keysift.engine.support import Facts, check

from ..interrupts import INTERRUPTED, importing
from .progress import interrupted, report

WIDTH = 140
"""Columns of a table outside of a terminal."""


def print_tasks(*, as_json: bool) -> None:
    """Print the built-in tasks with a summary of each."""
    about = {name: task.summary for name, task in TASKS.items()}
    if as_json:
        print(json.dumps(about))
        return
    table = Table("task", "question", box=None, pad_edge=False)
    for each in about.items():
        table.add_row(*each)
    Console().print(table)


def harness(settings: Evaluation, config: EngineConfig, *, as_json: bool) -> None:
    """Run tasks of lm-evaluation-harness under every strategy and length; lm_eval.json is written after every length.

    Raises `InvalidRequest` for several processes, for tasks that the harness does not have, and for lengths beyond the
    model's.
    """
    check(config, Facts(one_process=True))
    with importing():
        from keysift.engine.measure.lm_eval_model import check_tasks

    check_tasks(settings.lm_eval)
    path = settings.output_dir / "lm_eval.json"
    ready(path.parent)
    rows: list[dict[str, Any]] = []
    for part in _harness_rows(settings, config):
        rows += part
        with writing(path):
            path.write_text(json.dumps(rows, indent=1, default=str), encoding="utf-8")
    print(json.dumps(rows, default=str)) if as_json else _show_harness(rows)
    report(f"done: {path}")


def _harness_rows(settings: Evaluation, config: EngineConfig) -> Iterator[list[dict[str, Any]]]:
    """Rows of each strategy and length; the model is loaded once for each strategy."""
    from keysift.engine import LLM
    from keysift.engine.measure.lm_eval_model import KeysiftLM, evaluate

    for variant in settings.variants:
        one = config.model_copy(update={"strategy": variant.name, "strategy_args": variant.args})
        lm = KeysiftLM(LLM(**one.model_dump()))
        if (longest := max(settings.lengths)) > lm.max_length:
            raise InvalidRequest("lengths", f"at most {lm.max_length} tokens (max_model_len), got {longest}")
        for length in settings.lengths:
            report(f"lm-evaluation-harness: {variant.label}, {length:,} tokens")
            found = evaluate(lm, settings.lm_eval, limit=settings.samples, metadata={"max_seq_lengths": [length]})
            key = {"strategy": variant.label, "length": length}
            yield [{**key, "task": task, **values} for task, values in found["results"].items()]


def _show_harness(rows: list[dict[str, Any]]) -> None:
    table = Table("task", "tokens", "strategy", "metric", Column("value", justify="right"))
    for row in rows:
        key = row["task"], f"{row['length']:,}", row["strategy"]
        for name, value in row.items():
            if "," in name and "stderr" not in name and isinstance(value, float) and value >= 0:
                table.add_row(*key, name.partition(",")[0], f"{value:.4f}")
    Console().print(table)


def evaluate(settings: Evaluation, config: EngineConfig, *, as_json: bool) -> int:
    """Run the questions that the output folder lacks, print and write the results; returns the exit status."""
    check(config, Facts(one_process=True))
    run = Run.open(settings, Engine(config, report))
    stopped = interrupted("evaluating", lambda update: run.go(update, lambda: write_results(run)))
    results = write_results(run)
    page = write_page(run, results)
    print(json.dumps(results, ensure_ascii=False)) if as_json else _show(results)
    state = "interrupted; the same command goes on" if stopped else "done"
    report(f"{state}: {settings.output_dir / 'results.json'} and {page}")
    return INTERRUPTED if stopped else _verdict(results, settings.max_loss)


def _verdict(results: dict[str, Any], max_loss: float | None) -> int:
    """Exit status: 1 if a strategy lost more than `max_loss` against dense."""
    if max_loss is None:
        return 0
    worse = [row for row in results["summary"] if row["loss"] > max_loss]
    for row in worse:
        where = "over all lengths" if row["length"] is None else f"at {row['length']} tokens"
        print(f"keysift: max_loss: {row['strategy']} scores {row['loss']:.3f} below dense {where}", file=sys.stderr)
    return 1 if worse else 0


def _show(results: dict[str, Any]) -> None:
    """Print the scores, and the agreement at the longest contexts; the files have the rest."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if rows := [row for row in results["summary"] if row["length"] is None]:
        console.print(_scores(rows))
    longest = max((row["length"] for row in results["agreement"]), default=0)
    if rows := [row for row in results["agreement"] if row["length"] == longest and row["strategy"] != "dense"]:
        console.print(_agreement(rows))


def _scores(rows: list[dict[str, Any]]) -> Table:
    columns = ("score", "95 %", "lost", "answer nats lost", "prompt density", "token density")
    table = Table("strategy", *(Column(name, justify="right") for name in columns), "worst task", title="answers")
    for row in rows:
        table.add_row(
            row["strategy"],
            f"{row['score']:.3f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            f"{row['loss']:+.3f}",
            f"{row['answer_nll_loss']:+.3f}{_error(row['answer_nll_loss_se'], '.3f')}",
            _share(row["prefill_density"]),
            _share(row["decode_density"]),
            f"{row['worst_task']} ({row['worst_loss']:+.2f})" if row["worst_loss"] > 0 else "-",
        )
    return table


def _agreement(rows: list[dict[str, Any]]) -> Table:
    columns = ("KL mean", "median", "p99", "top-1", "perplexity", "density", "coverage")
    table = Table("text", "tokens", "phase", "strategy", *(Column(name, justify="right") for name in columns))
    table.title = "agreement with dense"
    for row in rows:
        table.add_row(
            row["name"] if row["source"] == "text" else "tasks",
            f"{row['length']:,}",
            row["phase"],
            row["strategy"],
            *(f"{row[name]:.4f}" for name in ("kl_mean", "kl_median", "kl_p99")),
            f"{row['top1']:.1%}",
            f"{row['perplexity_change']:+.1%}{_error(row['perplexity_change_se'], '.1%')}",
            _share(row["density"]),
            _share(row["coverage"]),
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _error(error: float | None, digits: str) -> str:
    """Standard error in text; empty for a single sample, which has none."""
    return "" if error is None else f" ± {error:{digits}}"
