"""`benchmarks.soak`: a run on a tiny model, and verdicts that can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import __main__ as program
from benchmarks.soak.load import Golden, Reading
from benchmarks.soak.memory import Sample
from benchmarks.soak.mix import ENDINGS, SIZES, Ending, orders, recipes
from benchmarks.soak.summary import summarise
from keysift.attention import known
from tests.models import llama, save

SECONDS = 600.0
SMALL = ("--lengths", "8", "32", "96", "--kv-memory", "1MiB", "--kv-pool", "1MiB", "--kv-offload-memory", "4MiB")


def test_it_runs_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(llama(), tmp_path / "model")
    out = tmp_path / "out"
    brief = ("--tiers", "offloaded", "--minutes", "0.07", "--clients", "3", "--sample", "0.2", "--golden", "0.3")
    places = ("--model", str(model), "--folder", str(tmp_path), "--output-dir", str(out))
    monkeypatch.setattr(program, "recipes", lambda: recipes()[::6])
    monkeypatch.setattr("sys.argv", ["soak", *brief, *SMALL, *places])
    status = program.main()
    found = json.loads((out / "soak.json").read_text())
    assert status == (not all(verdict["met"] for verdict in found["verdicts"]))
    met = {verdict["name"]: verdict["met"] for verdict in found["verdicts"]}
    assert met["errors"], found["errors"]
    assert met["golden request"], found["golden"]
    assert found["golden"]["asked"] > 4
    assert {row["server"] for row in found["endings"]} == {"offloaded"}
    assert all(sample["rss"] > 0 for samples in found["samples"].values() for sample in samples)
    assert "| offloaded " in (out / "soak.md").read_text()
    assert "golden request" in capsys.readouterr().out


def samples(growth: float = 0.0) -> list[Sample]:
    """Flat over the first half, then growing by this share; one peak, which must not count."""
    moments = [SECONDS * step / 120 for step in range(120)]
    flat = [Sample(at, 1000 * (1 + growth * max(2 * at / SECONDS - 1, 0)), 500.0, 12, 14) for at in moments]
    return [replace(one, rss=1200.0) if place == 100 else one for place, one in enumerate(flat)]


def readings(slower: float = 1.0) -> list[Reading]:
    """TTFT of 100 to 199 ms, in the last fifth so many times as long."""
    found = []
    for step in range(1000):
        ttft = (0.1 + step % 100 / 1000) * (slower if step >= 800 else 1)
        found.append(Reading("resident", "dense", SECONDS * step / 1000, "complete", ttft, 0.02))
    return found


FAULTS: dict[str, dict[str, Any]] = {
    "RSS": {"samples": samples(0.04)},
    "p99 of TTFT": {"readings": readings(1.3)},
    "errors": {"readings": [*readings(), Reading("resident", "dense", 1.0, "INTERNAL", error="a bug")]},
    "golden": {"golden": Golden("x", asked=9, differences=["dense: expected (1,), got (2,)"])},
}


def missed(**changes: Any) -> list[str]:
    found = {"samples": samples(0.01), "readings": readings(1.1), "golden": Golden("x", asked=9)} | changes
    report = summarise({"resident": found["samples"]}, found["readings"], found["golden"], SECONDS)
    return [verdict["name"] for verdict in report["verdicts"] if not verdict["met"]]


def test_a_steady_server_meets_every_criterion() -> None:
    assert missed() == []


@pytest.mark.parametrize("name", FAULTS)
def test_each_criterion_can_fail(name: str) -> None:
    (found,) = missed(**FAULTS[name])
    assert found.startswith(name)


def test_nothing_measured_meets_nothing() -> None:
    names = missed(samples=samples()[:2], readings=[], golden=Golden("x"))
    assert len(names) == 4


def test_every_stretch_has_the_same_mix() -> None:
    """Every strategy, also as the part of a pair, every size and every ending are drawn once per deck."""
    mix = recipes()
    assert {part for recipe in mix for part in recipe.strategy.split("+")} == set(known())
    drawn = [order for order, _ in zip(orders(mix, (8, 32, 96), 1.0, 0), range(2 * len(mix)), strict=False)]
    for half in (drawn[: len(mix)], drawn[len(mix) :]):
        assert sorted(str(order.recipe) for order in half) == sorted(map(str, mix))
    assert len(ENDINGS) == len(SIZES) == 20
    assert {order.ending for order in drawn[:20]} == set(Ending)
    again = orders(mix, (8, 32, 96), 1.0, 0)
    assert [next(again) for _ in range(5)] == drawn[:5]
