"""Failures of ranks: the reason is reported soon, and all ranks end."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch.distributed as dist
from torch import Tensor

from keysift.attention import Telemetry
from keysift.engine import Engine, EngineConfig, InvalidRequest, KeysiftError, Request
from keysift.engine.execution.forward import ForwardInput
from keysift.engine.parallel.group import Leader, _end
from keysift.engine.parallel.orders import Order
from keysift.engine.parallel.peers import Peer, RankFailed
from tests.engine.driver import drain, greedy, tokens
from tests.models import splits_odd_heads

SOON_S = 10.0


def build(folder: Path, kv_memory: int = 2**20) -> tuple[Engine, Leader]:
    config = {"strategy": "dense", "dtype": "float32", "prefill_chunk": 64, "kv_memory": kv_memory}
    engine = Engine(EngineConfig(model=str(folder), tensor_parallel_size=2, **config))
    assert isinstance(engine.group, Leader)
    return engine, engine.group


@splits_odd_heads
def test_a_process_that_is_killed_ends_the_engine(tiny_llama: Path) -> None:
    engine, leader = build(tiny_llama)
    failures: SimpleQueue[KeysiftError] = SimpleQueue()
    leader.watch(failures.put)
    engine.add(Request("a", tokens(200), greedy(20)))
    engine.step()
    begun = time.monotonic()
    leader._peers[0]._process.kill()
    with pytest.raises(RankFailed, match=r"rank 1 of 2 has ended .*exit status -9"):
        drain(engine)
    assert "rank 1 of 2 has ended (exit status -9)" in str(failures.get(timeout=SOON_S))
    with pytest.raises(RankFailed, match=r"rank 1 of 2"):
        engine.step()
    assert time.monotonic() - begun < SOON_S
    assert not dist.is_initialized()


@splits_odd_heads
def test_errors_while_loading_are_raised_by_the_leader(tiny_llama: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"kv_memory: at least one page = 2480 bytes, got 1000"):
        build(tiny_llama, kv_memory=1000)
    assert not dist.is_initialized()


@splits_odd_heads
def test_a_failure_of_a_follower_is_reported(
    tiny_llama: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, leader = build(tiny_llama)
    compute = engine.runner.compute

    def stray(work: ForwardInput, last: Tensor) -> tuple[Tensor, Telemetry]:
        leader._send(Order([("open", ())], 0, work, []))
        return compute(work, last)

    monkeypatch.setattr(engine.runner, "compute", stray)
    engine.add(Request("a", tokens(200), greedy(20)))
    begun = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 of 2 has failed: RuntimeError: \d+ pages are free here, 0 at"):
        engine.step()
    assert time.monotonic() - begun < SOON_S
    assert "Traceback" in capfd.readouterr().err


def test_many_that_hang_are_waited_for_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they have joined: ending three takes no longer than one."""
    monkeypatch.setattr("keysift.engine.parallel.group.GRACE_S", 1.0)
    peers = [Peer(rank, 4, tmp_path / "rendezvous") for rank in (1, 2, 3)]
    for peer in peers:
        peer._process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _end(peers, tmp_path)
    assert time.monotonic() - begun < 2.0
    assert [peer._process.returncode for peer in peers] == [-9, -9, -9]
