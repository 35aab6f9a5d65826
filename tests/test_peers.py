"""`benchmarks.peers`: requests to peers, and rows of those that fail. Peers here are small modules."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.lib import runs
from benchmarks.peers import __main__ as peers
from benchmarks.peers import side

OPTIONS = argparse.Namespace(new=3, runs=2)
GOOD = """
import sys
from side import options, serve
asked = options()
print("a library's own words", flush=True)
count = 0
def run():
    global count
    count += 1
    return [count + at * asked["step"] for at in range(asked["new"])], asked["prompt"][:asked["new"]]
serve(run, "made here")
"""
LLAMA_CPP = """
def llama_print_system_info():
    return b"made here"
class Llama:
    def __init__(self, **settings):
        self.tokens = []
    reset = __init__
    def eval(self, tokens):
        self.tokens += tokens
    def sample(self, temp):
        return len(self.tokens)
"""
BROKEN = "import sys\nprint('out of luck', file=sys.stderr)\nsys.exit(3)\n"


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two peers that run this Python: one that answers and one that breaks."""
    shutil.copy(side.__file__, tmp_path)
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "MODULES", {name: name for name in ("good", "broken")})
    monkeypatch.setattr(peers, "PEERS", dict.fromkeys(("good", "broken"), lambda plain, settings: settings))
    monkeypatch.setattr(peers, "environment", lambda name: Path(sys.executable))
    monkeypatch.setattr(peers, "prompt", lambda length: list(range(length)))
    monkeypatch.setattr(runs, "ATTEMPTS", 1)


@pytest.mark.usefixtures("sides")
def test_medians_leave_out_the_first_run() -> None:
    row = peers.measured("good step=0.25", 10, OPTIONS)
    assert row["ttft_s"] == 2.5  # of runs 2 and 3
    assert row["tpot_ms"] == pytest.approx(250)
    assert row["first_tokens"] == [0, 1, 2]
    assert row["about"] == "made here"


@pytest.mark.usefixtures("sides")
def test_peak_memory_is_the_peers_own() -> None:
    """This process has torch in its memory, a bare Python has not; what a process inherits would show here."""
    import psutil

    here = psutil.Process().memory_info().rss / 2**20
    assert 0 < peers.measured("good step=1", 10, OPTIONS)["peak_memory_mb"] < here / 3


@pytest.mark.usefixtures("sides")
def test_cpu_time_of_a_peer_is_not_of_others() -> None:
    with peers.Side("good", {"prompt": [1], "new": 1, "step": 1}) as peer:
        before = peer.cpu_seconds()
        sum(range(3_000_000))
        assert peer.cpu_seconds() > before


@pytest.mark.usefixtures("sides")
def test_a_broken_peer_is_named_and_the_rest_runs() -> None:
    rows = [peers.measured(name, 10, OPTIONS) for name in ("broken", "good step=1")]
    assert rows[0]["missing"] == "out of luck"
    assert "missing" not in rows[1]
    table = peers.table({"machine": {}, "new_tokens": 3, "rows": rows})
    assert table.row_count == 2
    assert "out of luck" in list(table.columns[2].cells)


@pytest.mark.usefixtures("sides")
def test_our_settings_do_not_reach_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.setenv("HOLIDAY", "1")
    assert "GOMP_SPINCOUNT" not in peers.plain_environment()
    assert peers.plain_environment()["HOLIDAY"] == "1"


def test_words_and_settings_of_a_side() -> None:
    plain, settings = peers.words("BF16 batch=2048 flash=false KV_CACHE_PRECISION=f16")
    assert plain == ["BF16"]
    assert settings == {"batch": 2048, "flash": False, "KV_CACHE_PRECISION": "f16"}


def test_an_environment_is_made_once_for_each_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def install(name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        made.append(peers.PACKAGES[name])

    monkeypatch.setattr(peers, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(peers, "install", install)
    for package in ("a==1", "a==1", "a==2"):
        monkeypatch.setattr(peers, "PACKAGES", {"a": package})
        assert peers.environment("a") == tmp_path / "peers" / "a" / "bin" / "python"
    assert made == ["a==1", "a==2"]


def test_a_failed_install_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def refuse(command: list[str], **_: Any) -> SimpleNamespace:
        calls.append(command)
        return SimpleNamespace(returncode=1, stderr="fetching\nERROR: no such version\n")

    monkeypatch.setattr(peers, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(peers, "_unmade", {})
    monkeypatch.setattr(venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(peers.subprocess, "run", refuse)
    rows = [peers.measured("openvino paged", length, OPTIONS) for length in (1, 2)]
    assert [row["missing"] for row in rows] == ["not installed: ERROR: no such version"] * 2
    assert len(calls) == 1
    assert "--no-cache-dir" in calls[0]


def test_ratios_are_against_the_best_peer() -> None:
    def row(side: str, ttft: float, tokens: list[int]) -> dict[str, Any]:
        numbers = {"ttft_s": ttft, "tpot_ms": 10.0, "peak_memory_mb": 100.0, "others_share": 0.0}
        return {"side": side, "prompt_tokens": 5, "first_tokens": tokens, **numbers}

    rows = [row("slow peer", 4, [1, 2, 3]), row("fast peer", 2, [1, 2, 4]), row("keysift dense", 1, [7])]
    rows.append({"side": "gone", "prompt_tokens": 5, "missing": "why"})
    cells = [peers.figures({"rows": rows}, row) for row in rows[:3]]
    assert [cell[1] for cell in cells] == ["2.00x", "1.00x", "0.50x"]
    assert [cell[-1] for cell in cells] == ["3", "2", "0"]


@pytest.mark.usefixtures("sides")
def test_an_answer_is_one_line_of_json() -> None:
    with peers.Side("good", {"prompt": [4, 5], "new": 2, "step": 1}) as peer:
        assert peer.once().tokens == [4, 5]
        assert json.loads(json.dumps(peer.last))["times"] == [1, 2]


def test_a_peers_module_imports_the_library_of_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    question = {"model": "a", "prompt": [7, 7, 7], "new": 2, "threads": 1, "batch": 4, "flash": False}
    command = [sys.executable, "-m", peers.MODULES["llama.cpp"]]
    environment = {**peers.plain_environment(), "PYTHONPATH": str(tmp_path)}
    lines = f"{json.dumps(question)}\nrun\n"
    done = subprocess.run(
        command, input=lines, cwd=peers.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    about, answer = map(json.loads, done.stdout.splitlines())
    assert about == {"about": "made here"}
    assert answer["tokens"] == [3, 4]
