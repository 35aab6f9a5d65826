"""`keysift serve` as a process: signals and exit status."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keysift.engine import SamplingParams
from keysift.server.client import Client
from keysift.server.errors import Internal

PLAIN = "from keysift.server.commands.cli import main; main()"
BROKEN = """
from keysift.engine.engine import Engine
from keysift.server.commands.cli import main

def step(engine):
    if engine.has_work:
        raise RuntimeError("out of order")
    return []

Engine.step = step
main()
"""
SLOW = """
import time
from keysift.engine.engine import Engine
from keysift.server.commands.cli import main

step = Engine.step

def slow(engine):
    time.sleep(0.02)
    return step(engine)

Engine.step = slow
main()
"""


BUILDING = """
import sys
from functools import partial
import torch
from keysift.attention.strategies import retrieval
from keysift.kvcache.index import Graph
from keysift.kvcache.index.graph import build, graphs
from keysift.server.commands.cli import main

def endless(source, stopped):
    print("building", file=sys.stderr, flush=True)
    while not stopped():
        torch.randn(100_000).sort()  # comes back from C++ all the time, where the end of the interpreter would stop it
    raise build.Cancelled

retrieval.Graph, graphs.build = partial(Graph, lag=16), endless
sys.argv += ["--strategy", "dense+retrieval", "--strategy-arg", "index=graph", "--strategy-arg", "dense_below=0"]
main()
"""


@contextlib.contextmanager
def serving(script: str, model: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Process of a server that is ready, and its address."""
    command = [sys.executable, "-c", script, "serve", str(model)]
    own = {"KEYSIFT_PORT": "0", "KEYSIFT_KV_MEMORY": "8MiB"} | settings
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | own) as process:
        try:
            log = read_until(process, "ready")
            found = re.search(r"listening on (127\.0\.0\.1:\d+)", log)
            assert found, log
            yield process, found[1]
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


def rest(process: subprocess.Popen[str]) -> str:
    assert process.stderr
    return process.stderr.read()


def test_serve_answers_and_ends_by_sigterm(model_folder: Path) -> None:
    with serving(PLAIN, model_folder, KEYSIFT_API_KEY="sesame") as (process, address):
        with Client(address, api_key="sesame") as client:
            assert list(client.generate("hello"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_sigterm_ends_the_building_of_a_graph_first(model_folder: Path) -> None:
    with serving(BUILDING, model_folder) as (process, address):
        with Client(address) as client:
            assert list(client.generate("hello " * 100))
        read_until(process, "building")
        process.send_signal(signal.SIGTERM)
        log = rest(process)
        assert process.wait(20) == 0, log
        assert "terminate" not in log


def test_serve_ends_when_its_engine_fails(model_folder: Path) -> None:
    with serving(BROKEN, model_folder) as (process, address):
        with Client(address) as client, pytest.raises(Internal, match="RuntimeError"):
            list(client.generate("hello"))
        assert rest(process).splitlines()[-1].startswith("keysift: the engine has failed")
        assert process.wait(20) == 1


def test_a_second_signal_ends_the_drain(model_folder: Path) -> None:
    with serving(SLOW, model_folder) as (process, address), Client(address) as client:
        outputs = client.generate("hello", SamplingParams(max_new_tokens=1000, ignore_eos=True))
        next(outputs)
        process.send_signal(signal.SIGINT)
        read_until(process, "draining")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
        assert "Traceback" not in rest(process)
        outputs.close()  # type: ignore[attr-defined]
