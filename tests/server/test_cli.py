"""The command line, called the way people call it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keysift.engine import SamplingParams, TokenOutput
from keysift.server import cli
from keysift.server.client import Client

from .conftest import Running

Run = Callable[..., tuple[int, str, str]]
SPARSITY = "strategy prefill_density decode_density coverage dense_fallback kv_bytes_read kv_bytes_moved"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status, standard output and standard error of a command."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["keysift", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def generate(run: Run, model: Path, *arguments: str | Path) -> dict[str, Any]:
    tiny = ("--kv-memory", "8MiB", "--prefill-chunk", "64", "--max-new-tokens", "8")
    status, out, err = run("generate", model, "--json", *tiny, *arguments)
    assert status == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_json_is_what_scripts_expect(run: Run, model_folder: Path) -> None:
    answer = generate(run, model_folder, "--prompt", "Once upon a time")
    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "timings", "sparsity"}
    assert answer["usage"] == {"prompt_tokens": 16, "completion_tokens": len(answer["token_ids"]), "cached_tokens": 0}
    assert set(answer["timings"]) == {"queue_ms", "prefill_ms", "ttft_ms", "decode_ms", "tpot_ms"}
    assert set(answer["sparsity"]) == set(SPARSITY.split())
    assert answer["finish_reason"] in ("length", "stop")


def test_a_server_answers_the_same(run: Run, model_folder: Path, running: Running) -> None:
    here = generate(run, model_folder, "--prompt", "Once upon a time")
    there = generate(run, "tiny", "--prompt", "Once upon a time", "--address", running.address)  # type: ignore[arg-type]
    assert (there["text"], there["token_ids"]) == (here["text"], here["token_ids"])


def test_text_streams_to_standard_output(run: Run, running: Running, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("A document.")
    asked = ("--question", "Why?", "--chat", "--max-new-tokens", "8", "--address", running.address)
    status, out, err = run("generate", "--prompt-file", document, *asked)
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


BAD = {
    "unknown key": ("unknown_key: 1\n", (), "unknown_key"),
    "not a mapping": ("- 1\n", (), "list"),
    "no prompt": ("", (), "--prompt-file"),
    "bad field": ("", ("--prompt", "x", "--top-p", "7"), "top_p"),
    "bad bytes": ("", ("--prompt", "x", "--kv-memory", "many"), "kv_memory"),
    "bad strategy": ("", ("--prompt", "x", "--strategy", "nope"), "nope"),
    "no such file": ("", ("--prompt-file", "/no/such/file"), "/no/such/file"),
}


@pytest.mark.parametrize(("config", "arguments", "told"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_message(
    run: Run, model_folder: Path, tmp_path: Path, config: str, arguments: tuple[str, ...], told: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config)
    status, out, err = run("generate", model_folder, "--config", file, *arguments)
    assert (status, out) == (2, "")
    assert told in err
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


def test_doctor(run: Run) -> None:
    status, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert (status, report["usable"]) == (0, True)
    assert {"versions", "native library", "memory", "embedded model"} <= {check["name"] for check in report["checks"]}
    assert run("doctor")[0] == 0


@pytest.mark.parametrize("command", ["serve", "generate", "strategies", "doctor"])
def test_help_teaches_by_example(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"keysift {command}" in out
    assert command in run("--help")[1]


def test_serve_listens_answers_and_leaves(model_folder: Path) -> None:
    """A process of its own: signals and the exit status are part of the contract."""
    command = [sys.executable, "-c", "from keysift.server.cli import main; main()", "serve", str(model_folder)]
    settings = {"KEYSIFT_PORT": "0", "KEYSIFT_KV_MEMORY": "8MiB", "KEYSIFT_API_KEY": "sesame"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | settings) as process:
        try:
            log = read_until(process, "ready")
            found = re.search(r"listening on (127\.0\.0\.1:\d+)", log)
            assert found, log
            with Client(found[1], api_key="sesame") as client:
                assert list(client.generate("hello"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stderr
    log = ""
    for line in process.stderr:
        log += line
        if word in line:
            break
    return log
