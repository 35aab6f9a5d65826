"""`keysift doctor`: checks of this machine and this installation."""

from __future__ import annotations

import typer

from ..interrupts import importing
from .flags import Json


def doctor(json: Json = False) -> None:
    """Check this machine and this installation; exit status 0 if Keysift is usable.

    [bold]Examples[/bold]

      keysift doctor

      keysift doctor --json
    """
    with importing():
        from .diagnosis import examine, print_json, print_table, usable

    findings = examine()
    print_json(findings) if json else print_table(findings)
    if not usable(findings):
        raise typer.Exit(1)
