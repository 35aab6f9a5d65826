"""Tests of examples/ on a tiny model: in this process, except the script that runs an event loop of its own."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keysift.attention import registry
from tests.models import llama, save
from tests.pages import undocumented

EXAMPLES = Path(__file__).parent.parent / "examples"
LINES = 40
Run = Callable[..., str]
COVERED = {"async_client", "offline", "own_evaluation", "own_strategy", "stream"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(llama(max_position_embeddings=4096, initializer_range=0.5), tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Standard output of an example, which runs as `__main__`."""

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--model", model, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_every_example_is_short_and_covered() -> None:
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == COVERED
    assert all(len(text.splitlines()) < LINES for text in scripts.values())


def test_offline(run: Run) -> None:
    assert "density: prompt 1.00, tokens 1.00" in run("offline", "--strategy", "dense")


def test_stream(run: Run) -> None:
    out = run("stream", "--prompt", "Once upon a time")
    assert "prompt tokens] Once upon a time" in out
    assert "tokens]" in out.splitlines()[-1]


def test_own_strategy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BUILT_IN", dict(registry.BUILT_IN))
    out = run("own_strategy")
    assert "dense: prompt density 1.00" in out
    assert "newest: prompt density 0." in out


def test_own_evaluation(run: Run, tmp_path: Path) -> None:
    """Fields of its results are all in docs/results-schema.md."""
    assert "dense: score" in run("own_evaluation", "--output-dir", str(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())
    tables = [found[name] for name in ("scores", "summary", "agreement", "samples")]
    assert not undocumented(
        {*found, *found["environment"], *found["model"], *(key for rows in tables for key in rows[0])}
    )


def test_async_client(model: str) -> None:
    command = [sys.executable, str(EXAMPLES / "async_client.py"), "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert [line.partition(":")[0] for line in sorted(done.stdout.splitlines())] == ["lakes", "mountains", "rivers"]
