"""`report.html` of an evaluation: scores, losses and savings of each strategy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..reports.agreement import agreement, heads
from ..reports.blocks import Section, Terms
from ..reports.head import rows_of, strategies_of, subtitle, unfinished, what_was_run
from ..reports.page import Page
from ..reports.samples import samples
from ..reports.scores import curves, verdict
from ..reports.series import style_of
from ..reports.tasks import tasks
from ..reports.units import known

TERMS = (
    (
        "Score",
        "The share of a sample's answers that the generated text contains, letters in any case, as RULER scores; "
        "where one answer is enough, 0 or 100 %. A score of many samples is their mean, with its 95 % confidence "
        "interval. The question is part of the sparse phase, and a missing answer scores 0.",
    ),
    (
        "Loss against dense",
        "Dense attention's score less the strategy's, in percentage points. Above 0: it costs answers.",
    ),
    (
        "Lost / won",
        "Samples that score lower, and samples that score higher, than the same ones under dense attention. About as "
        "many of both is noise.",
    ),
    (
        "Answer NLL",
        "The negative log-likelihood of the right answer, given word for word, in nats per token. Its loss is the "
        "difference from dense attention on the same samples, ± one standard error.",
    ),
    ("Answer rank", "The mean place of the answer's tokens in the model's order of likelihood; 1 is the first."),
    ("Greedy says it", "The share of samples whose answer is, token for token, what the model would say first."),
    (
        "Prefill and decode density",
        "The share of the causal attention that was computed: for the prompt, and for the new tokens. Dense is 100 %.",
    ),
    (
        "Coverage",
        "The share of dense attention's weight that falls on the tokens a strategy kept; the least of all heads is the "
        "least coverage.",
    ),
    (
        "KL",
        "The Kullback-Leibler divergence of the next-token distribution from dense attention's, both reading the same "
        "text, in nats; mean, median and 99th percentile over positions.",
    ),
    ("Same top token", "The share of positions at which both hold the same token the most likely."),
    (
        "Change of perplexity",
        "How much the perplexity of the text grew over dense attention's, as a share of it, ± one standard error.",
    ),
    ("Time against dense", "Wall time of the same samples, divided by dense attention's: below 1× is faster."),
    ("Lengths", "Tokens of the prompt with room for the answer; 4k is 4,096."),
)


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """Write the page of an evaluation's `results.json`; sections without data are left out."""
    strategies = strategies_of(results, *(rows_of(results, key) for key in ("scores", "summary", "agreement", "heads")))
    styles = style_of(strategies)
    page = Page(
        title="Keysift evaluation",
        subtitle=subtitle(results, strategies),
        warnings=unfinished(results, "goes on"),
        sections=[
            verdict(results, strategies, styles),
            curves(results, strategies, styles),
            tasks(results, strategies, styles),
            agreement(results, strategies, styles),
            heads(results, strategies),
            samples(results, styles),
            what_was_run(results, known(results.get("seconds"))),
            Section("terms", "How it was measured", [Terms(TERMS)]),
        ],
    )
    page.write(path)
