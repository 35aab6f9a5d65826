"""Report section on tasks: scores by task, length and strategy, the greatest loss first."""

from __future__ import annotations

from collections.abc import Sequence

from . import units
from .blocks import Block, Cell, Folded, Note, Section, Table, named, number, text
from .head import Json, rows_of
from .scores import FULL_HEAT, WEAK, Key, by_key, interval, losses
from .series import Styles
from .units import known

COLUMNS = ("task", "length", "strategy", "samples", "score", "answer NLL (nats)", "loss of NLL (nats)", "answer rank")
MEASURES = ("greedy says it", "prefill density", "decode density", "coverage", "least coverage")


def tasks(results: Json, strategies: Sequence[str], styles: Styles) -> Section:
    scores = by_key(rows_of(results, "scores"))
    if not scores:
        return Section("tasks", "Task by task", [])
    caption = "Score, with the prefill density under it; the stronger the colour, the more is lost against dense"
    grid = Table(["task", "length", *strategies], _grid(scores, strategies), caption)
    every = Table([*COLUMNS, *MEASURES], [_row(key, row, styles) for key, row in sorted(scores.items())])
    blocks: list[Block] = [*_weak(scores), grid, Folded("All numbers of all tasks", every)]
    return Section("tasks", "Task by task, the worst first", blocks)


def _weak(scores: dict[Key, Json]) -> list[Block]:
    """A note on tasks that dense attention fails at, which cannot measure a strategy."""
    places: dict[str, list[int]] = {}
    for (task, length, strategy), row in sorted(scores.items()):
        score = known(row.get("score"))
        if strategy == "dense" and score is not None and score < WEAK:
            places.setdefault(task, []).append(length)
    if not places:
        return []
    named_ = "; ".join(f"{task} at {', '.join(map(units.tokens, lengths))}" for task, lengths in places.items())
    text_ = (
        f"Dense attention itself scores under {units.percent(WEAK)} on: {named_}. Differences there are mostly noise."
    )
    return [Note(text_, warning=True)]


def _grid(scores: dict[Key, Json], strategies: Sequence[str]) -> list[list[Cell]]:
    lost = {name: losses(name, scores) for name in strategies}
    places = sorted({(task, length) for task, length, _ in scores})
    places.sort(key=lambda place: -max((lost[name].get(place, 0.0) for name in strategies), default=0.0))
    return [
        [Cell(task), number(length, units.tokens)]
        + [_score(scores.get((task, length, name), {}), lost[name].get((task, length)), name) for name in strategies]
        for task, length in places
    ]


def _score(row: Json, loss: float | None, name: str) -> Cell:
    density = known(row.get("prefill_density"))
    below = "" if density is None or name == "dense" else f"at {units.percent(density)}"
    heat = min(max(loss or 0.0, 0.0) / FULL_HEAT, 1.0)
    return number(row.get("score"), units.percent, below=below, heat=heat or None)


def _row(key: Key, row: Json, styles: Styles) -> list[Cell]:
    task, length, strategy = key
    error = known(row.get("answer_nll_loss_se"))
    below = "" if error is None else f"± {units.significant(error, 2)}"
    shares = ("answer_greedy", "prefill_density", "decode_density", "coverage", "coverage_min")
    return [
        text(task),
        number(length, units.tokens),
        named(strategy, styles),
        number(row.get("samples"), units.count),
        number(row.get("score"), units.percent, below=interval(row)),
        number(row.get("answer_nll"), units.significant),
        number(row.get("answer_nll_loss"), units.signed, below=below),
        number(row.get("answer_rank"), units.significant),
        *(number(row.get(share), units.percent) for share in shares),
    ]
