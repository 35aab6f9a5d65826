"""Report sections on scores: a verdict for each strategy, and charts against length and density."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from . import units
from .blocks import Block, Cell, Chart, Gallery, Section, Table, named, number, text
from .charts import Axis, Line, Span, lines, spans
from .head import Json, rows_of
from .series import Styles
from .units import known

WEAK = 0.5
"""Score of dense attention below which a task measures the model rather than a strategy."""
FULL_HEAT = 0.5
"""Loss with the strongest colour."""
DENSITY = Axis("prefill density (%), log scale", "log", units.percent, low=0.1)

Key = tuple[str, int, str]
"""Task, length, strategy."""


def by_key(scores: Iterable[Json]) -> dict[Key, Json]:
    return {(row["task"], row["length"], row["strategy"]): row for row in scores}


def mean(rows: Sequence[Json], key: str) -> float | None:
    """Mean over rows with the key, weighted by their samples."""
    found = [(value, row.get("samples") or 1) for row in rows if (value := known(row.get(key))) is not None]
    weight = sum(samples for _, samples in found)
    return sum(value * samples for value, samples in found) / weight if weight else None


def totals(results: Json, strategies: Sequence[str], length: int | None) -> dict[str, Json]:
    """Summary of each strategy at a length, or over all if None; computed from its scores if it has none."""
    found = {row["strategy"]: row for row in rows_of(results, "summary") if row.get("length") == length}
    for name in strategies:
        rows = [row for row in rows_of(results, "scores") if row["strategy"] == name]
        rows = [row for row in rows if length in (None, row["length"])]
        if name not in found and rows:
            keys = ("score", "prefill_density", "decode_density")
            found[name] = {"strategy": name, "length": length, **{key: mean(rows, key) for key in keys}}
    return found


def lengths_of(results: Json) -> list[int]:
    rows = [*rows_of(results, "scores"), *rows_of(results, "summary")]
    return sorted({row["length"] for row in rows if row.get("length") is not None})


def verdict(results: Json, strategies: Sequence[str], styles: Styles) -> Section:
    """Table with the loss and the savings of each strategy."""
    summary, scores = totals(results, strategies, None), by_key(rows_of(results, "scores"))
    columns = ["strategy", "score", "loss against dense (points)", "worst task", "samples lost / won against dense"]
    columns += ["KL, prefill (nats)", "KL, decode (nats)", "prefill density", "decode density", "time against dense"]
    shown = [name for name in strategies if name in summary or any(name == key[2] for key in scores)]
    rows = [
        [named(name, styles), *_scored(name, summary, scores, results), *_cost(name, summary, results)]
        for name in shown
    ]
    blocks: list[Block] = [Table(columns, rows, "Over all tasks and lengths")] if rows else []
    return Section("verdict", "Verdict", blocks)


def _scored(name: str, summary: dict[str, Json], scores: dict[Key, Json], results: Json) -> list[Cell]:
    mine, dense = summary.get(name, {}), summary.get("dense", {})
    loss = known(mine.get("loss"))
    if loss is None and known(mine.get("score")) is not None and known(dense.get("score")) is not None:
        loss = dense["score"] - mine["score"]
    if name == "dense":
        loss = None
    tone = "" if loss is None or abs(loss) < 0.005 else "bad" if loss > 0 else "good"
    score = number(mine.get("score"), units.percent, below=interval(mine))
    return [score, number(loss, units.points, tone=tone), worst(name, scores), _swings(name, results)]


def interval(row: Json) -> str:
    """`88–98 %`: the confidence interval of a score."""
    low, high = known(row.get("low")), known(row.get("high"))
    return "" if low is None or high is None else f"{units.percent(low).removesuffix(' %')}–{units.percent(high)}"


def losses(name: str, scores: dict[Key, Json]) -> dict[tuple[str, int], float]:
    """Score of dense less that of a strategy, for each task and length."""
    out = {}
    for (task, length, strategy), row in scores.items():
        mine, dense = known(row.get("score")), known(scores.get((task, length, "dense"), {}).get("score"))
        if strategy == name and mine is not None and dense is not None:
            out[task, length] = dense - mine
    return out


def worst(name: str, scores: dict[Key, Json]) -> Cell:
    """Task with the greatest loss of a strategy; for dense, the task with the least score."""
    if name == "dense":
        own = [(known(row.get("score")), task, length) for (task, length, of), row in scores.items() if of == name]
        found = [(score, task, length) for score, task, length in own if score is not None]
        score, task, length = min(found, default=(None, "", 0))
        return text(None) if score is None else Cell(f"{task} at {units.tokens(length)}", units.percent(score))
    loss, task, length = max(((loss, *key) for key, loss in losses(name, scores).items()), default=(0.0, "", 0))
    if not task:
        return text(None)
    if loss <= 0:
        return Cell("none", "no task below dense")
    return Cell(f"{task} at {units.tokens(length)}", f"{units.points(-loss)} points")


def _swings(name: str, results: Json) -> Cell:
    """Numbers of samples on which dense scores higher and lower; noise has about as many of both."""
    scored = {(row["task"], row["length"], row["index"], row["strategy"]): row for row in rows_of(results, "samples")}
    lost = won = seen = 0
    for (task, length, index, strategy), row in scored.items():
        dense = scored.get((task, length, index, "dense"))
        if strategy != name or dense is None:
            continue
        mine, theirs = known(row.get("score")), known(dense.get("score"))
        if mine is not None and theirs is not None:
            lost, won, seen = lost + (mine < theirs), won + (mine > theirs), seen + 1
    return Cell(f"{lost} / {won}", f"of {seen}", lost - won) if seen and name != "dense" else text(None)


def _cost(name: str, summary: dict[str, Json], results: Json) -> list[Cell]:
    mine = summary.get(name, {})
    seconds, dense = known(mine.get("seconds")), known(summary.get("dense", {}).get("seconds"))
    ratio = seconds / dense if seconds is not None and dense else None
    return [
        *(number(kl_of(results, name, phase), units.significant) for phase in ("prefill", "decode")),
        number(mine.get("prefill_density"), units.percent),
        number(mine.get("decode_density"), units.percent),
        number(ratio, units.times),
    ]


def kl_of(results: Json, strategy: str, phase: str) -> float | None:
    """Mean KL over lengths, along texts, or along tasks if there are no texts."""
    rows = [row for row in rows_of(results, "agreement") if (row["strategy"], row["phase"]) == (strategy, phase)]
    for source in ("text", "tasks"):
        found = [row for row in rows if row.get("source") == source]
        whole = [row for row in found if row.get("name") == "all"] or found
        if whole:
            return mean([{**row, "samples": row.get("positions")} for row in whole], "kl_mean")
    return None


def curves(results: Json, strategies: Sequence[str], styles: Styles) -> Section:
    """Charts of score against length and density, and of the answer's likelihood against density."""
    lengths = lengths_of(results)
    at = {length: totals(results, strategies, length) for length in lengths}
    charts = [_by_length(at, strategies, styles), _by_density(at, strategies, styles)]
    charts.append(_likelihood(results, strategies, styles))
    kept = [chart for chart in charts if chart]
    return Section("curves", "Score against length and density", [Gallery(kept, styles)] if kept else [])


