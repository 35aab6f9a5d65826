"""A whole evaluation: what it scores, how it repeats, how it goes on, and what it writes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from keysift.attention import registry
from keysift.engine import Engine, EngineConfig, InvalidRequest
from keysift.engine.measure.evaluation.output import write_page, write_results
from keysift.engine.measure.evaluation.runner import Run
from keysift.engine.measure.evaluation.settings import Evaluation
from keysift.engine.measure.evaluation.tasks import make as make_sample
from keysift.engine.model.embedded import embedded
from tests.engine.driver import Make

TASKS = ("niah_eight", "passkey")
LENGTH = 640
WRONG = "wrong"
Evaluate = Callable[..., Run]


@pytest.fixture(autouse=True)
def _wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILT_IN, WRONG, "tests.engine.measure.evaluation.wrong:Wrong")


def quiet(*_: Any) -> None:
    pass


def evaluated(engine: Engine, folder: Path, **fields: Any) -> dict[str, Any]:
    run = Run.open(Evaluation(output_dir=folder, **fields), engine)
    run.go(quiet, quiet)
    return write_results(run)


@pytest.fixture(scope="module")
def embedded_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, WRONG, "tests.engine.measure.evaluation.wrong:Wrong")
        engine = Engine(EngineConfig(dtype="float32", kv_memory=2**28))
        fields = {"strategies": (WRONG, "sift+retrieval"), "tasks": TASKS, "lengths": (LENGTH,), "samples": 1}
        return evaluated(engine, tmp_path_factory.mktemp("embedded"), always_sparse=True, **fields)


def test_dense_scores_are_those_of_plain_transformers(embedded_results: dict[str, Any]) -> None:
    engine = Engine(EngineConfig(dtype="float32", kv_memory=2**28))
    model = AutoModelForCausalLM.from_pretrained(embedded(quiet), dtype=torch.float32)
    for task in TASKS:
        sample = make_sample(task, engine.tokenizer, LENGTH, 0, 0, True)
        row = next(r for r in embedded_results["samples"] if (r["task"], r["strategy"]) == (task, "dense"))
        prompt = torch.tensor([sample.prompt])
        with torch.inference_mode():
            said = model.generate(prompt, max_new_tokens=sample.max_new_tokens, do_sample=False)[
                0, len(sample.prompt) :
            ]
            logits = model(torch.tensor([[*sample.prompt, *sample.gold]])).logits[0, len(sample.prompt) - 1 : -1]
        text = engine.tokenizer.decode(said.tolist())
        assert row["score"] == sample.score(text)
        assert text.startswith(row["text"])  # which ends once all answers were said
        gold = logits.log_softmax(-1)[torch.arange(len(sample.gold)), torch.tensor(sample.gold)]
        assert row["answer_nll"] == pytest.approx(-float(gold.mean()), abs=1e-3)


def test_wrong_pages_are_ranked_last(embedded_results: dict[str, Any]) -> None:
    summary = [row for row in embedded_results["summary"] if row["length"] is None]
    assert [row["strategy"] for row in summary][-1] == WRONG
    by_name = {row["strategy"]: row for row in summary}
    assert by_name["dense"]["loss"] == 0
    assert by_name[WRONG]["loss"] > 0.5
    assert abs(by_name["sift+retrieval"]["loss"]) < 0.2
    assert embedded_results["scores"][0]["strategy"] == WRONG
    assert embedded_results["samples"][0]["strategy"] == WRONG
    kl = {(row["source"], row["phase"], row["strategy"]): row["kl_mean"] for row in embedded_results["agreement"]}
    for source in ("text", "tasks"):
        for phase in ("prefill", "decode"):
            assert kl[source, phase, "dense"] == 0
            assert kl[source, phase, WRONG] > 20 * kl[source, phase, "sift+retrieval"]
    covered = [row for row in embedded_results["agreement"] if row["strategy"] == WRONG and row["source"] == "text"]
    assert len(covered) == 2
    assert all(0 < row["coverage"] < 0.9 for row in covered)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    lines = [{"prompt": f"Question {i}: " + "abc " * (10 + i), "answer": "x", "max_new_tokens": 6} for i in range(9)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def own(questions: Path, **fields: Any) -> dict[str, Any]:
    return {"strategies": ("streaming",), "tasks": (str(questions),), "lengths": (64,), "chat": False, **fields}


def timeless(found: dict[str, Any]) -> str:
    """Everything but when, where and how long."""
    tables = {name: found[name] for name in ("scores", "summary", "agreement", "heads", "samples")}
    return json.dumps([[{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in tables.values()])


def test_a_seed_repeats_to_the_digit_and_a_killed_run_goes_on(make: Make, questions: Path, tmp_path: Path) -> None:
    engine = make()
    whole = evaluated(engine, tmp_path / "whole", **own(questions))
    assert whole["finished"]
    assert len(whole["samples"]) == 18
    settings = Evaluation(output_dir=tmp_path / "killed", **own(questions))
    run = Run.open(settings, engine)
    done: list[int] = []

    def stop(read: int, total: int, title: str) -> None:
        done.append(read)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.go(stop, quiet)
    part = write_results(run)
    assert not part["finished"]
    assert 0 < len(part["samples"]) < 18
    rest = evaluated(make(), tmp_path / "killed", **own(questions))
    assert rest["finished"]
    assert timeless(rest) == timeless(whole)


def test_a_page_is_written_of_what_there_is(make: Make, questions: Path, tmp_path: Path) -> None:
    engine = make()
    run = Run.open(Evaluation(output_dir=tmp_path / "out", **own(questions)), engine)
    write_page(run, write_results(run))  # nothing yet
    run.go(quiet, quiet)
    page = write_page(run, write_results(run)).read_text(encoding="utf-8")
    assert "streaming" in page
    assert "Question 3" in page


def test_results_are_written_without_being_held_as_text(make: Make, questions: Path, tmp_path: Path) -> None:
    run = Run.open(Evaluation(output_dir=tmp_path, **own(questions)), make())
    run.go(quiet, quiet)
    said = "x" * 10**6
    for rows in run.found.values():
        for row in rows:
            row["text"] = said
    tracemalloc.start()
    try:
        found = write_results(run)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "results.json").stat().st_size > len(found["samples"]) * len(said) > 2 * peak


def test_what_cannot_run_is_refused_before_it_takes_time(make: Make, tmp_path: Path) -> None:
    engine = make()
    for fields, words in (
        ({"lengths": (1024,)}, "lengths: at most 512 tokens"),
        ({"tasks": ("niah_ate",)}, "tasks: niah_ate: unknown; there are copy, cwe"),
        ({"strategies": ("sifft",)}, "did you mean 'sift'"),
        ({"strategies": ("sift,sift.treshold=1",)}, "sift.treshold: no such option"),
        (
            {"texts": (tmp_path / "none.txt",), "lengths": (512,), "tasks": ("none",), "samples": 1},
            "texts: readable text",
        ),
        ({"tasks": ("none.jsonl",)}, "none.jsonl"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            Run.open(
                Evaluation(**{"output_dir": tmp_path / "out", "lengths": (64,), "tasks": ("none",), **fields}), engine
            )
        assert not (tmp_path / "out").exists()
