"""`keysift calibrate`: measuring, storing, printing and deleting crossovers, and their effect on engines."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keysift.engine.calibration import crossover
from keysift.server.commands import cli

from ..conftest import Run


def faster(monkeypatch: pytest.MonkeyPatch, winners: dict[str, int]) -> None:
    """Patch the clock: a strategy takes half of dense's time from the chunk of this number on, others always.

    The model has two layers, both of which are measured in each chunk; chunks count from 0.
    """
    calls = iter(range(1000))

    def times(works: dict[str, object], device: torch.device) -> crossover.Times:
        chunk = next(calls) // 2
        return {name: 2.0 if name == "dense" or chunk < winners.get(name, 0) else 1.0 for name in works}

    monkeypatch.setattr(crossover, "side_by_side", times)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYSIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_engines_use_the_stored_crossover(
    run: Run, model_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch, {"sift": 1, "flexprefill": 9})
    file, setting = cache / "calibration.json", ("--prefill-chunk", "512", "--dtype", "float32")
    status, out, err = run("calibrate", model_folder, "--json", *setting)
    found = json.loads(out)
    assert (status, err) == (0, f"loading {model_folder.name}\n")
    assert (found["file"], found["not_stored"]) == (str(file), [])
    assert found["setting"]["prefill_chunk"] == 512
    sift, flexprefill = found["crossovers"]["sift"], found["crossovers"]["flexprefill"]
    assert [chunk["context"] for chunk in sift["chunks"]] == [512, 1024, 1536, 2048]
    assert (sift["wins_from"], sift["dense_below"], sift["told"]) == (1024, 724, "from 1,024")  # isqrt(512 * 1024 - 1)
    assert (flexprefill["dense_up_to"], flexprefill["dense_below"]) == (4096, 1449)  # over the root of 512 * 4096
    detail = _calibration(run)
    assert detail.startswith(f"{model_folder.name} on {found['setting']['device']} (")
    assert "chunks of 512: in tokens, " in detail
    assert "sift from 1,024" in detail
    assert "flexprefill not up to 2,048: dense up to 4,096" in detail
    assert detail.endswith(f"in {file}")
    _edit(file, '"dense_below": 724', '"dense_below": 100')
    answer = ("generate", model_folder, "--json", "--kv-memory", "8MiB", "--max-new-tokens", "1", "--prompt", "x" * 200)
    sift_prompt = (*answer, "--strategy", "sift")
    status, out, err = run(*sift_prompt, *setting)
    assert not json.loads(out)["sparsity"]["dense_fallback"]
    assert "sift.dense_below=100, as measured here" in err
    for other in (("--page-size", "32"), ("--strategy-arg", "sift.dense_below=300"), ("--strategy-arg", "sink=16")):
        status, out, err = run(*sift_prompt, *setting, *other)
        assert json.loads(out)["sparsity"]["dense_fallback"], other
        assert "measured" not in err
    _edit(file, '"threads": ', '"threads": 9')
    detail = _calibration(run)
    assert detail.startswith("none for this machine")
    assert detail.endswith(f"1 of another machine or version; stored in {file}")


def test_a_shorter_calibration_does_not_replace_a_longer_one(
    run: Run, model_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch, {"sift": 2})
    calibrate = ("calibrate", model_folder, "--prefill-chunk", "512")
    assert run(*calibrate)[0] == 0
    before = (cache / "calibration.json").read_text()
    found = json.loads(run(*calibrate, "--json", "--max-model-len", "1024")[1])
    assert found["crossovers"]["sift"]["told"] == "from 512"
    assert {"sift", "flexprefill"} <= set(found["not_stored"])
    assert "not stored, because an older one goes further" in run(*calibrate, "--max-model-len", "1024")[1]
    assert (cache / "calibration.json").read_text() == before
    assert json.loads(run("calibrate", "--forget", "--json")[1]) == {
        "file": str(cache / "calibration.json"),
        "deleted": True,
    }
    assert not (cache / "calibration.json").exists()
    assert run("calibrate", "--forget")[1] == f"nothing is stored in {cache / 'calibration.json'}\n"


def test_a_read_only_folder_fails_before_measuring(run: Run, cache: Path) -> None:
    cache.write_text("in the way")
    status, out, err = run("calibrate", "/no/such/model")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert str(cache / "calibration.json") in err


WRONG = {
    "number": ({"KEYSIFT_PAGE_SIZE": "many"}, "", "--page-size"),
    "choice": ({"KEYSIFT_DTYPE": "int3"}, "", "dtype"),
    "relation": ({"KEYSIFT_PREFILL_CHUNK": "65"}, "", "prefill_chunk"),
    "file": ({}, "page-size: many\n", "--page-size"),
    "key": ({}, "unknown_key: 1\n", "unknown_key"),
    "no file": ({"KEYSIFT_CONFIG": "/no/such/file"}, "", "/no/such/file"),
}


@pytest.mark.parametrize(("environment", "config", "named"), WRONG.values(), ids=WRONG.keys())
def test_bad_configuration_stops_a_calibration_but_not_doctor(
    run: Run,
    model_folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    config: str,
    named: str,
) -> None:
    cache.with_name("config.yaml").write_text(config)
    monkeypatch.setenv("KEYSIFT_CONFIG", str(cache.with_name("config.yaml")))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("doctor", "--json")[0] == 0
    status, out, err = run("calibrate", model_folder)
    assert (status, out) == (2, "")
    assert named in err


@pytest.mark.parametrize("arguments", [("./my-model",), ("--page-size", "32")], ids=["model", "flag"])
def test_forget_takes_no_field(run: Run, cache: Path, arguments: tuple[str, ...]) -> None:
    """All calibrations would go, of other models too."""
    cache.mkdir()
    (cache / "calibration.json").write_text("[]")
    status, out, err = run("calibrate", *arguments, "--forget")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("keysift: forget: deletes the calibrations of all models, got --forget and ")
    assert (cache / "calibration.json").exists()


def _calibration(run: Run) -> str:
    (detail,) = (
        check["detail"] for check in json.loads(run("doctor", "--json")[1])["checks"] if "calib" in check["name"]
    )
    return str(detail)


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_calibration_is_shown_as_a_table(
    run: Run, model_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 contexts on a narrow terminal: every number is there in full."""
    faster(monkeypatch, {"sift": 1, "flexprefill": 99})
    monkeypatch.setattr(cli, "main", functools.partial(_narrow, cli.main, monkeypatch))
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {model_folder}\nprefill-chunk: 64\nport: 50051\n")
    status, out, _ = run("calibrate", "--config", file)
    assert status == 0
    assert "…" not in out
    rows = re.findall(r"^ *([\d,]+)((?: +[\d.]+x)+)$", out, re.MULTILINE)
    assert [context for context, _ in rows] == [f"{64 * number:,}" for number in range(1, 33)]
    assert all(set(ratios.split()) == {"1.00x", "2.00x"} for _, ratios in rows)
    assert re.search(r"^sift +from 128 +dense_below=90 *$", out, re.MULTILINE), out
    assert re.search(r"^flexprefill +not up to 2,048: dense up to 4,096 +dense_below=512 *$", out, re.MULTILINE), out
    assert out.endswith(f"stored in {cache / 'calibration.json'}\n")
    assert run("calibrate", "/no/such/model")[0] == 2


def _narrow(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main()


def test_a_calibration_measures_time(run: Run, model_folder: Path, cache: Path) -> None:
    setting = ("--max-model-len", "512", "--prefill-chunk", "256")
    found = json.loads(run("calibrate", model_folder, "--json", *setting)[1])
    for each in found["crossovers"].values():
        assert len(each["chunks"]) == 2
        assert all(chunk["dense_ms"] > 0 and chunk["strategy_ms"] > 0 for chunk in each["chunks"])
    assert (cache / "calibration.json").exists()


def test_the_help_names_the_effect_of_a_calibration(run: Run) -> None:
    out = run("calibrate", "--help")[1]
    assert "The stored lengths change which prompts are sparse" in out
    assert "--strategy-arg NAME.dense_below=N" in out
    assert "--forget" in out
    assert "with this machine, model and engine flags uses" in out, "a paragraph flows across the docstring's line ends"
    assert out.index("--json") < out.index("─ Engine ─") < out.index("--page-size")
