"""`keysift profile`, called the way people call it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .conftest import Run

SMALL = ("--output-len", "4", "--runs", "1", "--attempts", "1", "--warmup", "0", "--prefill-chunk", "64")
REPORT = "keysift.engine.profiling.report"


@pytest.fixture(autouse=True)
def _pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages have tests of their own; here they are lists of the cells that they would show."""

    def show(*arguments: Any) -> None:
        *tables, path = arguments
        path.write_text(json.dumps([len(table["cells"]) for table in tables]))

    module = ModuleType(REPORT)
    module.__dict__.update(write_report=show, write_comparison=show)
    monkeypatch.setitem(sys.modules, REPORT, module)


def test_a_profile_is_printed_kept_and_compared(run: Run, model_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    lengths = ("--input-lens", "40,60", "--input-lens", "50", "--strategy", "dense")
    status, out, err = run("profile", model_folder, *SMALL, *lengths, "--output-dir", first, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [cell["input_len"] for cell in found["cells"]] == [40, 50, 60]
    assert json.loads((first / "profile.json").read_text()) == found
    assert (first / "report.html").read_text() == "[3]"
    assert {file.name for file in first.iterdir()} == {"profile.json", "trace.json.gz", "report.html"}
    assert str(first / "trace.json.gz") in err

    old = ("--compare", first / "profile.json")
    status, out, err = run("profile", model_folder, *SMALL, "--input-len", "40", "--output-dir", second, *old)
    assert status == 0, err
    assert (second / "comparison.html").read_text() == "[3, 2]"
    assert "TTFT s" in out
    assert "selection" in out


def test_what_cannot_be_measured_or_compared_is_one_line(run: Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"schema": "another/1"}')
    for arguments, words in (
        (("--input-lens", "100000"), "keysift: input_lens: at most"),
        (("--output-len", "1"), "keysift: output_len: "),
        (("--compare", tmp_path / "other.json"), "keysift: compare: a profile.json, got"),
        (("--compare", tmp_path / "none.json"), "keysift: compare: a profile.json, got"),
    ):
        status, _, err = run("profile", model_folder, *SMALL, "--output-dir", tmp_path / "out", *arguments)
        assert status == 2
        assert words in err.splitlines()[-1]
        assert not (tmp_path / "out").exists()
