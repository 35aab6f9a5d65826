"""Decode steps that are recorded once and replayed: a CUDA graph starts all kernels of a step with one call."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from keysift.attention import Strategy, Telemetry
from keysift.kvcache import DeviceTier, PagedCache, Phase, Room, Step

from .config import EngineConfig
from .errors import InvalidRequest

if TYPE_CHECKING:
    from .runner import Pass

T = TypeVar("T")
Compute = Callable[[Strategy, Step, Tensor, Tensor], tuple[Tensor, Telemetry]]
"""strategy, step, tokens [T], last [B] -> next-token logits [B, V] fp32, and what was read."""
Record = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]
"""Runs some work; what it gave, and how to have the same kernels run again over the same memory."""

MOST = 64
"""Recorded steps that are kept; the one that was not used for longest goes first."""
LEAST_PAGES = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A step over memory that stays where it is."""

    step: Step
    tokens: Tensor
    """[R]"""
    logits: Tensor
    """[R, V] fp32"""
    telemetry: Telemetry
    replay: Callable[[], None]


class Graphs:
    """Runs decode steps, padded to powers of two of rows and pages, by replaying the first of their kind.

    Rows of nobody fill a step up; they read and write one frame that no sequence has. Pages that no row sees are
    passed over by every op, so padding changes no row's result.
    """

    def __init__(self, cache: PagedCache, compute: Compute, record: Record[tuple[Tensor, Telemetry]]) -> None:
        self._cache = cache
        self._compute = compute
        self._record = record
        self._recorded: OrderedDict[tuple[Strategy, Room], Recorded] = OrderedDict()
        self._broken = False

    def take(self, work: Pass, last: Tensor) -> tuple[Tensor, Telemetry] | None:
        """As `Runner.compute`, but to be read before the next step; None where this step has to run kernel by kernel.

        So has any step but those of generated tokens, under a strategy that says that it can be replayed, while no
        index takes notes on the host and nobody watches where the time goes.
        """
        if not self._fits(work, last):
            return None
        room = self._room(work)
        step = self._cache.decode(work.spans, room)
        tokens = torch.tensor(work.tokens + [0] * (room.rows - len(work.tokens)), device=self._cache.device)
        with torch.inference_mode():
            recorded = self._find(work.strategy, room, step, tokens)
            if recorded is None:
                return None
            recorded.step.become(step)
            recorded.tokens.copy_(tokens)
            recorded.replay()
            rows = len(work.spans)
            return recorded.logits[:rows].clone(), recorded.telemetry.head(rows)

    def _room(self, work: Pass) -> Room:
        """Powers of two, so that there are few kinds of steps."""
        pages = max(self._cache.spec.pages_for(span.stop) for span in work.spans)
        padded = max(_power_of_two(pages), LEAST_PAGES)
        return Room(_power_of_two(len(work.spans)), min(padded, self._cache.longest))

    def _fits(self, work: Pass, last: Tensor) -> bool:
        return (
            work.phase is Phase.DECODE
            and work.strategy.replayable
            and last.shape[0] == len(work.spans)
            and isinstance(self._cache.tier, DeviceTier)
            and not self._cache.observed
            and not self._broken
        )

    def _find(self, strategy: Strategy, room: Room, step: Step, tokens: Tensor) -> Recorded | None:
        """The recorded step of this kind, recorded now if there is none; None where that cannot be done."""
        if (key := (strategy, room)) not in self._recorded:
            try:
                self._recorded[key] = self._new(strategy, step, tokens)
            except Exception as error:
                self._broken = True
                self._recorded.clear()
                logger.warning("cuda_graphs: steps run kernel by kernel from now on, recording one failed: %s", error)
                return None
            while len(self._recorded) > MOST:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return self._recorded[key]

    def _new(self, strategy: Strategy, step: Step, tokens: Tensor) -> Recorded:
        last = torch.arange(step.num_rows, device=tokens.device)
        (logits, telemetry), replay = self._record(lambda: self._compute(strategy, step, tokens, last))
        return Recorded(step, tokens, logits, telemetry, replay)


def _power_of_two(number: int) -> int:
    """The least that is not less."""
    return 1 << (number - 1).bit_length()


class CudaRecorder:
    """Records work as CUDA graphs of one device, which share one pool of memory: no two of them run at once.

    A recording that fails may leave memory of its pool with the allocator until the process ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # libraries keep room for each

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Runs it once outside of the graph as well: kernels are compiled and libraries make their room there.

        Raises `RuntimeError` where the work cannot be recorded, or ran elsewhere than on the stream that is recorded.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)
            return self._capture(work)

    def _capture(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()), warnings.catch_warnings():  # a failure leaves its stream
            warnings.filterwarnings("error", message=".*graph is empty.*")
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        return result, graph.replay


def check(config: EngineConfig, device: torch.device) -> None:
    """Raises `InvalidRequest` where CUDA graphs are asked for and cannot be had."""
    if config.cuda_graphs and device.type != "cuda":
        raise InvalidRequest("cuda_graphs", f"false on {device.type}, as only a CUDA device has them, got true")