def _by_length(at: dict[int, dict[str, Json]], strategies: Sequence[str], styles: Styles) -> Chart | None:
    found = {name: [row[name] for row in at.values() if _has(row.get(name), "score")] for name in strategies}
    found = {name: rows for name, rows in found.items() if rows}
    caption = "Score over all tasks at each length; the bands are confidence intervals."
    if len(at) > 1 and found:
        series = [_line(name, rows, "length", styles) for name, rows in found.items()]
        x = Axis("prompt length (tokens)", "lengths", units.tokens)
        return Chart(lines(series, x, _score_axis(series), "Score against length", spread="band"), caption)
    bars = [
        Span(name, styles[name], row["score"], known(row.get("low")), known(row.get("high")))
        for name, (row, *_) in found.items()
    ]
    length = units.tokens(next(iter(at), 0))
    x = Axis("score (%)", write=units.percent, low=0.0, high=1.0)
    caption = f"Score over all tasks at {length} tokens; the bars are confidence intervals."
    return Chart(spans(bars, x, "Score of each strategy"), caption) if bars else None


def _line(name: str, rows: Sequence[Json], x: str, styles: Styles) -> Line:
    lows, highs = ([known(row.get(end)) for row in rows] for end in ("low", "high"))
    return Line(styles[name], [row[x] for row in rows], [row["score"] for row in rows], lows, highs)


