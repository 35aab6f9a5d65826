"""`keysift serve` with tensor parallelism: two processes, which start and end together."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from keysift.engine import Finish
from keysift.server.client import Client
from tests.models import splits_odd_heads

from .test_serve import PLAIN, rest, serving

pytestmark = splits_odd_heads
PAIR = {"KEYSIFT_TENSOR_PARALLEL_SIZE": "2", "KEYSIFT_DTYPE": "float32"}


def test_serve_ends_when_its_follower_is_killed(model_folder: Path) -> None:
    with serving(PLAIN, model_folder, **PAIR) as (process, address):
        with Client(address) as client:
            assert isinstance(list(client.generate("hello"))[-1], Finish)
            assert (client.info().num_query_heads, client.info().num_kv_heads) == (4, 2)
        (follower,) = psutil.Process(process.pid).children()
        follower.kill()
        log = rest(process).splitlines()
        assert any("rank 1 of 2 has ended (exit status -9)" in line for line in log)
        assert log[-1].startswith("keysift: the engine has failed")
        assert process.wait(20) == 1


def test_a_signal_ends_both(model_folder: Path) -> None:
    with serving(PLAIN, model_folder, **PAIR) as (process, _):
        (follower,) = psutil.Process(process.pid).children()
        follower.send_signal(signal.SIGTERM)  # ignored: the leader ends its followers
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in rest(process)
        assert process.wait(20) == 0
        assert not follower.is_running()


def test_a_hanging_follower_is_ended_before_its_leader(model_folder: Path, tmp_path: Path) -> None:
    with serving(PLAIN, model_folder, TMPDIR=str(tmp_path), **PAIR) as (process, _):
        (follower,) = psutil.Process(process.pid).children()
        follower.suspend()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not follower.is_running()
    assert not list(tmp_path.glob("keysift-*"))


def test_a_killed_leader_leaves_no_process_and_no_file(model_folder: Path, tmp_path: Path) -> None:
    with serving(PLAIN, model_folder, TMPDIR=str(tmp_path), **PAIR) as (process, _):
        assert list(tmp_path.glob("keysift-*/rendezvous"))
        (follower,) = psutil.Process(process.pid).children()
        process.kill()
        assert "Traceback" not in rest(process)
        follower.wait(10)
    assert not list(tmp_path.glob("keysift-*"))
