"""`keysift profile`, called the way people call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keysift.engine.measure.profiling.report import write_report
from keysift.server.commands.profile import show
from tests.engine.measure.reports.document import Document
from tests.engine.measure.reports.results import profile

from ..conftest import Run, Running

SMALL = ("--output-len", "4", "--runs", "1", "--attempts", "1", "--warmup", "0", "--prefill-chunk", "64")


def test_a_profile_is_printed_kept_and_compared(run: Run, model_folder: Path, tmp_path: Path) -> None:
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


def test_the_terminal_and_the_page_tell_the_same_medians(
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


def test_a_running_server_is_put_under_load(run: Run, running: Running, tmp_path: Path) -> None:
    server = ("--address", running.address, "--num-prompts", "3", "--input-len", "40", "--output-len", "4")
    status, out, err = run("profile", *server, "--strategy", "dense", "--output-dir", tmp_path, "--json")
    assert status == 0, err
    found = json.loads(out)["load"]
    assert found["completed"] == 3
    assert found["input_lens"] == [40] * 3
    assert found["output_lens"] == [4] * 3
    assert found["strategy"] == "dense"
    assert found["mean_ttft_ms"] > 0
    assert json.loads((tmp_path / "profile.json").read_text())["load"] == found
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    whole = json.loads(out)
    assert whole["settings"]["input_lens"] == [40]
    assert whole["settings"]["request_rate"] == "inf"
    assert "api_key" not in whole["settings"]
    assert whole["environment"]["keysift"]
    assert whole["model"]["name"] == found["model_id"]


def test_a_load_says_who_met_the_target_and_fails_if_nobody_came_back(
    run: Run, running: Running, tmp_path: Path
) -> None:
    server = ("--address", running.address, "--num-prompts", "2", "--output-len", "2", "--num-warmups", "0")
    good = ("--input-len", "40", "--goodput", "ttft:600000", "--output-dir", tmp_path / "good")
    status, out, err = run("profile", *server, *good)
    assert status == 0, err
    assert "2 of 2 met ttft:600000" in out
    status, out, _ = run("profile", *server, "--input-len", "40", "--strategy", "no", "--output-dir", tmp_path / "bad")
    assert status == 1
    assert "0 completed, 2 failed" in out


def test_a_load_may_have_answers_of_one_token(run: Run, running: Running, tmp_path: Path) -> None:
    server = ("--address", running.address, "--num-prompts", "2", "--input-len", "40", "--output-len", "1")
    status, out, err = run("profile", *server, "--output-dir", tmp_path)
    assert status == 0, err
    rows = {words[0]: words[1:] for line in out.splitlines() if len(words := line.replace("│", " ").split()) == 4}
    assert rows["TPOT"] == rows["ITL"] == ["-"] * 3
    assert "-" not in rows["TTFT"] + rows["E2EL"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Distribution of TTFT" in page
    assert "Distribution of ITL" not in page


def test_an_output_folder_that_cannot_be_is_told_before_the_work(
    run: Run, running: Running, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for arguments in ((model_folder, *SMALL, "--input-len", "40"), ("--address", running.address)):
        status, _, err = run("profile", *arguments, "--output-dir", tmp_path / "file")
        assert status == 2
        assert "keysift: output_dir: a folder that can be written to, got" in err.splitlines()[-1]


def test_a_load_is_nothing_to_compare_with(run: Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text('{"schema": "keysift.profile/1", "load": {}}')
    old = ("--compare", tmp_path / "load.json", "--output-dir", tmp_path / "out")
    for arguments, words in (
        ((model_folder, *SMALL), "keysift: compare: a profile.json of an engine, got"),
        (("--address", "127.0.0.1:1"), "keysift: compare: --compare is for an engine of this process"),
    ):
        status, _, err = run("profile", *arguments, *old)
        assert status == 2
        assert words in err.splitlines()[-1]


def test_flags_of_the_other_kind_of_profile_are_refused(run: Run, model_folder: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--address", "127.0.0.1:1", "--runs", "2"), "keysift: runs: --runs is for an engine of this process"),
        (("--address", "127.0.0.1:1", "--dtype", "float32"), "keysift: dtype: --dtype is for an engine"),
        ((model_folder, "--num-prompts", "2"), "keysift: num_prompts: --num-prompts is for a server at --address"),
        (
            ("--address", "127.0.0.1:1", "--strategy", "dense", "--strategy", "sift"),
            "keysift: strategies: one at a time",
        ),
    ):
        status, _, err = run("profile", *arguments, "--output-dir", tmp_path / "out")
        assert status == 2
        assert words in err.splitlines()[-1]
        assert not (tmp_path / "out").exists()
