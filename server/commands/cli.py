"""The command line: `serve`, `generate`, `eval`, `profile`, `strategies`, `doctor`. Heavy imports wait inside them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from keysift.engine.config import EngineConfig
from keysift.engine.errors import InvalidRequest, KeysiftError, ModelNotFound, Unsupported
from keysift.engine.version import keysift_version

from ..interrupts import importing
from ..options import Document, Remote, Sampling, ServerConfig
from .flags import Config, Json, from_fields, given, read_config_later, refuse_config
from .measuring import measuring

CALIBRATED_FOR = {
    "page_size",
    "dtype",
    "device",
    "backend",
    "dense_kernel",
    "prefill_chunk",
    "queries_per_row",
    "max_model_len",
    "rope_scaling",
}
"""Fields of the engine that a calibration depends on or that loading the model may need, beside its name."""
ONLY_CALIBRATING = (*CALIBRATED_FOR, "model", "config")
BAD_INPUT = (InvalidRequest, ModelNotFound, Unsupported)

app = typer.Typer(
    help="Long-context inference over gRPC with pluggable sparse attention.",
    epilog="Every flag also reads KEYSIFT_<FLAG>; command line > environment > --config file > default.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(measuring)


def main() -> None:
    """An error that Keysift raises on purpose is one line, not a traceback."""
    try:
        app(prog_name="keysift")
    except KeysiftError as error:
        print(f"keysift: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, BAD_INPUT) else 1) from None


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(keysift_version())
        raise typer.Exit


@app.command(rich_help_panel="Run")
@from_fields(server=ServerConfig, engine=EngineConfig)
def serve(server: ServerConfig, engine: EngineConfig, config: Config = None) -> None:
    """Serve a model over gRPC until SIGTERM or SIGINT.

    [bold]Examples[/bold]

      keysift serve

      keysift serve ./my-model --strategy streaming --strategy-arg streaming.window=4096

      KEYSIFT_API_KEY=secret keysift serve --host 0.0.0.0 --ssl-keyfile key.pem --ssl-certfile cert.pem
    """
    import asyncio

    with importing():
        from keysift.engine.engine import Engine

        from ..server import Server

    _log_to_stderr()
    if server.metrics_port:
        _export_metrics(server.host, server.metrics_port)
    report = logging.getLogger("keysift.engine").info

    whole = Server(server, lambda: Engine(engine, report))
    asyncio.run(whole.run())
    if whole.worker.alive:
        # A load cannot be interrupted, and an interpreter that ends around a thread in native code aborts.
        logging.shutdown()
        os._exit(0)


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("keysift").setLevel(logging.INFO)


def _export_metrics(host: str, port: int) -> None:
    from prometheus_client import start_http_server

    try:
        start_http_server(port, host)
    except OSError as error:
        raise InvalidRequest("metrics_port", f"a free port, got {port} ({error.strerror})") from None


@app.command(rich_help_panel="Run")
@from_fields(document=Document, sampling=Sampling, remote=Remote, engine=EngineConfig, skip=("engine.seed",))
def generate(
    context: typer.Context,
    document: Document,
    sampling: Sampling,
    remote: Remote,
    engine: EngineConfig,
    config: Config = None,
    json: Json = False,
) -> None:
    """Complete one prompt, in this process or on a running server.

    [bold]Examples[/bold]

      keysift generate --prompt-file report.txt --question "What was decided?" --chat

      cat report.txt | keysift generate --prompt-file - --strategy streaming --json

      keysift generate --prompt "Once upon a time" --address localhost:50051
    """
    from .generate import run_here, run_there, show, show_json

    if remote.address is None:
        outputs = run_here(engine, document.value(), sampling.params())
    else:
        _refuse_flags_of_an_engine(context)
        # Its default is for an engine of our own: a server has its own.
        given = engine.strategy if _was_given(context, "strategy") else ""
        outputs = run_there(remote, engine, given, document.value(), sampling.params())
    (show_json if json else show)(outputs)


def _refuse_flags_of_an_engine(context: typer.Context) -> None:
    for name in given(context, set(EngineConfig.model_fields) - {"model", "strategy", "strategy_args"}):
        problem = f"{_flag(name)} is for an engine of this process; a server at --address takes {Remote.TAKES}"
        raise InvalidRequest(name, problem)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@app.command(rich_help_panel="Look around")
def strategies(json: Json = False) -> None:
    """List the attention strategies with their options and defaults.

    [bold]Example[/bold]

      keysift strategies --json
    """
    from .strategies import print_json, print_table

    print_json() if json else print_table()


@app.command(rich_help_panel="Look around")
@from_fields(
    calibration=EngineConfig,
    skip=[f"calibration.{name}" for name in set(EngineConfig.model_fields) - CALIBRATED_FOR],
    later=["calibration"],
)
def doctor(
    context: typer.Context,
    calibration: Callable[[], EngineConfig],
    calibrate: Annotated[bool, typer.Option("--calibrate", help="measure from which length on choosing pays")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="delete everything that --calibrate has stored")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="what the engine is to serve", envvar="KEYSIFT_MODEL", rich_help_panel="Calibration"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file: flag names and values",
            envvar="KEYSIFT_CONFIG",
            is_eager=True,
            callback=read_config_later,
            rich_help_panel="Calibration",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say what this machine and this installation can do; exit status 0 when Keysift is usable.

    With --calibrate, measure for about a minute, on an otherwise idle machine, how long a prompt must be for each
    prompt strategy to beat dense attention, and store it. The flags of the panel Calibration are for this only.

    What is stored changes from which length on prompts are sparse: every engine of this machine, model and engine flags
    takes it as the strategy's dense_below, where the strategy's other options are as measured. To ignore it, state one
    yourself: --strategy-arg NAME.dense_below=N. To delete it, use --forget. It is in calibration.json in $KEYSIFT_CACHE
    or the user's cache folder; a plain keysift doctor names the file.

    [bold]Examples[/bold]

      keysift doctor

      keysift doctor --calibrate --model ./my-model
    """
    if calibrate and forget:
        raise InvalidRequest("forget", "either --calibrate or --forget, got both")
    if calibrate:
        with importing():
            from .calibrate import run

        refuse_config(context)
        run(calibration().model_copy(update={"model": model}), as_json=json)
        return
    for name in given(context, ONLY_CALIBRATING):
        raise InvalidRequest(name, f"{_flag(name)} is for --calibrate only")
    if forget:
        from .calibrate import delete

        delete(as_json=json)
        return
    from .doctor import examine, print_json, print_table, usable

    findings = examine()
    print_json(findings) if json else print_table(findings)
    if not usable(findings):
        raise typer.Exit(1)
