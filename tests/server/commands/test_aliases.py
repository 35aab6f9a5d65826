"""Former spellings: the same work as the current ones, and one line on standard error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keysift.engine.errors import InvalidRequest
from keysift.server.commands.aliases import current

from ..conftest import Run, Running

FORMER = {
    "doctor --calibrate --model ./m --page-size 32": "calibrate ./m --page-size 32",
    "doctor --model=./m --json --calibrate": "calibrate ./m --json",
    "doctor --forget --json": "calibrate --forget --json",
    "profile --address host:1 --num-prompts 4": "load --address host:1 --num-prompts 4",
    "profile --address=host:1": "load --address=host:1",
    "serve --kv-home /tmp --kv-home-memory=1GiB": "serve --kv-offload /tmp --kv-offload-memory=1GiB",
}
CURRENT = ("", "--help", "doctor --json", "profile ./m --input-lens 2000", "calibrate --forget", "load host:1")


@pytest.mark.parametrize(("former", "expected"), FORMER.items())
def test_a_former_spelling_becomes_the_current_one(
    capsys: pytest.CaptureFixture[str], former: str, expected: str
) -> None:
    assert current(former.split()) == expected.split()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if "home" in former else 1), "one line for each spelling"
    assert all(line.endswith("; the old spelling goes away in 0.2.0") for line in lines)


@pytest.mark.parametrize("arguments", CURRENT)
def test_a_current_spelling_stays(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    assert current(arguments.split()) == arguments.split()
    assert capsys.readouterr().err == ""


def test_calibrate_and_forget_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="either --calibrate or --forget"):
        current(["doctor", "--calibrate", "--forget"])


def test_doctor_forgets_as_calibrate_does(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYSIFT_CACHE", str(tmp_path))
    file = str(tmp_path / "calibration.json")
    status, out, err = run("doctor", "--forget", "--json")
    assert (status, json.loads(out)) == (0, {"file": file, "deleted": False})
    assert err == (
        "keysift: keysift doctor --forget is now keysift calibrate --forget; the old spelling goes away in 0.2.0\n"
    )


def test_profile_of_an_address_is_a_load(run: Run, running: Running, tmp_path: Path) -> None:
    small = ("--num-prompts", "2", "--input-len", "40", "--output-len", "2", "--output-dir", tmp_path, "--json")
    status, out, err = run("profile", "--address", running.address, *small)
    assert status == 0, err
    assert json.loads(out)["load"]["completed"] == 2
    assert err.startswith("keysift: keysift profile --address is now keysift load; ")
