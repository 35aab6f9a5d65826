"""The command line: `serve`, `generate`, `eval`, `profile`, `load`, `calibrate`, `strategies`, `doctor`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from keysift.engine.errors import InvalidRequest, KeysiftError, ModelNotFound, Unsupported
from keysift.engine.version import keysift_version

from .aliases import current
from .calibrate import calibrate
from .doctor import doctor
from .evaluate import evaluate
from .flags import Json
from .generate import generate
from .load.command import load
from .profile import profile
from .serve import serve

BAD_INPUT = (InvalidRequest, ModelNotFound, Unsupported)

app = typer.Typer(
    help="Long-context inference over gRPC with pluggable sparse attention.",
    epilog="Every flag also reads KEYSIFT_<FLAG>; command line > environment > --config file > default.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("serve", rich_help_panel="Run")(serve)
app.command("generate", rich_help_panel="Run")(generate)
app.command("eval", rich_help_panel="Measure")(evaluate)
app.command("profile", rich_help_panel="Measure")(profile)
app.command("load", rich_help_panel="Measure")(load)
app.command("calibrate", rich_help_panel="Measure")(calibrate)
app.command("doctor", rich_help_panel="Look around")(doctor)


@app.command(rich_help_panel="Look around")
def strategies(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="strategy to explain, or PROMPT+TOKEN")] = None,
    json: Json = False,
) -> None:
    """List the attention strategies, or explain one: its paper, its options, their bounds and meaning.

    [bold]Examples[/bold]

      keysift strategies sift

      keysift strategies --json
    """
    from .strategies import print_json, print_table

    print_json(name) if json else print_table(name)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(keysift_version())
        raise typer.Exit


def main() -> None:
    """Entry point: an error that Keysift raises on purpose is one line on standard error, not a traceback."""
    try:
        app(current(sys.argv[1:]), prog_name="keysift")
    except KeysiftError as error:
        print(f"keysift: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, BAD_INPUT) else 1) from None
