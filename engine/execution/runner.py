"""Forward passes: from a batch of host integers to sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import accumulate

import torch

from keysift.attention import Dense, DenseKernel, Spans, Strategy, Telemetry, bind, untraced
from keysift.attention.contiguous import obstacle
from keysift.kvcache import PagedCache, Phase, Span, Step, Traffic
from keysift.kvcache.ops import BackendUnavailable, use_backend

from ..config import EngineConfig
from ..errors import InvalidRequest
from ..model.loaded import LoadedModel
from ..scheduling.batch import Batch
from ..scheduling.failures import naming
from .forward import ForwardInput, StepResult
from .graphs import Graphs
from .recorder import Record
from .sampler import SamplerState, sample


def check_kernel(kernel: DenseKernel, cache: PagedCache) -> None:
    """Raises `InvalidRequest` where the dense kernel cannot run on this cache's device, dtype or head dim."""
    if (why := obstacle(kernel, cache.spec, cache.device)) is not None:
        raise InvalidRequest("dense_kernel", why)


class Runner:
    """Runs forward passes: binds strategy, cache and step into `attend` and passes it to the model."""

    def __init__(self, model: LoadedModel, cache: PagedCache, config: EngineConfig) -> None:
        self._model = model
        self._cache = cache
        self._backend = config.backend
        self._queries_per_row = config.queries_per_row
        self._dense_kernel = config.dense_kernel
        self.graphs: Graphs | None = None
        """Replay of recorded decode steps; None: not enabled."""
        self.spans: Spans = untraced
        """Tracing hooks for the parts of a step."""

    def record(self, record: Record[tuple[torch.Tensor, Telemetry]]) -> None:
        """Record decode steps with `record` from now on, and replay them where possible."""
        self.graphs = Graphs(self._cache, self.evaluate, record)

    def rehearse(self) -> None:
        """Run one token through one layer's cache and attention, to fail before the first request.

        Raises `InvalidRequest` where the backend or the dense kernel cannot run here.
        """
        check_kernel(self._dense_kernel, self._cache)
        sequence = self._cache.open()
        try:
            self._cache.reserve(sequence, 1)
            self._rehearse(Span(sequence, 0, 1))
        except BackendUnavailable as error:
            raise InvalidRequest("backend", f"{self._backend!r} cannot run here ({error})") from None
        finally:
            self._cache.release(sequence)

    def _rehearse(self, span: Span) -> None:
        attend = bind(Dense(), self._cache, self._cache.decode([span]))
        spec, heads = self._cache.spec, self._model.num_query_heads
        q = torch.zeros(1, heads, spec.head_dim, dtype=spec.dtype, device=self._model.devices[0])
        k = q[:, : spec.num_kv_heads]
        with torch.inference_mode(), use_backend(self._backend):
            attend(0, q, k, k)

    def run(self, batch: Batch, states: SequenceOf[SamplerState]) -> StepResult:
        """Run the batch and sample with one state for each of `batch.sampled`."""
        logits, result = self.attend(batch)
        with self.spans("sampling"), torch.inference_mode(), naming("sampling"):
            return replace(result, sampled=sample(logits, states))

    def attend(self, batch: Batch) -> tuple[torch.Tensor, StepResult]:
        """Next-token logits [B, V] fp32 of the sampled sequences, and the step's result without tokens."""
        before = self._cache.tier.traffic
        logits, telemetry = self.forward(batch, self._last(batch))
        return logits, self.result(telemetry, before)

    def result(self, telemetry: Telemetry, before: Traffic) -> StepResult:
        """Result of a step without its tokens, given the tier's traffic before it."""
        with naming("telemetry"):
            reads = telemetry.reads()
            moved = self._cache.tier.traffic - before
            return StepResult([], reads, telemetry.coverage(reads), moved, telemetry.locality())

    def forward(self, batch: Batch, last: torch.Tensor) -> tuple[torch.Tensor, Telemetry]:
        """Next-token logits [B, V] fp32 after the packed tokens at indices last [B], and the step's telemetry."""
        return self.compute(ForwardInput.of(batch), last)

    def compute(self, work: ForwardInput, last: torch.Tensor) -> tuple[torch.Tensor, Telemetry]:
        """As `forward`, for plain data."""
        if self.graphs is not None and (done := self.graphs.take(work, last)) is not None:
            return done
        tokens = torch.tensor(work.tokens, device=self._cache.device)
        return self.evaluate(work.strategy, self._step(work), tokens, last)

    def evaluate(
        self, strategy: Strategy, step: Step, tokens: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, Telemetry]:
        """As `forward`, for tokens [T] of a step."""
        telemetry = Telemetry(self._cache.spec, step)
        attend = bind(strategy, self._cache, step, telemetry, self.spans, dense_kernel=self._dense_kernel)
        with self.spans("linear"), torch.inference_mode(), use_backend(self._backend):
            return self._model.forward(tokens, step.positions, last, attend), telemetry

    def _step(self, work: ForwardInput) -> Step:
        if work.phase is Phase.PREFILL:
            return self._cache.prefill(work.spans[0], self._queries_per_row, work.tokens_left)
        return self._cache.decode(work.spans)

    def _last(self, batch: Batch) -> torch.Tensor:
        """[B'] int64, index of each sampled sequence's last token among the packed tokens."""
        ends = accumulate(span.length for span in batch.spans)
        pairs = zip(batch.sequences, batch.spans, ends, strict=True)
        last = [end - 1 for sequence, span, end in pairs if span.stop == len(sequence.tokens)]
        return torch.tensor(last, dtype=torch.int64, device=self._cache.device)
