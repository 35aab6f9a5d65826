"""Tables of ``results.json`` from the findings of a journal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ..percentiles import p99
from ..variants import DENSE
from .divergence import Divergence
from .journal import Key
from .statistics import interval, paired, perplexity_change

Row = dict[str, Any]
SAMPLE_FACTS = (
    "score",
    "text",
    "answers",
    "prompt_tokens",
    "prompt_tail",
    "answer_nll",
    "answer_rank",
    "answer_greedy",
)
DENSITIES = ("prefill_density", "decode_density")
SPARSITY = (*DENSITIES, "coverage", "coverage_min")


def tables(found: Mapping[Key, Any], labels: Iterable[str]) -> dict[str, list[Row]]:
    """The tables `scores`, `summary`, `agreement`, `heads` and `samples`; the worst rows come first."""
    order = {label: number for number, label in enumerate(labels)}
    answers = [
        {"group": key[1], "strategy": key[-1], **row}
        for key, rows in found.items()
        if key[0] == "samples"
        for row in rows
    ]
    along = [
        {"phase": key[1], "name": key[2], "length": key[3], "strategy": key[4], **value}
        for key, value in found.items()
        if key[0] == "text"
    ]
    answers.sort(key=lambda row: (order[row["strategy"]], row["task"], row["length"], row["index"]))
    along.sort(key=lambda row: (order[row["strategy"]], row["phase"], row["name"], row["length"]))
    return {
        "scores": scores(answers),
        "summary": summary(answers),
        "agreement": [*agreement_along(along), *agreement_of_tasks(answers)],
        "heads": heads(along),
        "samples": samples(answers),
    }


def scores(answers: list[Row]) -> list[Row]:
    """One row for each task, length and strategy; the lowest score first."""
    dense = _dense(answers)
    rows = [
        {"task": task, "length": length, "strategy": strategy, **_scored(group), **_likelihood(group, dense)}
        for (task, length, strategy), group in _groups(answers, "task", "length", "strategy")
    ]
    return sorted(rows, key=lambda row: (row["score"], -row["answer_nll_loss"]))


def summary(answers: list[Row]) -> list[Row]:
    """One row for each strategy and length, and one of all lengths (None), with the worst task named."""
    rows = [_summed(strategy, None, group, answers) for (strategy,), group in _groups(answers, "strategy")]
    each = _groups(answers, "strategy", "length")
    rows += [_summed(strategy, length, group, answers) for (strategy, length), group in each]
    return sorted(rows, key=lambda row: (row["length"] or 0, -row["score"], row["answer_nll"]))


def _summed(strategy: str, length: int | None, group: list[Row], answers: list[Row]) -> Row:
    dense = _dense(answers)
    lost = {task: _loss(rows, dense) for (task,), rows in _groups(group, "task")}
    worst = max(lost, key=lost.__getitem__)
    scored = _scored(group)
    return {
        "strategy": strategy,
        "length": length,
        **scored,
        "loss": _loss(group, dense),
        "worst_task": worst,
        "worst_loss": lost[worst],
        **_likelihood(group, dense),
        "seconds": sum(row["seconds"] for row in group),
    }


def _loss(group: list[Row], dense: dict[Key, Row]) -> float:
    """Mean score of dense less that of the strategy, on the same samples."""
    return statistics.fmean(dense[_name(row)]["score"] - row["score"] for row in group)


def _scored(group: list[Row]) -> Row:
    low, high = interval([row["score"] for row in group])
    return {
        "samples": len(group),
        "score": _mean(row["score"] for row in group),
        "low": low,
        "high": high,
        **{name: _mean(_measured(row[name] for row in group)) for name in DENSITIES},
        "coverage": _mean(row["coverage"] for row in group),
        "coverage_min": min(_measured(row["coverage_min"] for row in group), default=None),
    }


def _likelihood(group: list[Row], dense: dict[Key, Row]) -> Row:
    loss, error = paired([row["answer_nll"] - dense[_name(row)]["answer_nll"] for row in group])
    return {
        "answer_nll": _mean(row["answer_nll"] for row in group),
        "answer_nll_loss": loss,
        "answer_nll_loss_se": _known(error),
        "answer_rank": _mean(row["answer_rank"] for row in group),
        "answer_greedy": _mean(float(row["answer_greedy"]) for row in group),
    }


def agreement_along(along: list[Row]) -> list[Row]:
    """One row for each text, length, phase and strategy; and one of all texts, where there are several."""
    several = len({row["name"] for row in along}) > 1
    keys = ("length", "phase", "strategy")
    groups = [(("text", name, *rest), group) for (name, *rest), group in _groups(along, "name", *keys)]
    groups += [(("text", "all", *rest), group) for rest, group in _groups(along, *keys) if several]
    return [_agreement(key, [Divergence(**row["divergence"]) for row in group], _kept(group)) for key, group in groups]


def _kept(group: list[Row]) -> Row:
    density = (value for row in group for layer in row["heads"]["density"] for value in layer)
    return {
        "density": _mean(_measured(density)),  # layers with a window have none
        "coverage": _mean(row["coverage"] for row in group),
        "coverage_min": min(_measured(row["coverage_min"] for row in group), default=None),
    }


def agreement_of_tasks(answers: list[Row]) -> list[Row]:
    """One row for each length, phase and strategy.

    ``prefill`` is along the ends of the prompts, the questions, ``decode`` along the right answers.
    """
    rows = []
    for (length, strategy), group in _groups(answers, "length", "strategy"):
        for phase in ("prefill", "decode"):
            parts = [Divergence(**row["divergence"][phase]) for row in group]
            read = "prefill_density" if phase == "prefill" else "answer_density"
            facts = {"density": _mean(_measured(row[read] for row in group)), "coverage": None, "coverage_min": None}
            rows.append(_agreement(("tasks", "all", length, phase, strategy), parts, facts))
    return rows


def _agreement(key: tuple[Any, ...], parts: list[Divergence], facts: Row) -> Row:
    source, name, length, phase, strategy = key
    kl = [value for part in parts for value in part.kl]
    change, error = perplexity_change([value for part in parts for value in part.loss])
    return {
        "source": source,
        "name": name,
        "length": length,
        "phase": phase,
        "strategy": strategy,
        "positions": len(kl),
        "kl_mean": _mean(kl),
        "kl_median": statistics.median(kl),
        "kl_p99": p99(kl),
        "top1": _mean(float(value) for part in parts for value in part.agrees),
        "perplexity_change": change,
        "perplexity_change_se": _known(error),
        **facts,
    }


def heads(along: list[Row]) -> list[Row]:
    """Coverage and density by layer and head; the longest text of each strategy and phase, and the first of those."""
    rows: dict[tuple[str, str], Row] = {}
    for row in sorted(along, key=lambda row: -row["length"]):
        if row["strategy"] != DENSE:
            rows.setdefault((row["strategy"], row["phase"]), row)
    names = ("strategy", "phase", "length", "name")
    return [{**{name: row[name] for name in names}, **row["heads"]} for row in rows.values()]


def samples(answers: list[Row]) -> list[Row]:
    """Every answer, the wrong ones first, in order of their loss against dense."""
    dense = _dense(answers)
    names = ("task", "length", "index", "strategy", *SAMPLE_FACTS, *SPARSITY, "seconds")
    rows = [{name: row[name] for name in names} for row in answers]
    return sorted(
        rows, key=lambda row: (row["score"] == 1, dense[_name(row)]["answer_nll"] - row["answer_nll"], row["score"])
    )


def _dense(answers: list[Row]) -> dict[Key, Row]:
    return {_name(row): row for row in answers if row["strategy"] == DENSE}


def _name(row: Row) -> Key:
    return row["task"], row["length"], row["index"]


def _groups(rows: list[Row], *names: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows grouped by these columns, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


def _known(error: float) -> float | None:
    """A standard error; None for that of a single value, as JSON has no infinity."""
    return error if math.isfinite(error) else None


def _measured(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None if a value is unknown or there is none."""
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    return statistics.fmean(value for value in known if value is not None)
