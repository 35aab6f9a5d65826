"""What an evaluation is made from: nothing is mixed, doubled or dropped without a word, and what cannot fit is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, PreTrainedConfig

from keysift.engine import InvalidRequest, KeysiftError, ResourceExhausted
from keysift.engine.measure.evaluation import texts as texts_module
from keysift.engine.measure.evaluation.journal import NAME
from keysift.engine.measure.evaluation.output import write_page, write_results
from keysift.engine.measure.evaluation.runner import Run
from keysift.engine.measure.evaluation.settings import Evaluation
from keysift.engine.measure.evaluation.texts import texts
from tests.engine.driver import Make
from tests.models import llama

Question = dict[str, Any]


def quiet(*_: Any) -> None:
    pass


def write(path: Path, *questions: Question) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"answer": "x", "max_new_tokens": 4} | each) for each in questions))
    return str(path)


def settings(folder: Path, *tasks: str, **fields: Any) -> Evaluation:
    common = {"strategies": ("streaming",), "lengths": (64,), "chat": False, "output_dir": folder / "out"}
    return Evaluation(**common | {"tasks": tasks or ("none",)} | fields)


def evaluated(run: Run) -> dict[str, Any]:
    run.go(quiet, quiet)
    return write_results(run)


def test_a_file_that_changed_is_another_run(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    engine, asked = make(), settings(tmp_path, write(path, {"prompt": "abc"}))
    assert len(evaluated(Run.open(asked, engine))["samples"]) == 2
    write(path, {"prompt": "abd"})
    with pytest.raises(InvalidRequest, match=r"output_dir: .* holds another run \(files: "):
        Run.open(asked, engine)


def test_another_version_is_another_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = make(), settings(tmp_path, write(tmp_path / "own.jsonl", {"prompt": "abc"}))
    Run.open(asked, engine)
    Run.open(asked, engine)
    for name in ("keysift_version", "commit"):
        with monkeypatch.context() as patch:
            patch.setattr(f"keysift.engine.measure.evaluation.runner.{name}", lambda: "another")
            with pytest.raises(InvalidRequest, match="holds another run"):
                Run.open(asked, engine)


@pytest.mark.parametrize("names", [("a/q.jsonl", "b/q.jsonl"), ("passkey.jsonl", "passkey")])
def test_names_that_mean_two_things_are_refused(make: Make, tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        if name.endswith(".jsonl"):
            write(tmp_path / name, {"prompt": name})
    asked = tuple(str(tmp_path / name) if name.endswith(".jsonl") else name for name in names)
    with pytest.raises(InvalidRequest, match=r"tasks: files and tasks of different names, got '(q|passkey)' twice"):
        Run.open(settings(tmp_path, *asked), make())


def test_texts_of_one_name_are_refused(make: Make, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a/t.txt", "b/t.txt", "documentation")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("word " * 200)
    tokenizer = make().tokenizer
    for pair in (files[:2], files[2:]):
        with pytest.raises(InvalidRequest, match="texts: files of different names"):
            texts(pair, 100, tokenizer)
    assert [text.name for text in texts(files[:1], 100, tokenizer)] == ["documentation", "t.txt"]


def test_texts_of_ones_own_may_be_longer_than_the_documentation(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "documentation", lambda: "short")
    (tmp_path / "t.txt").write_text("word " * 200)
    assert [text.name for text in texts([tmp_path / "t.txt"], 100, make().tokenizer)] == ["t.txt"]
    with pytest.raises(InvalidRequest, match=r"documentation has \d tokens, .* is 100; name a longer text.*--no-agree"):
        texts([], 100, make().tokenizer)


def test_a_value_that_is_named_twice_counts_once(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"prompt": "abc"})
    asked = settings(tmp_path, f"copy,copy,{path}", path, lengths=("400", "400,400"), samples=1, agreement=False)
    assert len(Run.open(asked, make()).units) == 2


def test_fewer_samples_than_there_are_count_as_asked(make: Make, tmp_path: Path) -> None:
    engine, fields = make(), {"lengths": (400,), "agreement": False}
    more = evaluated(Run.open(settings(tmp_path, "copy", samples=3, **fields), engine))
    fewer = Run.open(settings(tmp_path, "copy", samples=1, **fields), engine)
    assert fewer.finished
    assert [len(found["samples"]) for found in (more, write_results(fewer))] == [6, 2]
    assert fewer.seconds > 0
    assert more["seconds"] > fewer.seconds


def test_an_answer_longer_than_what_may_be_said_needs_its_room(make: Make, tmp_path: Path) -> None:
    engine = make()
    long = {"prompt": "a" * 300, "answer": "b" * 250, "max_new_tokens": 3}
    with pytest.raises(InvalidRequest, match=r"300 tokens of prompt and 25\d for the answer are more than"):
        Run.open(settings(tmp_path, write(tmp_path / "long.jsonl", long)), engine)
    beside = write(tmp_path / "fits.jsonl", long | {"prompt": "a" * 230}, {"prompt": "a" * 500, "max_new_tokens": 3})
    assert evaluated(Run.open(settings(tmp_path, beside), engine))["finished"]


def test_questions_that_memory_does_not_hold_are_refused_at_once(make: Make, tmp_path: Path) -> None:
    engine = make(kv_memory=2**17)
    with pytest.raises(ResourceExhausted):
        Run.open(settings(tmp_path, write(tmp_path / "q.jsonl", {"prompt": "a" * 480})), engine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "tasks: a task, or lengths beyond 512 tokens"),
        ({"max_loss": 0.1, "tasks": ("none",)}, "max_loss: takes a task"),
        ({"texts": ("t.txt",)}, "lengths: one beyond 512 tokens, to follow texts"),
    ],
)
def test_a_run_that_would_tell_nothing_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("word")
    with pytest.raises(InvalidRequest, match=words):
        Run.open(settings(tmp_path, **fields), make())


def test_lengths_that_nobody_uses_are_not_checked(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"prompt": "abc"})
    Run.open(settings(tmp_path, path, lengths=(4096,), agreement=False), make())


def test_an_answer_of_one_token_tells_no_density_of_tokens(make: Make, tmp_path: Path) -> None:
    run = Run.open(settings(tmp_path, write(tmp_path / "own.jsonl", {"prompt": "abc", "max_new_tokens": 1})), make())
    found = evaluated(run)
    assert {row["decode_density"] for row in (*found["scores"], *found["samples"])} == {None}
    assert {row["density"] for row in found["agreement"] if row["phase"] == "decode"} == {1.0}  # of the right answer
    write_page(run, found)


def test_a_disk_that_is_full_is_told(make: Make, tmp_path: Path) -> None:
    run = Run.open(settings(tmp_path, write(tmp_path / "own.jsonl", {"prompt": "abc"})), make())
    journal = tmp_path / "out" / NAME
    journal.unlink()
    journal.mkdir()  # which nobody can append to, root neither
    with pytest.raises(KeysiftError, match=r"output_dir: cannot write .*journal"):
        run.go(quiet, quiet)


def test_layers_that_all_have_a_window_have_nothing_to_keep(
    make: Make, write_model: Callable[[PreTrainedConfig], Path], tmp_path: Path
) -> None:
    shape = {name: value for name, value in llama().to_dict().items() if name in SHAPE}
    mistral = write_model(MistralConfig(**shape, max_position_embeddings=1024, sliding_window=64))
    run = Run.open(settings(tmp_path, lengths=(544,)), make(model=str(mistral)))
    found = evaluated(run)
    along = [row for row in found["agreement"] if row["source"] == "text"]
    assert {row["kl_mean"] for row in along} == {0.0}
    assert {(row["coverage"], row["coverage_min"], row["density"]) for row in along} == {(None, None, None)}
    write_page(run, found)


SHAPE = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "initializer_range",
}
