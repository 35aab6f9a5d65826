"""`keysift profile`: latency of each strategy in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from keysift.engine.config import EngineConfig
from keysift.engine.measure.profiling.settings import Profile

from ..interrupts import importing
from .flags import Config, Json, from_fields


@from_fields(profiling=Profile, engine=EngineConfig, skip=("engine.strategy", "engine.strategy_args"))
def profile(
    profiling: Profile,
    engine: EngineConfig,
    compare: Annotated[Path | None, typer.Option(help="an older profile.json to compare with")] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure latency and throughput under each strategy, and the share of each part of a step.

    TTFT: start to first token; TPOT: (end - first token) / (tokens - 1); ITL: between two tokens. Greedy, on real text,
    without the prefix cache. A run during which something else used the machine is repeated, or marked. Writes
    profile.json, trace.json.gz, which opens in ui.perfetto.dev, and report.html, one page that opens offline.

    For a running server, see keysift load.

    [bold]Examples[/bold]

      keysift profile --strategy dense --strategy sift+retrieval --input-lens 2000,8000

      keysift profile ./my-model --batch-sizes 1,4 --runs 5 --compare keysift-profile/profile.json --output-dir after
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler logs its start on standard error
    with importing():
        from .profiling import profile

    if status := profile(profiling, engine, compare=compare, as_json=json):
        raise typer.Exit(status)
