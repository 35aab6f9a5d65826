"""A server process under attack: its address, what it holds, and what it must still say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from keysift.engine import SamplingParams, TokenOutput
from keysift.server.client import Client
from tests.models import llama, save
from tests.server.conftest import MAX_LEN, TEMPLATE

LISTENING, READY = re.compile(r"listening on \S+:(\d+)"), re.compile(r"ready: ")
GOLDEN = "The quick brown fox jumps over the lazy dog. " * 4


@dataclass(frozen=True)
class Holdings:
    """What a process holds at one time."""

    seconds: float
    rss: int
    fds: int
    threads: int


class Target:
    """`keysift serve` in a process of its own."""

    def __init__(self, model: Path, *flags: str, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "keysift.server", "serve", str(model), "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ, text=True)
        self._started = time.monotonic()
        self._port, self._ready = 0, threading.Event()
        assert self.process.stderr
        threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True).start()
        assert self._ready.wait(120), f"the server did not start: {log.read_text()}"
        self.golden = self.say_golden()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def say_golden(self) -> list[int]:
        """Tokens of a request that nothing may change."""
        params = SamplingParams(max_new_tokens=16, ignore_eos=True)
        with Client(self.address) as client:
            outputs = list(client.generate(GOLDEN, params, timeout=60))
        return [token for output in outputs if isinstance(output, TokenOutput) for token in output.token_ids]

    def free_pages(self) -> tuple[int, int]:
        """Free pages, and all of them, once nothing runs."""
        with Client(self.address) as client:
            for _ in range(100):
                load = client.server_info().load
                if not load.running and not load.waiting:
                    break
                time.sleep(0.1)
        return load.pages_free, load.pages_total

    def holdings(self) -> Holdings:
        process = psutil.Process(self.process.pid)
        with process.oneshot():
            rss, threads = process.memory_info().rss, process.num_threads()
        return Holdings(time.monotonic() - self._started, rss, process.num_fds(), threads)

    def stop(self) -> int:
        """Exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def _read(self, stderr: IO[str]) -> None:
        with self.log.open("w") as log:
            for line in stderr:
                log.write(line)
                log.flush()
                if found := LISTENING.search(line):
                    self._port = int(found[1])
                if READY.search(line):
                    self._ready.set()


def start(folder: Path, *flags: str, offload: bool = False) -> Target:
    """A server of a tiny model whose answers depend on every token."""
    model = save(llama(max_position_embeddings=MAX_LEN, initializer_range=0.5), folder / "model", TEMPLATE)
    tier = ["--kv-offload", str(folder), "--kv-memory", "2MiB"] if offload else ["--kv-memory", "16MiB"]
    return Target(model, "--prefill-chunk", "64", *tier, *flags, log=folder / "server.log")


class Probe:
    """Another process that asks for health all the time, so that this one's work does not count as latency."""

    PROGRAM = """
import sys, time, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(sys.argv[1]))
while True:
    start = time.perf_counter()
    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
    print(f"{1e3 * (time.perf_counter() - start):.2f}", int(reply.status), flush=True)
    time.sleep(0.02)
"""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, address], stdout=subprocess.PIPE, text=True
        )

    def stop(self) -> tuple[list[float], bool]:
        """Latencies in milliseconds, without the first, which connects; and whether all said SERVING."""
        self._process.terminate()
        out, _ = self._process.communicate(timeout=30)
        rows = [line.split() for line in out.splitlines() if len(line.split()) == 2][1:]
        return [float(row[0]) for row in rows], all(row[1] == "1" for row in rows)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0
