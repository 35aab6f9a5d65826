"""The bridge between event loop and engine: what arrives while a request changes hands."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from keysift.engine import Finish, FinishReason
from keysift.server.tenants import ANYONE
from keysift.server.threads import PreparationThreads
from keysift.server.worker import Worker


def idle_engine(added: list[object]) -> Any:
    """An engine that takes jobs and never runs one."""
    return SimpleNamespace(
        config=SimpleNamespace(strategy="dense", max_num_seqs=1, max_queue=1),
        model=SimpleNamespace(name="tiny"),
        group=SimpleNamespace(watch=lambda callback: None),
        has_work=False,
        close=lambda: None,
        add=added.append,
        abort=lambda request_id: True,
        step=list,
    )


def test_a_request_that_is_aborted_and_not_finished_yet_is_not_being_prepared() -> None:
    """The count is part of `load.waiting`, which must not be negative."""

    async def run() -> None:
        threads = PreparationThreads(2)
        worker = Worker(lambda: idle_engine([]), threads)
        worker.start()
        await worker.loaded
        job: Any = object()
        await worker.submit(worker.place(ANYONE), "r", 1, lambda engine: job)
        assert worker.preparing == 0
        assert worker.abort("r")
        assert worker.preparing == 0
        threads.close()
        await worker.close(10)

    asyncio.run(run())


@pytest.mark.parametrize("abort", [lambda worker: worker.abort("r"), Worker.abort_all], ids=["one", "all"])
def test_an_abort_after_the_preparation_and_before_the_engine_has_the_job(abort: Any) -> None:
    added: list[object] = []
    engine = idle_engine(added)

    async def run() -> None:
        threads = PreparationThreads(2)
        worker = Worker(lambda: engine, threads)
        worker.start()
        await worker.loaded
        job: Any = object()
        submitted = asyncio.ensure_future(worker.submit(worker.place(ANYONE), "r", 1, lambda engine: job))
        while not (task := worker._preparing.get("r")) or not task.done():
            await asyncio.sleep(0)
        abort(worker)
        [finish] = await (await submitted).take()
        assert isinstance(finish, Finish)
        assert finish.reason is FinishReason.CANCELLED
        threads.close()
        await worker.close(10)

    asyncio.run(run())
    assert added == []
