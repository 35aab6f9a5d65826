"""`keysift load`: exit status, output and files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ..conftest import Run, Running


def test_a_load_is_printed_and_stored(run: Run, running: Running, tmp_path: Path) -> None:
    server = ("--address", running.address, "--num-prompts", "3", "--input-len", "40", "--output-len", "4")
    status, out, err = run("load", *server, "--strategy", "dense", "--output-dir", tmp_path, "--json")
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


def test_a_load_counts_the_requests_that_met_the_target_and_fails_without_any(
    run: Run, running: Running, tmp_path: Path
) -> None:
    server = ("--address", running.address, "--num-prompts", "2", "--output-len", "2", "--num-warmups", "0")
    good = ("--input-len", "40", "--goodput", "ttft:600000", "--output-dir", tmp_path / "good")
    status, out, err = run("load", *server, *good)
    assert status == 0, err
    assert "2 of 2 met ttft:600000" in out
    status, out, _ = run("load", *server, "--input-len", "40", "--strategy", "no", "--output-dir", tmp_path / "bad")
    assert status == 1
    assert "0 completed, 2 failed" in out


def test_a_load_of_single_tokens_has_no_tpot(run: Run, running: Running, tmp_path: Path) -> None:
    server = ("--address", running.address, "--num-prompts", "2", "--input-len", "40", "--output-len", "1")
    status, out, err = run("load", *server, "--output-dir", tmp_path)
    assert status == 0, err
    rows = {words[0]: words[1:] for line in out.splitlines() if len(words := line.replace("│", " ").split()) == 4}
    assert rows["TPOT"] == rows["ITL"] == ["-"] * 3
    assert "-" not in rows["TTFT"] + rows["E2EL"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Distribution of TTFT" in page
    assert "Distribution of ITL" not in page


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(
    run: Run, running: Running, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = run("load", running.address, "--output-dir", tmp_path / "file")
    assert status == 2
    assert "keysift: output_dir: a folder that can be written to, got" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "keysift: address: host:port of a running server, got none"),
        (("a:1", "--address", "b:1"), "keysift: address: either ADDRESS or --address, got both"),
        (("a:1", "--strategy", "dense", "--strategy", "sift"), "keysift: strategies: one at a time"),
    ],
    ids=["no address", "two addresses", "two strategies"],
)
def test_a_load_has_one_address_and_one_strategy(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    status, _, err = run("load", *arguments, "--output-dir", tmp_path / "out")
    assert status == 2
    assert problem in err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--runs", "--dtype", "--compare", "--batch-sizes"])
def test_a_load_takes_no_flags_of_an_engine(run: Run, tmp_path: Path, flag: str) -> None:
    status, out, err = run("load", "127.0.0.1:1", flag, "2", "--output-dir", tmp_path / "out")
    assert (status, out) == (2, "")
    assert re.search(rf"No such option:? .?{flag}\b", err)  # some versions of typer quote it
    assert not (tmp_path / "out").exists()


def test_options_of_the_strategy_follow_its_name(run: Run, running: Running, tmp_path: Path) -> None:
    small = ("--num-prompts", "2", "--input-lens", "40,50", "--output-len", "2", "--output-dir", tmp_path, "--json")
    strategy = ("--strategy", "streaming,streaming.sink=16", "--strategy-arg", "streaming.window=16")
    status, out, err = run("load", running.address, *small, *strategy)
    assert status == 0, err
    found = json.loads(out)
    assert found["settings"]["strategy"] == "streaming"
    assert found["settings"]["strategy_args"] == ["streaming.window=16", "streaming.sink=16"]
    assert found["load"]["input_lens"] == [40, 50]
    assert "streaming" in found["load"]["strategy"]


def test_an_address_of_the_environment(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYSIFT_ADDRESS", "127.0.0.1:1")
    status, _, err = run("load", "--output-dir", tmp_path / "out")
    assert status == 1
    assert "127.0.0.1:1" in err
