"""`keysift profile`: exit status, output and files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from keysift.engine.measure.profiling.report import write_report
from keysift.server.commands.profiling import show
from tests.engine.measure.reports.document import Document
from tests.engine.measure.reports.results import profile

from ..conftest import Run

SMALL = ("--output-len", "4", "--runs", "1", "--attempts", "1", "--warmup", "0", "--prefill-chunk", "64")


def test_a_profile_is_printed_stored_and_compared(run: Run, model_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    lengths = ("--input-lens", "40,60", "--input-lens", "50", "--strategy", "dense")
    status, out, err = run("profile", model_folder, *SMALL, *lengths, "--output-dir", first, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [cell["input_len"] for cell in found["cells"]] == [40, 50, 60]
    assert json.loads((first / "profile.json").read_text()) == found
    assert "<svg" in (first / "report.html").read_text(encoding="utf-8")
    assert {file.name for file in first.iterdir()} == {"profile.json", "trace.json.gz", "report.html"}
    assert str(first / "trace.json.gz") in err

    old = ("--compare", first / "profile.json")
    status, out, err = run("profile", model_folder, *SMALL, "--input-len", "40", "--output-dir", second, *old)
    assert status == 0, err
    assert "<svg" in (second / "comparison.html").read_text(encoding="utf-8")
    assert "TTFT s" in out
    assert "selection" in out


def test_the_terminal_and_the_page_have_the_same_medians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = profile(("dense",), (1024,), (1,))
    (cell,) = found["cells"]
    cell |= {"ttft_ms": {"median": 5120.0, "min": 5000.0, "max": 6000.0}, "median_ttft_ms": 7300.0}
    cell |= {"tpot_ms": {"median": 41.5, "min": 40.0, "max": 42.0}, "median_tpot_ms": 63.7}
    monkeypatch.setenv("COLUMNS", "200")
    show(found)
    write_report(found, tmp_path / "report.html")
    terminal, page = capsys.readouterr().out, Document(tmp_path / "report.html").sections["cells"]
    assert "5.12 ±10%" in terminal
    assert "5.12 s" in page
    assert "41.5 ±2%" in terminal
    assert "41.5 ms" in page


def test_bad_arguments_are_one_line(run: Run, model_folder: Path, tmp_path: Path) -> None:
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


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(
    run: Run, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = run("profile", model_folder, *SMALL, "--input-len", "40", "--output-dir", tmp_path / "file")
    assert status == 2
    assert "keysift: output_dir: a folder that can be written to, got" in err.splitlines()[-1]


def test_a_profile_is_not_compared_with_a_load(run: Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text('{"schema": "keysift.profile/1", "load": {}}')
    old = ("--compare", tmp_path / "load.json", "--output-dir", tmp_path / "out")
    status, _, err = run("profile", model_folder, *SMALL, *old)
    assert status == 2
    assert "keysift: compare: a profile.json of an engine, got" in err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--num-prompts", "--request-rate", "--api-key", "--goodput"])
def test_a_profile_takes_no_flags_of_a_load(run: Run, model_folder: Path, tmp_path: Path, flag: str) -> None:
    status, out, err = run("profile", model_folder, flag, "2", "--output-dir", tmp_path / "out")
    assert (status, out) == (2, "")
    assert re.search(rf"No such option:? .?{flag}\b", err)  # some versions of typer quote it
    assert not (tmp_path / "out").exists()


def test_an_address_of_the_environment_makes_no_load(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load may have single tokens; the error is that of a profile in this process."""
    monkeypatch.setenv("KEYSIFT_ADDRESS", "127.0.0.1:1")
    status, _, err = run("profile", model_folder, "--output-len", "1", "--output-dir", tmp_path / "out")
    assert status == 2
    assert "keysift: output_len: " in err.splitlines()[-1]
