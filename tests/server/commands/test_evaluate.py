"""`keysift eval`: exit status, output and files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ..conftest import Run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """File of questions that a random model does not answer."""
    lines = [{"prompt": "abc " * (20 + i), "answer": "x", "max_new_tokens": 4} for i in range(3)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_an_evaluation_is_printed_stored_and_not_repeated(
    run: Run, model_folder: Path, questions: Path, tmp_path: Path
) -> None:
    arguments = (
        "eval",
        model_folder,
        "--tasks",
        questions,
        "--strategy",
        "streaming,streaming.window=16",
        "--lengths",
        "64",
    )
    where = ("--no-chat", "--prefill-chunk", "64", "--output-dir", tmp_path / "out")
    status, out, err = run(*arguments, *where, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["finished"]
    assert {row["strategy"] for row in found["summary"]} == {"dense", "streaming,streaming.window=16"}
    assert {row["task"] for row in found["scores"]} == {"own"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert "<svg" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path / "out" / "results.json") in err

    status, out, err = run(*arguments, *where)
    assert status == 0, err
    assert "streaming,streaming.window=16" in out
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["samples"] == found["samples"]  # including the seconds, so no question ran again


def test_a_loss_above_max_loss_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from keysift.server.commands.evaluation import _verdict

    rows = [
        {"strategy": "dense", "length": None, "loss": 0.0},
        {"strategy": "sift", "length": 4096, "loss": 0.03},
    ]
    assert _verdict({"summary": rows}, None) == 0
    assert _verdict({"summary": rows}, 0.03) == 0
    assert _verdict({"summary": rows}, 0.02) == 1
    assert "max_loss: sift scores 0.030 below dense at 4096 tokens" in capsys.readouterr().err


def test_tasks_are_listed_without_a_model(run: Run) -> None:
    status, out, err = run("eval", "no-such-model", "--list-tasks", "--json")
    assert status == 0, err
    assert "niah_single_1" in json.loads(out)


@pytest.mark.parametrize("kind", [(), ("--lm-eval", "niah_single_1")], ids=["built-in", "lm-eval"])
def test_several_processes_are_refused_before_the_model_is_loaded(run: Run, kind: tuple[str, ...]) -> None:
    status, out, err = run("eval", "/no/such/model", "--tensor-parallel-size", "2", *kind)
    assert (status, out) == (2, "")
    limit = "1 for evaluation and calibration, as one process looks at all heads there"
    assert err == f"keysift: tensor_parallel_size: {limit}, got 2\n"


def test_without_the_harness_the_error_names_its_extra(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "keysift.engine.measure.lm_eval_model", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    arguments = ("--lm-eval", "niah_single_1", "--lengths", "64", "--output-dir", tmp_path / "out")
    status, out, err = run("eval", model_folder, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("keysift: lm-evaluation-harness is not installed (")
    assert err.endswith("): pip install 'keysift[lm-eval]'\n")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_one_line(run: Run, model_folder: Path, questions: Path, tmp_path: Path) -> None:
    small = ("--prefill-chunk", "64", "--output-dir", tmp_path / "out")
    for arguments, words in (
        (("--tasks", "niah_ate"), "keysift: tasks: niah_ate: unknown"),
        (("--tasks", "none", "--lengths", "100000"), "keysift: lengths: at most"),
        (("--lengths", "3"), "keysift: lengths"),
        (("--tasks", questions, "--lengths", "64", "--strategy", "sifft"), "did you mean 'sift'"),
        (("--tasks", tmp_path / "none.jsonl", "--lengths", "64"), "none.jsonl"),
        (("--samples", "0"), "keysift: samples: "),
    ):
        status, _, err = run("eval", model_folder, *small, *arguments)
        assert status == 2, err
        assert words in err.splitlines()[-1]
        assert not (tmp_path / "out" / "results.json").exists()
