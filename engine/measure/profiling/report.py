"""`report.html` of a profile: latency, memory and parts of the time; and the page that compares two profiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..reports.blocks import Section, Terms
from ..reports.comparison import differences, ratios
from ..reports.head import rows_of, strategies_of, subtitle, unfinished, what_was_run
from ..reports.latency import cells_table, latency
from ..reports.load import load, loads_of, strategy_of
from ..reports.page import Page
from ..reports.series import style_of
from ..reports.shares import shares

AGAIN = "begins anew"
TERMS = (
    ("TTFT", "Time to first token: from the request to its first new token; the whole prefill and one decision."),
    ("ITL", "Inter-token latency: the wait between two new tokens of one sequence."),
    ("E2EL", "End-to-end latency: from the request to its last token."),
    (
        "TPOT",
        "Time per output token: (E2EL − TTFT) / (new tokens − 1), the mean ITL of one sequence. With several prompts "
        "at once it contains the prefill of those that came later; the decode step does not.",
    ),
    ("Decode step", "One token of every sequence that decodes: the median over all such steps."),
    ("Against dense", "A time divided by dense attention's at the same length and batch size: below 1× is faster."),
    (
        "Prefill and decode density",
        "The share of the causal attention that was computed: for the prompt, and for the new tokens. Dense is 100 %.",
    ),
    ("Coverage", "The share of dense attention's weight that falls on the tokens a strategy kept, where it knows it."),
    ("KV read, KV moved", "Bytes of keys and values that attention read, and that moved between tiers of memory."),
    (
        "KV cache, peak memory",
        "Bytes that the keys and values of the cell take. Peak memory is the GPUs' in sum, or that of the process, "
        "with the pages that cells before have touched; of several processes that of the first.",
    ),
    (
        "CPU share, disturbed",
        "CPU time of the process against wall time x threads, during prefill on a CPU. Where it is below 95 %, or "
        "others had more than 5 % of the cores that it may use, the run was done again, or the cell is marked as "
        "disturbed.",
    ),
    ("Goodput", "Requests per second that came back whole and met every target that was set for them."),
    (
        "Parts of the time",
        "Linear: projections and feed-forward layers, and what several processes wait for each other. "
        "Selection: choosing pages. Attention: over the chosen pages. "
        "Index: adding keys to it. Transfer: pages between tiers. Sampling: from logits to a token. Other: the rest.",
    ),
    ("Spread", "Each cell is run several times after a warm-up; medians are shown, with the fastest and the slowest."),
    ("Lengths", "Tokens of the prompt; 4k is 4,096."),
)


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the page of a `profile.json`, be it of cells, of a load or of both."""
    runs = [{"strategy": strategy_of(run)} for run in loads_of(results)]
    strategies = strategies_of(results, rows_of(results, "cells"), runs)
    styles = style_of(strategies)
    page = Page(
        title="Keysift profile",
        subtitle=subtitle(results, strategies),
        warnings=unfinished(results, AGAIN),
        sections=[
            cells_table(results, styles),
            latency(results, styles),
            shares(results, styles),
            load(results, styles),
            what_was_run(results),
            Section("terms", "How it was measured", [Terms(TERMS)]),
        ],
    )
    page.write(path)


def write_comparison(before: Mapping[str, Any], after: Mapping[str, Any], path: Path) -> None:
    """Write the page that compares two `profile.json`."""
    strategies = strategies_of(after, rows_of(after, "cells"), rows_of(before, "cells"))
    styles = style_of(strategies)
    page = Page(
        title="Keysift profiles compared",
        subtitle=f"{_named(before)} against {_named(after)}",
        warnings=[*unfinished(before, AGAIN), *unfinished(after, AGAIN)],
        sections=[
            ratios(before, after, styles),
            differences(before, after),
            Section("terms", "How it was measured", [Terms(TERMS)]),
        ],
    )
    page.write(path)


def _named(results: Mapping[str, Any]) -> str:
    """`0.1.0 (650df88), 2026-11-23`: the version, the commit and the day of a run."""
    environment = results.get("environment") or {}
    version = " ".join(
        part
        for part in (environment.get("keysift"), f"({environment['commit']})" if environment.get("commit") else "")
        if part
    )
    return ", ".join(part for part in (version, str(results.get("created") or "")[:10]) if part) or "unknown"
