"""A live request: where it stands, how it samples, what it has said."""

from __future__ import annotations

from dataclasses import dataclass

from . import metrics
from .execution.sampler import Sampled, SamplerState
from .request import Finish, FinishReason, Output, TokenOutput
from .scheduling.failures import Failure
from .scheduling.sequence import Sequence
from .text.transcript import Transcript


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Ties one request's parts together and words its outputs."""

    sequence: Sequence
    sampler: SamplerState
    transcript: Transcript

    @property
    def request_id(self) -> str:
        return self.sequence.request.request_id

    def say(self, choice: Sampled) -> tuple[TokenOutput, FinishReason | None]:
        """Take in one new token: its output, and why the request ends with it, if it does."""
        token, logprobs = choice
        self.sampler.generated.append(token)
        text = self.transcript.push(token)
        reason = FinishReason.STOP if self.transcript.matched is not None else None
        if reason is None and self.sequence.num_generated >= self.sequence.max_new_tokens:
            text, reason = text + self.transcript.flush(), FinishReason.LENGTH
        return TokenOutput(self.request_id, text, (token,), (logprobs,) if logprobs else ()), reason

    def finish(self, reason: FinishReason, failure: Failure | None = None) -> Finish:
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
        """What a step has changed about the prompt: first what it is, then how far it got; never the same twice."""
        sequence = self.sequence
        opening: list[Output] = [] if sequence.reported >= 0 else [sequence.prompt_info()]
        report = sequence.progress()
        if report.processed <= sequence.reported:
            return []
        sequence.reported = report.processed
        return [*opening, report]
