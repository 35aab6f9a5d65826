"""Decode steps that are recorded once and replayed: a CUDA graph starts all kernels of a step with one call."""

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
"""strategy, step, tokens [T], last [B] -> next-token logits [B, V] fp32, and what was read."""

MOST = 64
"""Recorded steps that are kept; the one that was not used for longest goes first."""
USES = 3
"""A kind of step is recorded when it comes for this time: one that hardly comes is not worth it."""
LATER = 500
"""Steps of a kind that run kernel by kernel before it is tried again, where memory did not suffice to record it."""
COUNTED = 1024
"""Kinds of steps that are counted."""
LEAST_PAGES = 64

logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What steps must have in common to be replays of one."""

    strategy: Strategy
    room: PaddedShape


@dataclass(frozen=True, slots=True)
class Recorded:
    """A step over memory that stays where it is: whatever it takes from outside is kept here, or a graph reads on."""

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
    """Runs decode steps, padded to powers of two of rows and pages, by replaying one of their kind.

    Rows of nobody fill a step up; they read and write one frame that no sequence has. Pages that no row sees are
    passed over by every op, so padding changes no row's result.
    """

    def __init__(self, cache: PagedCache, compute: Compute, record: Record[tuple[Tensor, Telemetry]]) -> None:
        self._cache = cache
        self._compute = compute
        self._record = record
        self._recorded: OrderedDict[Kind, Recorded] = OrderedDict()
        self._uses: OrderedDict[Kind, int] = OrderedDict()
        self._refused: set[type[Strategy]] = set()
        self._moves = 0
        self._broken = False
        cache.recent.pin()

    def take(self, work: ForwardInput, last: Tensor) -> tuple[Tensor, Telemetry] | None:
        """As `Runner.compute`, but to be read before the next step; None where this step has to run kernel by kernel.

        So has any step but those of generated tokens, under a strategy that says that it can be replayed, while no
        index takes notes on the host and nobody watches where the time goes.
        """
        if not self._fits(work, last) or not self._often(kind := Kind(work.strategy, self._room(work))):
            return None
        step = self._cache.decode(work.spans, kind.room)
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

    def _room(self, work: ForwardInput) -> PaddedShape:
        """Powers of two, so that there are few kinds of steps."""
        pages = max(self._cache.spec.pages_for(span.stop) for span in work.spans)
        padded = max(_power_of_two(pages), LEAST_PAGES)
        return PaddedShape(_power_of_two(len(work.spans)), min(padded, self._cache.longest))

    def _fits(self, work: ForwardInput, last: Tensor) -> bool:
        return (
            work.phase is Phase.DECODE
            and work.strategy.replayable
            and type(work.strategy) not in self._refused
            and last.shape[0] == len(work.spans)
            and len({span.sequence for span in work.spans}) == len(work.spans)
            and isinstance(self._cache.tier, DeviceTier)
            and not self._cache.observed
            and not self._broken
        )

    def _often(self, kind: Kind) -> bool:
        """Count one more step of the kind; whether there were enough to record it."""
        self._uses[kind] = uses = self._uses.pop(kind, 0) + 1
        while len(self._uses) > COUNTED:
            self._uses.popitem(last=False)
        return uses >= USES

    def _find(self, kind: Kind, step: Step, tokens: Tensor) -> Recorded | None:
        """The recorded step of this kind, recorded now if there is none; None where that cannot be done."""
        self._forget_moved()
        if kind not in self._recorded:
            try:
                recorded = self._new(kind.strategy, step, tokens)
            except Exception as error:
                self._give_up(kind, error)
                return None
            self._forget_moved()
            self._recorded[kind] = recorded
            while len(self._recorded) > MOST:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(kind)
        return self._recorded[kind]

    def _forget_moved(self) -> None:
        """What tokens leave to the next may have got other memory; steps recorded before use the old one."""
        if self._moves != self._cache.recent.version:
            self._moves = self._cache.recent.version
            for kind in [kind for kind in self._recorded if kind.strategy.remembers]:
                del self._recorded[kind]

    def _give_up(self, kind: Kind, error: Exception) -> None:
        """A strategy that waits does so every time, memory may suffice later; after anything else nothing is sure."""
        if isinstance(error, WaitsForDevice):
            self._refused.add(type(kind.strategy))
            extent = f"steps under {kind.strategy.name} run kernel by kernel from now on"
        elif isinstance(error, torch.OutOfMemoryError):
            self._recorded.clear()
            self._uses[kind] = -LATER
            extent = "recorded steps were given up for want of memory"
        else:
            self._recorded.clear()
            self._broken = True
            extent = "steps run kernel by kernel from now on, recording one failed"
        logger.warning("cuda_graphs: %s: %s", extent, str(error))  # a log that keeps the error would keep its tensors

    def _new(self, strategy: Strategy, step: Step, tokens: Tensor) -> Recorded:
        last = torch.arange(step.num_rows, device=tokens.device)
        (logits, telemetry), replay = self._record(lambda: self._compute(strategy, step, tokens, last))
        return Recorded(step, tokens, last, logits, telemetry, replay)


def _power_of_two(number: int) -> int:
    """The least that is not less."""
    return 1 << (number - 1).bit_length()
