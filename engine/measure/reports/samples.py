"""Report section on single samples, the wrong ones first, with prompt and generated text."""

from __future__ import annotations

from . import units
from .blocks import Answer, Answers, Block, Cell, Note, Section, named, number
from .head import Json, rows_of
from .series import Styles
from .units import known

MOST = 400
"""Most rows on a page, as more make it slow; all of them are in the results' file."""
COLUMNS = ("task", "strategy", "score", "loss of NLL (nats)", "density")
Sample = tuple[str, int, int]
"""Task, length, index."""


def samples(results: Json, styles: Styles) -> Section:
    rows = rows_of(results, "samples")
    if not rows:
        return Section("samples", "Samples", [])
    dense = {_sample(row): row for row in rows if row["strategy"] == "dense"}
    rows.sort(key=lambda row: _rank(row, dense))
    wrong = sum(_wrong(row) for row in rows)
    left = f" The first {MOST} are shown, the rest is in the results' file." if len(rows) > MOST else ""
    note = f"{wrong:,} of {len(rows):,} answers are not fully right.{left}"
    blocks: list[Block] = [Note(note), Answers(COLUMNS, [_answer(row, dense, styles) for row in rows[:MOST]])]
    return Section("samples", "Samples, the wrong ones first", blocks)


def _sample(row: Json) -> Sample:
    return row["task"], row["length"], row["index"]


def _wrong(row: Json) -> bool:
    return (known(row.get("score")) or 0.0) < 1.0


def _loss(row: Json, dense: dict[Sample, Json]) -> float | None:
    """Negative log-likelihood of the answer less that under dense attention, nats."""
    given = known(row.get("answer_nll_loss"))
    mine, theirs = known(row.get("answer_nll")), known(dense.get(_sample(row), {}).get("answer_nll"))
    if given is not None or mine is None or theirs is None:
        return given
    return mine - theirs


def _rank(row: Json, dense: dict[Sample, Json]) -> tuple[bool, float, str, int, int, str]:
    return not _wrong(row), -(_loss(row, dense) or 0.0), *_sample(row), row["strategy"]


def _answer(row: Json, dense: dict[Sample, Json], styles: Styles) -> Answer:
    other = dense.get(_sample(row), {}).get("score")
    lost = row["strategy"] != "dense" and (known(other) or 0.0) > (known(row.get("score")) or 0.0)
    of_dense = row["strategy"] == "dense"
    decode = known(row.get("decode_density"))
    rank = units.shown(row.get("answer_rank"), units.short)
    cells = [
        Cell(row["task"], f"{units.tokens(row['length'])}, sample {row['index']}"),
        named(row["strategy"], styles),
        number(
            row.get("score"),
            units.percent,
            below="" if of_dense else f"dense {units.shown(other, units.percent)}",
            tone="bad" if lost else "",
        ),
        Cell(units.NOTHING, f"rank {rank}")
        if of_dense
        else number(_loss(row, dense), units.signed, below=f"rank {rank}"),
        number(
            row.get("prefill_density"),
            units.percent,
            below="" if decode is None else f"decode {units.percent(decode)}",
        ),
    ]
    generated, tail = str(row.get("text") or ""), str(row.get("prompt_tail") or "")
    return Answer(cells, _wrong(row), [str(answer) for answer in row.get("answers") or []], generated, tail)
