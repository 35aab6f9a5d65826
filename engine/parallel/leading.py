"""The leader's forward passes: the others run them too, and what they found counts as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from keysift.attention import Telemetry

from ..config import EngineConfig
from ..model import LoadedModel
from ..runner import Pass, Runner, StepResult
from ..sampler import SamplerState
from ..scheduler import Batch
from .orders import Order, RecordedCache
from .whole import whole

if TYPE_CHECKING:
    from .team import Leader


class LeadingRunner(Runner):
    """Has every other rank run what this one runs. Only this one samples, so that all have the same tokens."""

    def __init__(self, team: Leader, model: LoadedModel, cache: RecordedCache, config: EngineConfig) -> None:
        super().__init__(model, cache, config)
        self._team = team
        self._record = cache

    def run(self, batch: Batch, states: Sequence[SamplerState]) -> StepResult:
        """As for one process. Raises `RankFailed` where any rank could not do its part: then none can go on."""
        with self._team.together():
            own = super().run(batch, states)
            return whole([own, *self._team.results()])

    def compute(self, work: Pass, last: Tensor) -> tuple[Tensor, Telemetry]:
        self._team.order(Order(self._record.take_changes(), self._record.free_pages, work, last.tolist()))
        return super().compute(work, last)
