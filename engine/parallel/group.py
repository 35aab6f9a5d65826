"""Who runs the model: this process alone, or several with this one as their leader."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from keysift.attention import Telemetry
from keysift.kvcache import PagedCache

from .. import ranks as group
from ..config import EngineConfig
from ..devices import check_count, choose_device
from ..errors import KeysiftError
from ..execution.forward import ForwardInput, StepResult
from ..execution.recorder import CudaRecorder
from ..execution.runner import Runner
from ..execution.sampler import SamplerState
from ..model.loaded import LoadedModel
from ..model.shards import check_heads, splits_weights
from ..model.source import locate
from ..scheduling.scheduler import Batch
from ..support import Facts, check
from .merge import merge_ranks
from .orders import Order, RecordedCache
from .peers import GRACE_S, Peer, RankFailed

Report = Callable[[str], None]


class RankGroup:
    """This process alone."""

    cache_type: type[PagedCache] = PagedCache

    @contextmanager
    def failure_scope(self) -> Iterator[None]:
        """Around what all ranks do together: what goes wrong inside ends them all, and is told as `RankFailed`."""
        yield

    def runner(self, config: EngineConfig, model: LoadedModel, cache: PagedCache) -> Runner:
        runner = Runner(model, cache, config)
        if config.cuda_graphs:
            runner.record(CudaRecorder(cache.device))
        return runner

    def watch(self, hear: Callable[[KeysiftError], None]) -> None:
        """Has `hear` called, on some other thread, should a rank end while nobody asks it for anything."""

    def close(self) -> None:
        """End the other ranks."""


class Leader(RankGroup):
    """This process as rank 0, and the others, which it has started."""

    cache_type = RecordedCache

    def __init__(self, config: EngineConfig, device: str) -> None:
        """Starts the others, which begin to load the model, and meets them."""
        size, folder = config.tensor_parallel_size, Path(tempfile.mkdtemp(prefix="keysift-"))
        self._failure: KeysiftError | None = None
        self._pending = False
        self._peers: list[Peer] = []
        self._end = weakref.finalize(self, _end, self._peers, folder)
        with self.failure_scope():
            self._peers += [Peer(rank, size, folder / "meeting") for rank in range(1, size)]
            self._send((config, device))
            for peer in self._peers:
                peer.receive()  # it is there: whoever waits for it from here on will not wait in vain
            group.join(0, size, folder / "meeting", device)

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
        except BaseException:  # interrupted, maybe in the middle of an exchange with the others
            self._fail(RankFailed("rank 0 was interrupted"))
            raise

    def _fail(self, failure: KeysiftError) -> None:
        """Nothing can go on, and whoever waits in the middle of something would wait for ever."""
        self._failure = failure
        for peer in self._peers:
            peer.kill()
        self.close()

    def _poll_failure(self) -> RankFailed | None:
        """The first failure that a follower tells about, or shows by its end; a moment may pass until it does."""
        waits = (0.0, GRACE_S / len(self._peers)) if self._peers else ()
        found = (peer.poll_failure(wait_s) for wait_s in waits for peer in self._peers)
        return next((failure for failure in found if failure is not None), None)

    def runner(self, config: EngineConfig, model: LoadedModel, cache: PagedCache) -> Runner:
        assert isinstance(cache, RecordedCache)
        return LeadingRunner(self, model, cache, config)

    def watch(self, hear: Callable[[KeysiftError], None]) -> None:
        for peer in self._peers:
            peer.watch(hear)

    def dispatch(self, order: Order) -> None:
        """Have the others run a forward pass; this process must run it too."""
        self.results()
        self._send(order)
        self._pending = True

    def results(self) -> list[StepResult]:
        """What the others found in the last forward pass, if nobody has asked for that yet."""
        owed, self._pending = self._pending, False
        return [peer.receive() for peer in self._peers] if owed else []

    def _send(self, message: Any) -> None:
        for peer in self._peers:
            peer.send(message)

    def close(self) -> None:
        self._end()


class LeadingRunner(Runner):
    """Has every other rank run what this one runs. Only this one samples, so that all have the same tokens."""

    def __init__(self, group: Leader, model: LoadedModel, cache: RecordedCache, config: EngineConfig) -> None:
        super().__init__(model, cache, config)
        self._group = group
        self._record = cache

    def run(self, batch: Batch, states: Sequence[SamplerState]) -> StepResult:
        """As for one process. Raises `RankFailed` where any rank could not do its part: then none can go on."""
        with self._group.failure_scope():
            own = super().run(batch, states)
            return merge_ranks([own, *self._group.results()])

    def compute(self, work: ForwardInput, last: Tensor) -> tuple[Tensor, Telemetry]:
        self._group.dispatch(Order(self._record.take_changes(), self._record.free_pages, work, last.tolist()))
        return super().compute(work, last)


def _end(peers: list[Peer], folder: Path) -> None:
    for peer in peers:
        peer.request_stop()
    last = time.monotonic() + GRACE_S  # for all of them together: a server waits no longer for many than for one
    for peer in peers:
        peer.end(max(last - time.monotonic(), 0.0))
    group.leave()
    shutil.rmtree(folder, ignore_errors=True)


def assemble(config: EngineConfig, report: Report) -> RankGroup:
    """The team that `config` asks for. Raises `InvalidRequest` naming what several processes cannot have or do."""
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
        gpus=torch.cuda.device_count(),
        torch_distributed=dist.is_available(),
        splits_weights=splits_weights(),
        torchrun=int(os.environ.get("WORLD_SIZE", "1")) > 1,
        process_group=dist.is_available() and dist.is_initialized(),
    )