def _score_axis(lines_: Sequence[Line]) -> Axis:
    """Whole tens of percent around all scores and their bounds."""
    known_ = [value for line in lines_ for value in (*line.ys, *line.lows, *line.highs) if value is not None]
    low, high = math.floor(10 * min(known_) - 0.2) / 10, math.ceil(10 * max(known_) + 0.2) / 10
    return Axis("score (%)", write=units.percent, low=max(low, 0.0), high=min(high, 1.0))


def _has(row: Json | None, *keys: str) -> bool:
    return row is not None and all(known(row.get(key)) is not None for key in keys)


def _by_density(at: dict[int, dict[str, Json]], strategies: Sequence[str], styles: Styles) -> Chart | None:
    rows = {
        name: [row[name] for row in at.values() if _has(row.get(name), "score") and _positive(row[name])]
        for name in strategies
    }
    series = [_line(name, found, "prefill_density", styles) for name, found in rows.items() if found]
    caption = (
        "Score against the share of the attention that the prompt needed; a point for each length, joined in order."
    )
    return Chart(lines(series, DENSITY, _score_axis(series), "Score against density"), caption) if series else None


def _positive(row: Json) -> bool:
    return (known(row.get("prefill_density")) or 0) > 0


def _likelihood(results: Json, strategies: Sequence[str], styles: Styles) -> Chart | None:
    series = [
        line for name in strategies if name != "dense" and (line := _likelihood_line(results, name, styles)) is not None
    ]
    caption = (
        "How much less likely the right answer is than under dense attention: above 0 is a loss; ± 1 standard error."
    )
    y = Axis("loss of the answer's NLL (nats per token)", rule=0.0)
    label = "Loss of likelihood against density"
    return Chart(lines(series, DENSITY, y, label, spread="bars"), caption) if series else None


def _likelihood_line(results: Json, name: str, styles: Styles) -> Line | None:
    points = []
    for length in lengths_of(results):
        rows = [row for row in rows_of(results, "scores") if (row["strategy"], row["length"]) == (name, length)]
        rows = [row for row in rows if _has(row, "answer_nll_loss") and _positive(row)]
        density, loss = mean(rows, "prefill_density"), mean(rows, "answer_nll_loss")
        if density is not None and loss is not None:
            points.append((density, loss, _pooled(rows)))
    if not points:
        return None
    xs, ys, errors = zip(*points, strict=True)
    lows = [y - error if error is not None else None for y, error in zip(ys, errors, strict=True)]
    highs = [y + error if error is not None else None for y, error in zip(ys, errors, strict=True)]
    return Line(styles[name], xs, ys, lows, highs)


def _pooled(rows: Sequence[Json]) -> float | None:
    """The standard error of the weighted mean of rows with standard errors of their own."""
    found = [(known(row.get("answer_nll_loss_se")), row.get("samples") or 1) for row in rows]
    if any(error is None for error, _ in found):
        return None
    total = sum(samples for _, samples in found)
    return math.sqrt(sum(((error or 0.0) * samples) ** 2 for error, samples in found)) / total
