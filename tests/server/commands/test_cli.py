"""The command line: `keysift generate`, configuration, errors and exit statuses."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from keysift.engine import Finish, FinishReason, SamplingParams, TokenOutput
from keysift.server.client import Client
from keysift.server.commands import cli, flags

from ..conftest import Run, Running

SPARSITY = (
    "strategy prefill_density decode_density coverage dense_fallback kv_bytes_read kv_bytes_moved coverage_min widened"
    " estimated dropped_bound kv_bytes_written decode_bytes_moved kv_hits kv_misses kv_overlap bound_exceeded"
)


def generate(run: Run, model: Path | str, *arguments: str | Path) -> dict[str, Any]:
    tiny = () if "--address" in arguments else ("--kv-memory", "8MiB", "--prefill-chunk", "64")
    status, out, err = run("generate", model, "--json", *tiny, "--max-new-tokens", "8", *arguments)
    assert status == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_the_fields_of_the_json_object(run: Run, model_folder: Path) -> None:
    answer = generate(run, model_folder, "--prompt", "Once upon a time")
    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "timings", "sparsity"}
    assert answer["usage"] == {"prompt_tokens": 16, "completion_tokens": len(answer["token_ids"]), "cached_tokens": 0}
    assert set(answer["timings"]) == {"queue_ms", "prefill_ms", "ttft_ms", "decode_ms", "tpot_ms"}
    assert set(answer["sparsity"]) == set(SPARSITY.split())
    assert answer["finish_reason"] in ("length", "stop")


def test_a_server_generates_the_same_tokens(run: Run, model_folder: Path, running: Running) -> None:
    here = generate(run, model_folder, "--prompt", "Once upon a time")
    there = generate(run, "tiny", "--prompt", "Once upon a time", "--address", running.address)
    assert (there["text"], there["token_ids"]) == (here["text"], here["token_ids"])


def test_text_streams_to_standard_output(run: Run, running: Running, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("A document.")
    arguments = ("--question", "Why?", "--chat", "--max-new-tokens", "8", "--address", running.address)
    status, out, err = run("generate", "--prompt-file", document, *arguments)
    assert (status, err) == (0, "")
    with Client(running.address) as client:
        turn = [{"role": "user", "content": "A document.\n\nWhy?"}]
        outputs = list(client.generate(turn, SamplingParams(max_new_tokens=8)))
    assert out == "".join(output.text for output in outputs if isinstance(output, TokenOutput)) + "\n"


def test_the_strategy_of_a_command(run: Run, model_folder: Path) -> None:
    fields = ("--strategy-arg", "streaming.sink=16", "--strategy-arg", "streaming.window=16")
    answer = generate(run, model_folder, "--prompt", "x" * 600, "--strategy", "streaming", *fields)
    assert "streaming" in answer["sparsity"]["strategy"]
    assert answer["sparsity"]["prefill_density"] < 0.5


def test_command_line_before_environment_before_file(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("strategy: streaming\nmax-new-tokens: 3\nchat: true\n")
    monkeypatch.setenv("KEYSIFT_MAX_NEW_TOKENS", "5")
    common = ("generate", model_folder, "--json", "--kv-memory", "8MiB", "--prompt", "x", "--config", file)
    from_file = json.loads(run(*common)[1])
    assert "streaming" in from_file["sparsity"]["strategy"]
    assert from_file["usage"]["prompt_tokens"] == len("user: x\nassistant:")
    assert from_file["usage"]["completion_tokens"] == 5
    given = json.loads(run(*common, "--max-new-tokens", "2", "--strategy", "dense")[1])
    assert given["usage"]["completion_tokens"] == 2
    assert given["sparsity"]["strategy"] == "dense"


@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_a_former_name_still_works(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The value of kv_home arrives in kv_offload, whose error names the folder."""
    nowhere, file = str(tmp_path / "nowhere"), tmp_path / "config.yaml"
    file.write_text(f"kv_home: {nowhere}\n" if way == "file" else "")
    if way == "variable":
        monkeypatch.setenv("KEYSIFT_KV_HOME", nowhere)
    former = ("--kv-home", nowhere) if way == "flag" else ()
    status, _, err = run("generate", model_folder, "--prompt", "x", "--config", file, *former)
    assert status == 2
    assert "kv_offload" in err
    assert nowhere in " ".join(err.split()) or "nowhere" in err


@pytest.mark.parametrize("key", ["strategy-arg", "strategy_arg", "strategy_args"])
def test_a_list_goes_by_either_name(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"strategy: streaming\n{key}: [streaming.sink=16, streaming.window=16]\nstop-string: no such\n")
    common = ("--prompt", "x" * 600, "--config", file)
    assert generate(run, model_folder, *common)["sparsity"]["prefill_density"] < 0.5
    file.write_text("strategy: streaming\n")
    monkeypatch.setenv(f"KEYSIFT_{key.replace('-', '_').upper()}", "streaming.sink=16 streaming.window=16")
    assert generate(run, model_folder, *common)["sparsity"]["prefill_density"] < 0.5


def test_a_stop_string_of_the_environment_keeps_its_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYSIFT_STOP_STRING", "the end")
    assert flags._from_environment("stop_string", "stop_strings") == ["the end"]
    assert flags._from_environment("strategy_arg", "strategy_args") == []


