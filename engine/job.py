"""Live request: its sequence, sampler state and text."""

from __future__ import annotations

from dataclasses import dataclass

from . import metrics
from .execution.sampler import Sampled, SamplerState
from .request import Finish, FinishReason, Output, TokenOutput
from .scheduling.failures import Failure, naming
from .scheduling.sequence import Sequence
from .text.transcript import Transcript


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Parts of one request, and the outputs made of them."""

    sequence: Sequence
    sampler: SamplerState
    transcript: Transcript

    @property
    def request_id(self) -> str:
        return self.sequence.request.request_id

    def push(self, choice: Sampled) -> tuple[TokenOutput, FinishReason | None]:
        """Append a sampled token. Returns its output and the reason that the request ends with it, if it does."""
        token, logprobs = choice
        self.sampler.generated.append(token)
        with naming("detokenising"):
            text = self.transcript.push(token)
            reason = FinishReason.STOP if self.transcript.matched is not None else None
            if reason is None and self.sequence.num_generated >= self.sequence.max_new_tokens:
                text += self.transcript.flush()
                reason = FinishReason.LENGTH if self.transcript.matched is None else FinishReason.STOP
        return TokenOutput(self.request_id, text, (token,), (logprobs,) if logprobs else ()), reason

    def finish(self, reason: FinishReason, failure: Failure | None = None) -> Finish:
        """The request's last output, counted in the metrics."""
        sequence = self.sequence
        finish = Finish(
            self.request_id,
            reason,
            sequence.usage(),
            sequence.timings(),
            sequence.sparsity(),
            matched_stop=self.transcript.matched,
            error=failure.text if failure else "",
            exhausted=failure is not None and failure.exhausted,
        )
        metrics.observe_finish(finish, sequence)
        return finish

    def progress(self) -> list[Output]:
        """Progress of the prompt since the last call: `PromptInfo` once, then `PrefillProgress`; empty without any."""
        sequence = self.sequence
        opening: list[Output] = [] if sequence.reported >= 0 else [sequence.prompt_info()]
        report = sequence.progress()
        if report.processed <= sequence.reported:
            return []
        sequence.reported = report.processed
        return [*opening, report]
