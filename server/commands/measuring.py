"""The commands that measure: `keysift eval` and `keysift profile`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from keysift.engine.config import EngineConfig
from keysift.engine.errors import InvalidRequest
from keysift.engine.measure.evaluation.settings import Evaluation
from keysift.engine.measure.profiling.settings import Profile

from ..interrupts import importing
from .flags import Config, Json, from_fields, given
from .load.run import Load

PROFILES = ("input_lens", "output_len", "strategy", "strategy_args", "seed")
"""Fields of a load that flags of the profile stand for."""
NOT_OF_THE_HARNESS = ("tasks", "texts", "agreement", "chat", "restart", "max_loss")
NOT_OF_A_LOAD = ("batch_sizes", "runs", "warmup", "attempts", "text")

measuring = typer.Typer()


@measuring.command("eval", rich_help_panel="Measure")
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
    """Measure what strategies cost in answers, and how far they are from dense attention; nothing is downloaded.

    Asks questions behind long contexts (RULER's tasks and more, or your own), under dense and under every --strategy,
    and compares next-token distributions along questions, answers and real texts. A run that was killed goes on where
    it was. Writes results.json and report.html, one page that opens offline.

    [bold]Examples[/bold]

      keysift eval --strategy sift+retrieval --strategy flexprefill+quest

      keysift eval ./my-model --strategy sift+retrieval,sift.threshold=0.002 --lengths 4096,32768 --samples 20

      keysift eval --tasks my-questions.jsonl --text my-report.txt --strategy nosa --max-loss 0.02

      keysift eval --lm-eval niah_single_1 --lengths 4096 --samples 50
    """
    with importing():
        from .evaluate import evaluate, harness, print_tasks

    if list_tasks:
        print_tasks(as_json=json)
    elif evaluation.lm_eval:
        _refuse(context, NOT_OF_THE_HARNESS, "is for the built-in evaluation, not for --lm-eval")
        harness(evaluation, engine, as_json=json)
    elif status := evaluate(evaluation, engine, as_json=json):
        raise typer.Exit(status)


@measuring.command("profile", rich_help_panel="Measure")
@from_fields(
    profiling=Profile,
    load=Load,
    engine=EngineConfig,
    skip=("engine.strategy", "engine.strategy_args", *(f"load.{name}" for name in PROFILES)),
)
def profile(
    context: typer.Context,
    profiling: Profile,
    load: Load,
    engine: EngineConfig,
    compare: Annotated[Path | None, typer.Option(help="an older profile.json to compare with")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure how long prompts and tokens take under each strategy, and where the time goes.

    TTFT: start to first token; TPOT: (end - first token) / (tokens - 1); ITL: between two tokens. Greedy, on real text,
    without the prefix cache. A run during which something else used the machine is done again, or marked. Writes
    profile.json, trace.json.gz, which opens in ui.perfetto.dev, and report.html, one page that opens offline.

    With --address, put a running server under load instead: --request-rate or --max-concurrency, and how many requests
    meet a --goodput. Prompts have 1024 tokens there and answers 128 unless --input-len and --output-len are given;
    prompts take turns at several lengths. Fields have the names of vLLM's benchmark.

    [bold]Examples[/bold]

      keysift profile --strategy dense --strategy sift+retrieval --input-lens 2000,8000

      keysift profile ./my-model --batch-sizes 1,4 --runs 5 --compare keysift-profile/profile.json --output-dir after

      keysift profile --address localhost:50051 --request-rate 0.5 --num-prompts 40 --goodput ttft:2000
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says when it starts, on standard error
    if load.address is not None:
        with importing():
            from .profile import put_under_load

        _refuse(
            context, (*NOT_OF_A_LOAD, *EngineConfig.model_fields), "is for an engine of this process, not for --address"
        )
        if compare is not None:
            raise InvalidRequest("compare", "--compare is for an engine of this process, not for --address")
        if status := put_under_load(_asked(context, load, profiling, engine), profiling.output_dir, as_json=json):
            raise typer.Exit(status)
        return
    _refuse(context, set(Load.model_fields) - {*PROFILES, "address"}, "is for a server at --address")
    with importing():
        from .profile import profile

    if status := profile(profiling, engine, compare=compare, as_json=json):
        raise typer.Exit(status)


def _asked(context: typer.Context, load: Load, profiling: Profile, engine: EngineConfig) -> Load:
    """The load, with what flags of the profile say of it; where they say nothing, the server's own strategy."""
    asked = profiling.strategies if given(context, ["strategies"]) else ("",)
    if len(asked) > 1:
        raise InvalidRequest("strategies", f"one at a time for a server at --address, got {', '.join(asked)}")
    name, *options = (part.strip() for part in asked[0].split(","))
    sizes: dict[str, object] = {"seed": engine.seed}
    for size in ("input_lens", "output_len"):  # where nobody states them, the load's own defaults
        if (source := context.get_parameter_source(size)) is not None and source.name != "DEFAULT":
            sizes[size] = getattr(profiling, size)
    return load.model_copy(update={**sizes, "strategy": name, "strategy_args": (*profiling.strategy_args, *options)})


def _refuse(context: typer.Context, names: object, why: str) -> None:
    for name in given(context, names):  # type: ignore[arg-type]
        if name not in ("model", "seed", "strategy", "strategy_args"):
            raise InvalidRequest(name, f"--{name.replace('_', '-')} {why}")