def test_one_file_for_every_command(run: Run, model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 50051\nmax_queue: 4\nstop-string: [a b, 5]\nkv-memory: 8MiB\nprompt: hello\n")
    status, _, err = run("generate", model_folder, "--config", file, "--max-new-tokens", "2")
    assert (status, err) == (0, f"loading {model_folder.name}\n")


def test_a_server_takes_no_flags_of_an_engine(run: Run, running: Running) -> None:
    status, out, err = run("generate", "--prompt", "x", "--address", running.address, "--page-size", "32")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--page-size" in err
    assert "--strategy-arg" in err


def test_sampling_without_a_seed_differs(run: Run, model_folder: Path) -> None:
    hot = ("--prompt", "x", "--temperature", "2", "--max-new-tokens", "20")
    assert generate(run, model_folder, *hot)["token_ids"] != generate(run, model_folder, *hot)["token_ids"]
    seeded = (*hot, "--seed", "7")
    assert generate(run, model_folder, *seeded)["token_ids"] == generate(run, model_folder, *seeded)["token_ids"]


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_cancelled_answer_is_a_failure(
    run: Run, running: Running, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]
) -> None:
    with Client(running.address) as client:
        (*_, last) = client.generate("x", SamplingParams(max_new_tokens=1))
    assert isinstance(last, Finish)
    cancelled = dataclasses.replace(last, reason=FinishReason.CANCELLED)
    monkeypatch.setattr(Client, "generate", lambda *_, **__: iter([cancelled]))
    status, _, err = run("generate", "--prompt", "x", "--address", running.address, *form)
    assert (status, err.count("\n")) == (1, 1)
    assert "cancelled" in err


def test_an_empty_key_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYSIFT_API_KEY", "")
    status, _, err = run("serve")
    assert (status, err.count("\n")) == (2, 1)
    assert "KEYSIFT_API_KEY" in err


def test_bytes_that_are_no_text(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "document"
    file.write_bytes(b"\xff\xfe")
    assert "prompt_file" in run("generate", "--prompt-file", file, "--address", "127.0.0.1:1")[2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8", errors="surrogateescape"))
    status, _, err = run("generate", "--prompt-file", "-", "--address", "127.0.0.1:1")
    assert (status, err.count("\n")) == (2, 1)
    assert "prompt_file" in err
    assert "keysift: prompt: " in run("generate", "--prompt", "a\udcff")[2]
    assert "keysift: question: " in run("generate", "--prompt", "a", "--question", "\udcff")[2]


BAD = {
    "unknown key": ("unknown_key: 1\n", (), "unknown_key"),
    "not a mapping": ("- 1\n", (), "list"),
    "no prompt": ("", (), "--prompt-file"),
    "bad field": ("", ("--prompt", "x", "--top-p", "7"), "top_p"),
    "bad bytes": ("", ("--prompt", "x", "--kv-memory", "many"), "kv_memory"),
    "bad strategy": ("", ("--prompt", "x", "--strategy", "nope"), "nope"),
    "no such file": ("", ("--prompt-file", "/no/such/file"), "/no/such/file"),
}


@pytest.mark.parametrize(("config", "arguments", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_message(
    run: Run, model_folder: Path, tmp_path: Path, config: str, arguments: tuple[str, ...], named: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config)
    status, out, err = run("generate", model_folder, "--config", file, *arguments)
    assert (status, out) == (2, "")
    assert named in err
    assert "Traceback" not in err


def test_no_such_model(run: Run) -> None:
    status, _, err = run("generate", "/no/such/model", "--prompt", "x")
    assert status == 2
    assert err.startswith("keysift: ")
    assert "/no/such/model" in err


def test_no_such_server(run: Run) -> None:
    status, _, err = run("generate", "--prompt", "x", "--address", "127.0.0.1:1")
    assert status == 1
    assert err.count("\n") == 1


def test_strategies(run: Run) -> None:
    listed = json.loads(run("strategies", "--json")[1])
    assert listed["streaming"]["fields"]["window"] > 0
    assert all(strategy["about"] for strategy in listed.values())
    assert "streaming.window" in run("strategies")[1]


EXAMPLES = {
    "serve": r"keysift serve \./my-model --strategy streaming --strategy-arg streaming\.window=4096",
    "generate": r"keysift generate --prompt-file report\.txt --question",
    "eval": r"keysift eval --strategy sift\+retrieval --strategy flexprefill\+quest",
    "profile": r"keysift profile \./my-model --batch-sizes 1,4 --runs 5 --compare keysift-profile/profile\.json",
    "load": r"keysift load localhost:50051 --request-rate 0\.5 --num-prompts 40 --goodput ttft:2000",
    "calibrate": r"keysift calibrate \./my-model --dtype bfloat16 --max-model-len 16384",
    "strategies": r"keysift strategies sift",
    "doctor": r"--json\s.*print one JSON object",
}


def test_every_command_has_an_example_to_look_for() -> None:
    assert set(EXAMPLES) == set(typer.main.get_group(cli.app).commands)


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_teaches_by_example(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "Example" in out
    assert re.search(EXAMPLES[command], out), out
    assert command in run("--help")[1]
