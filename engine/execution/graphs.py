"""Replay of recorded decode steps: a CUDA graph launches all kernels of a step with one call."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keysift.attention import Strategy, Telemetry
from keysift.kvcache import DeviceTier, PaddedShape, PagedCache, Phase, Step

from .forward import ForwardInput
from .recorder import Record, WaitsForDevice

Compute = Callable[[Strategy, Step, Tensor, Tensor], tuple[Tensor, Telemetry]]
"""strategy, step, tokens [T], last [B] -> next-token logits [B, V] fp32, and telemetry."""

MAX_RECORDED = 64
"""Recorded steps that are kept; the least recently used one is dropped first."""
MIN_USES = 3
"""Steps of a kind until it is recorded: a rare one is not worth it."""
RETRY_AFTER = 500
"""Steps of a kind until it is tried again after memory did not suffice to record it."""
MAX_COUNTED = 1024
"""Kinds of steps whose uses are counted."""
MIN_PAGES = 64

logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """Properties that steps share with the recorded step that replays them."""

    strategy: Strategy
    shape: PaddedShape


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded step and all tensors that it reads from outside, which must stay where they are."""

    step: Step
    tokens: Tensor
    """[R]"""
    last: Tensor
    """[R]"""
    logits: Tensor
    """[R, V] fp32"""
    telemetry: Telemetry
    replay: Callable[[], None]


class Graphs:
    """Runs decode steps, padded to powers of two of rows and pages, by replaying a recorded step of their kind.

    Padding rows read and write one frame that no sequence owns. Every op skips pages that no row sees, so padding
    changes no row's result.
    """

    def __init__(self, cache: PagedCache, compute: Compute, record: Record[tuple[Tensor, Telemetry]]) -> None:
        self._cache = cache
        self._compute = compute
        self._record = record
        self._recorded: OrderedDict[Kind, Recorded] = OrderedDict()
        self._uses: OrderedDict[Kind, int] = OrderedDict()
        self._refused: set[type[Strategy]] = set()
        self._history_version = 0
        self._broken = False
        cache.recent.pin()

    def take(self, work: ForwardInput, last: Tensor) -> tuple[Tensor, Telemetry] | None:
        """As `Runner.compute`, but valid until the next step only; None: this step has to run kernel by kernel.

        Only decode steps are replayed, under a strategy that is `replayable`, while no tracer wraps the tier, of
        sequences that no index observes on the host.
        """
        if not self._fits(work, last) or not self._used_enough(kind := Kind(work.strategy, self._padded_shape(work))):
            return None
        step = self._cache.decode(work.spans, kind.shape)
        tokens = torch.tensor(work.tokens + [0] * step.num_padding_rows, device=self._cache.device)
        with torch.inference_mode():
            recorded = self._find(kind, step, tokens)
            if recorded is None:
                return None
            recorded.step.copy_(step)
            recorded.tokens.copy_(tokens)
            recorded.replay()
            rows = len(work.spans)
            return recorded.logits[:rows].clone(), recorded.telemetry.head(rows)

    def _padded_shape(self, work: ForwardInput) -> PaddedShape:
        """Rows and pages of the padded step: powers of two, so that there are few kinds of steps."""
        pages = max(self._cache.spec.pages_for(span.stop) for span in work.spans)
        padded = max(_power_of_two(pages), MIN_PAGES)
        return PaddedShape(_power_of_two(len(work.spans)), min(padded, self._cache.longest))

    def _fits(self, work: ForwardInput, last: Tensor) -> bool:
        return (
            work.phase is Phase.DECODE
            and work.strategy.replayable
            and type(work.strategy) not in self._refused
            and last.shape[0] == len(work.spans)
            and len({span.sequence for span in work.spans}) == len(work.spans)
            and isinstance(self._cache.tier, DeviceTier)
            and not self._cache.indexes.observes(work.spans)
            and not self._broken
        )

    def _used_enough(self, kind: Kind) -> bool:
        """Count one more step of the kind. Returns True from `MIN_USES` on."""
        self._uses[kind] = uses = self._uses.pop(kind, 0) + 1
        while len(self._uses) > MAX_COUNTED:
            self._uses.popitem(last=False)
        return uses >= MIN_USES

    def _find(self, kind: Kind, step: Step, tokens: Tensor) -> Recorded | None:
        """The recorded step of this kind, recorded now if necessary; None where recording fails."""
        self._drop_outdated()
        if kind not in self._recorded:
            try:
                recorded = self._new(kind.strategy, step, tokens)
            except Exception as error:
                self._give_up(kind, error)
                return None
            self._drop_outdated()
            self._recorded[kind] = recorded
            while len(self._recorded) > MAX_RECORDED:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(kind)
        return self._recorded[kind]

    def _drop_outdated(self) -> None:
        """Drop steps recorded before the decode history moved to other memory: they use the old one."""
        if self._history_version != self._cache.recent.version:
            self._history_version = self._cache.recent.version
            for kind in [kind for kind in self._recorded if kind.strategy.remembers]:
                del self._recorded[kind]

    def _give_up(self, kind: Kind, error: Exception) -> None:
        """Log a failed recording and limit further ones.

        A strategy that waits does so every time, so it is not recorded again; memory may suffice later; after any other
        error nothing is recorded any more.
        """
        if isinstance(error, WaitsForDevice):
            self._refused.add(type(kind.strategy))
            extent = f"steps under {kind.strategy.name} run kernel by kernel from now on"
        elif isinstance(error, torch.OutOfMemoryError):
            self._recorded.clear()
            self._uses[kind] = -RETRY_AFTER
            extent = "recorded steps were dropped, as memory ran out"
        else:
            self._recorded.clear()
            self._broken = True
            extent = "steps run kernel by kernel from now on, recording one failed"
        logger.warning("cuda_graphs: %s: %s", extent, str(error))  # not the error itself, which keeps its tensors alive

    def _new(self, strategy: Strategy, step: Step, tokens: Tensor) -> Recorded:
        last = torch.arange(step.num_rows, device=tokens.device)
        (logits, telemetry), replay = self._record(lambda: self._compute(strategy, step, tokens, last))
        return Recorded(step, tokens, last, logits, telemetry, replay)


def _power_of_two(number: int) -> int:
    """Smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
