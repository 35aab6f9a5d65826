"""`keysift eval`: answers and agreement of each strategy against dense attention."""

from __future__ import annotations

from typing import Annotated

import typer

from keysift.engine.config import EngineConfig
from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.evaluation.settings import Evaluation

from ..interrupts import importing
from .flags import Config, Json, flag, from_fields, given

BUILT_IN_ONLY = ("tasks", "texts", "agreement", "chat", "restart", "max_loss")
"""Fields that lm-evaluation-harness does not read."""


@from_fields(
    evaluation=Evaluation, engine=EngineConfig, skip=("engine.strategy", "engine.strategy_args", "engine.seed")
)
def evaluate(
    context: typer.Context,
    evaluation: Evaluation,
    engine: EngineConfig,
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="name the built-in tasks, and do nothing")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure the quality of strategies: scores of their answers, and agreement with dense attention.

    Asks questions after long contexts (RULER's tasks and more, or your own), under dense and under every --strategy,
    and compares next-token distributions along questions, answers and real texts. Downloads nothing. A run that was
    killed goes on where it was. Writes results.json and report.html, one page that opens offline.

    [bold]Examples[/bold]

      keysift eval --strategy sift+retrieval --strategy flexprefill+quest

      keysift eval ./my-model --strategy sift+retrieval,sift.threshold=0.002 --lengths 4096,32768 --samples 20

      keysift eval --tasks my-questions.jsonl --text my-report.txt --strategy nosa --max-loss 0.02

      keysift eval --lm-eval niah_single_1 --lengths 4096 --samples 50
    """
    with importing():
        from .evaluation import evaluate, harness, print_tasks

    if list_tasks:
        print_tasks(as_json=json)
    elif evaluation.lm_eval:
        _refuse_built_in_only(context)
        harness(evaluation, engine, as_json=json)
    elif status := evaluate(evaluation, engine, as_json=json):
        raise typer.Exit(status)


def _refuse_built_in_only(context: typer.Context) -> None:
    for name in given(context, BUILT_IN_ONLY):
        raise InvalidRequest(name, f"{flag(name)} is for the built-in evaluation, not for --lm-eval")
