"""Help of every command: clean, complete, and with examples that work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import typer

from keysift.server.commands import cli
from keysift.server.commands.aliases import FORMER_FIELDS, FORMER_FLAGS

COMMANDS = typer.main.get_group(cli.app).commands
REMOVED = (*FORMER_FLAGS, *FORMER_FIELDS.values(), "kv home", "--calibrate", "doctor --forget", "profile --address")
SEPARATOR = "=" * 40
PRINT_ALL = f"""
import sys
from keysift.server.__main__ import main
for command in sys.argv[1].split(","):
    sys.argv = ["keysift", *command.split(), "--help"]
    try:
        main()
    except SystemExit as done:
        assert not done.code, command
    print("{SEPARATOR}")
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Help of each command and, as "", of `keysift`, all from one new process; standard error must stay empty."""
    names = ["", *COMMANDS]
    command = [sys.executable, "-c", PRINT_ALL, ",".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(zip(names, done.stdout.split(SEPARATOR), strict=False))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_no_warning_and_no_removed_spelling(printed: dict[str, str], name: str) -> None:
    assert f"Usage: keysift {name}".rstrip() in printed[name]
    assert "warning" not in printed[name].lower()
    assert [spelling for spelling in REMOVED if spelling in printed[name].lower()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_keysift_lists_the_command(printed: dict[str, str], name: str) -> None:
    assert re.search(rf"^│ {name} +\S", printed[""], re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_command_that_parses(name: str) -> None:
    examples = re.findall(
        r"^ *(?:cat .* \| |\w+=\w+ )?keysift ((?:[a-z]+)(?: .*)?)$", COMMANDS[name].help or "", re.MULTILINE
    )
    assert examples
    for example in examples:
        command, *arguments = shlex.split(example)
        assert command == name
        known = {flag for option in COMMANDS[command].params for flag in (*option.opts, *option.secondary_opts)}
        assert {argument for argument in arguments if argument.startswith("--")} <= known, example
