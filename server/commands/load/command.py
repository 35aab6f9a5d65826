"""`keysift load`: latency and throughput of a running server under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keysift.engine.errors import InvalidRequest

from ...interrupts import importing
from ..flags import Config, Json, from_fields, given
from .run import Load

Address = Annotated[str | None, typer.Argument(metavar="ADDRESS", help="host:port of the running server")]
Strategies = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        "--strategies",
        help="attention strategy of all requests, options of its own after commas; none: the server's",
        rich_help_panel="Load",
    ),
]
OutputDir = Annotated[
    Path,
    typer.Option(
        help="gets profile.json and report.html; an older one is replaced",
        envvar="KEYSIFT_OUTPUT_DIR",
        show_envvar=False,
    ),
]


@from_fields(load=Load, skip=("load.strategy",))
def load(
    context: typer.Context,
    load: Load,
    server: Address = None,
    strategies: Strategies = None,
    output_dir: OutputDir = Path("keysift-profile"),
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure a running server under load: latency, throughput, and the requests that meet a --goodput.

    Requests arrive at --request-rate or by --max-concurrency; prompts take turns at several --input-len. TTFT: arrival
    to first token; TPOT: (end - first token) / (tokens - 1); ITL: between two tokens; E2EL: arrival to end. Writes
    profile.json, whose fields have the names of vLLM's benchmark, and report.html, one page that opens offline.

    [bold]Examples[/bold]

      keysift load localhost:50051

      keysift load localhost:50051 --request-rate 0.5 --num-prompts 40 --goodput ttft:2000

      keysift load localhost:50051 --max-concurrency 4 --input-len 2000 --input-len 8000 --strategy sift+retrieval
    """
    with importing():
        from .output import put_under_load

    if server and given(context, ["address"]):
        raise InvalidRequest("address", "either ADDRESS or --address, got both")
    settings = _with_strategy(_with_address(load, server), strategies or [])
    if status := put_under_load(settings, output_dir, as_json=json):
        raise typer.Exit(status)


def _with_address(load: Load, address: str | None) -> Load:
    """The load with the argument ADDRESS, which replaces a variable's or a file's ``address``."""
    return load if address is None else load.model_copy(update={"address": address})


def _with_strategy(load: Load, strategies: list[str]) -> Load:
    """The load with one ``NAME,FIELD=VALUE...``; raises `InvalidRequest` for several."""
    if len(strategies) > 1:
        raise InvalidRequest("strategies", f"one at a time for a running server, got {', '.join(strategies)}")
    name, *options = (part.strip() for part in "".join(strategies).split(","))
    return load.model_copy(update={"strategy": name, "strategy_args": (*load.strategy_args, *options)})
