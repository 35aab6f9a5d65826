"""Groups of ranks: a single process, or a leader that starts and drives followers."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from keysift.attention import Telemetry
from keysift.kvcache import PagedCache

from .. import ranks
from ..config import EngineConfig
from ..devices import check_count, choose_device
from ..errors import KeysiftError
from ..execution.forward import ForwardInput, StepResult
from ..execution.recorder import CudaRecorder
from ..execution.runner import Runner
from ..model.loaded import LoadedModel
from ..model.shards import check_heads, splits_weights
from ..model.source import locate
from ..scheduling.batch import Batch
from ..support import Facts, check
from .merge import merge_ranks
from .orders import Order, RecordedCache
from .peers import GRACE_S, Peer, RankFailed

Report = Callable[[str], None]


class RankGroup:
    """A single process, without followers."""

    cache_type: type[PagedCache] = PagedCache

    @contextmanager
    def failure_scope(self) -> Iterator[None]:
        """Scope of work that involves all ranks: an error inside ends them all and is raised as `RankFailed`."""
        yield

    def runner(self, config: EngineConfig, model: LoadedModel, cache: PagedCache) -> Runner:
        """The runner of forward passes on all ranks."""
        runner = Runner(model, cache, config)
        if config.cuda_graphs:
            runner.record(CudaRecorder(cache.device))
        return runner

    def watch(self, on_failure: Callable[[KeysiftError], None]) -> None:
        """Call `on_failure`, on another thread, if a rank ends outside of a forward pass."""

    def close(self) -> None:
        """End the other ranks."""


class Leader(RankGroup):
    """Rank 0, which starts the followers and drives them."""

    cache_type = RecordedCache

    def __init__(self, config: EngineConfig, device: str) -> None:
        """Start the followers, which begin to load the model, and join the process group with them."""
        size, folder = config.tensor_parallel_size, Path(tempfile.mkdtemp(prefix="keysift-"))
        self._failure: KeysiftError | None = None
        self._pending = False
        self._peers: list[Peer] = []
        self._end = weakref.finalize(self, _end, self._peers, folder)
        with self.failure_scope():
            self._peers += [Peer(rank, size, folder / "rendezvous") for rank in range(1, size)]
            self._send((config, device))
            for peer in self._peers:
                peer.receive()  # ready, so that joining does not wait for a rank that never started
            ranks.join(0, size, folder / "rendezvous", device)

    @contextmanager
    def failure_scope(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except KeysiftError as error:
            self._fail(error)
            raise
        except Exception as error:
            failure = self._poll_failure() or RankFailed(f"rank 0 has failed: {type(error).__name__}: {error}")
            self._fail(failure)
            raise failure from error
        except BaseException:  # interrupted, maybe while ranks exchange tensors
            self._fail(RankFailed("rank 0 was interrupted"))
            raise

    def _fail(self, failure: KeysiftError) -> None:
        """End all ranks: those inside of an exchange would wait for ever."""
        self._failure = failure
        for peer in self._peers:
            peer.kill()
        self.close()

    def _poll_failure(self) -> RankFailed | None:
        """First failure that a follower reports, or shows by its end, within a grace period."""
        waits = (0.0, GRACE_S / len(self._peers)) if self._peers else ()
        found = (peer.poll_failure(wait_s) for wait_s in waits for peer in self._peers)
        return next((failure for failure in found if failure is not None), None)

    def runner(self, config: EngineConfig, model: LoadedModel, cache: PagedCache) -> Runner:
        assert isinstance(cache, RecordedCache)
        return LeadingRunner(self, model, cache, config)

    def watch(self, on_failure: Callable[[KeysiftError], None]) -> None:
        for peer in self._peers:
            peer.watch(on_failure)

    def dispatch(self, order: Order) -> None:
        """Send a forward pass to all followers; this process must run it too."""
        self.results()
        self._send(order)
        self._pending = True

    def results(self) -> list[StepResult]:
        """Results of the followers' last forward pass; empty if they were taken before."""
        pending, self._pending = self._pending, False
        return [peer.receive() for peer in self._peers] if pending else []

    def _send(self, message: Any) -> None:
        for peer in self._peers:
            peer.send(message)

    def close(self) -> None:
        self._end()


class LeadingRunner(Runner):
    """Runner whose forward passes run on all ranks. Only the leader samples, so that all have the same tokens."""

    def __init__(self, group: Leader, model: LoadedModel, cache: RecordedCache, config: EngineConfig) -> None:
        super().__init__(model, cache, config)
        self._group = group
        self._record = cache

    def attend(self, batch: Batch) -> tuple[Tensor, StepResult]:
        """As `Runner.attend`. Raises `RankFailed` if any rank fails, which ends them all."""
        with self._group.failure_scope():
            logits, own = super().attend(batch)
            return logits, merge_ranks([own, *self._group.results()])

    def compute(self, work: ForwardInput, last: Tensor) -> tuple[Tensor, Telemetry]:
        self._group.dispatch(Order(self._record.take_changes(), self._record.free_pages, work, last.tolist()))
        return super().compute(work, last)


def _end(peers: list[Peer], folder: Path) -> None:
    """End the followers, leave the process group and remove its folder."""
    for peer in peers:
        peer.request_stop()
    deadline = time.monotonic() + GRACE_S  # of all together: many take no longer to end than one
    for peer in peers:
        peer.end(max(deadline - time.monotonic(), 0.0))
    ranks.leave()
    shutil.rmtree(folder, ignore_errors=True)


def assemble(config: EngineConfig, report: Report) -> RankGroup:
    """The group of ranks that `config` names. Raises `InvalidRequest` naming what several processes cannot have."""
    if config.tensor_parallel_size == 1:
        return RankGroup()
    device = choose_device(config.device)
    check_count(device, config.tensor_parallel_size)
    check_heads(config, locate(config.model, report))
    check(config, _facts(device))
    report(f"starting {config.tensor_parallel_size - 1} more processes, as tensor_parallel_size asks")
    return Leader(config, device.type)


def _facts(device: torch.device) -> Facts:
    """Facts that decide whether this process can start ranks on devices of this kind."""
    return Facts(
        runs_on=device,
        gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,  # a driver may count what torch cannot use
        torch_distributed=dist.is_available(),
        splits_weights=splits_weights(),
        torchrun=int(os.environ.get("WORLD_SIZE", "1")) > 1,
        process_group=dist.is_available() and dist.is_initialized(),
    )
