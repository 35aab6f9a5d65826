"""Offline inference: completions of a list of prompts, in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .config import EngineConfig
from .engine import Engine
from .request import Finish, Logprob, Output, PrefillProgress, Request, SamplingParams, TokenOutput

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """Text and tokens generated for one prompt."""

    prompt: Prompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[Logprob, ...]] = field(default_factory=list)
    finish: Finish | None = None
    """Finish reason, token counts, timings and sparsity; set on every completion that `generate` yields.

    After an `ERROR` the text is what came before it, and `finish.error` is the message.
    """


class LLM:
    """An engine for scripts: ``LLM(strategy="streaming").generate(["Once upon"])``."""

    def __init__(self, model: str | None = None, **config: Any) -> None:
        """Load `model` (None: the embedded one); the other arguments are `EngineConfig`'s fields."""
        self.engine = Engine(EngineConfig(model=model, **config), _print_to_stderr)
        self._count = 0
        self._live: dict[str, Completion] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        strategy: str | None = None,
        progress: bool = True,
    ) -> Iterator[Completion]:
        """Complete prompts (texts or token ids), many at once, and yield the completions in the prompts' order.

        Raises:
            InvalidRequest, ResourceExhausted: a prompt or a parameter is out of bounds; nothing was started.

        A prompt that runs out of memory later ends with `FinishReason.ERROR`; the others continue.
        """
        many = _as_list(prompts)
        requests = [self._request(prompt, params or SamplingParams(), strategy) for prompt in many]
        for request in requests:
            self.engine.check(request)
        return self._run(requests, many, _progress(disable=not progress))

    def _run(self, requests: list[Request], prompts: list[Prompt], bar: Progress) -> Iterator[Completion]:
        mine = {request.request_id: Completion(prompt) for request, prompt in zip(requests, prompts, strict=True)}
        queue, meter = list(reversed(requests)), _Meter(bar, requests)
        self._live |= mine
        try:
            with bar:
                for completion in mine.values():
                    while completion.finish is None:
                        self._step(queue, meter)
                    yield completion
        finally:
            for request_id in mine:
                self.engine.abort(request_id)
                del self._live[request_id]

    def _step(self, queue: list[Request], meter: _Meter) -> None:
        """Add queued requests, run one step, and add its outputs to their completions, those of other iterators too."""
        while queue and self.engine.status.running + self.engine.status.waiting < self.engine.config.max_num_seqs:
            self.engine.add(queue.pop())
        for output in self.engine.step():
            meter.advance(output)
            if output.request_id in self._live:
                _fill(self._live[output.request_id], output)

    def _request(self, prompt: Prompt, params: SamplingParams, strategy: str | None) -> Request:
        self._count += 1
        tokens = self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return Request(f"llm-{self._count}", tuple(tokens), params, strategy=strategy)


class _Meter:
    """Progress bar of prompt and generated tokens."""

    def __init__(self, bar: Progress, requests: list[Request]) -> None:
        self._bar = bar
        self._seen: dict[str, int] = {}
        self._prefill: TaskID = bar.add_task("prefill", total=sum(len(request.prompt) for request in requests))
        self._decode: TaskID = bar.add_task("decode", total=sum(request.params.max_new_tokens for request in requests))
        self._budget = {request.request_id: request.params.max_new_tokens for request in requests}

    def advance(self, output: Output) -> None:
        if output.request_id not in self._budget:
            return
        if isinstance(output, PrefillProgress):
            self._bar.advance(self._prefill, output.processed - self._seen.get(output.request_id, 0))
            self._seen[output.request_id] = output.processed
        elif isinstance(output, TokenOutput):
            self._bar.advance(self._decode, len(output.token_ids))
        elif isinstance(output, Finish):
            self._bar.advance(self._decode, self._budget[output.request_id] - output.usage.completion_tokens)


def _fill(completion: Completion, output: Output) -> None:
    if isinstance(output, TokenOutput):
        completion.text += output.text
        completion.token_ids += output.token_ids
        completion.logprobs += output.logprobs
    elif isinstance(output, Finish):
        completion.finish = output


def _print_to_stderr(message: str) -> None:
    """Progress of loading, apart from results on standard output."""
    print(message, file=sys.stderr)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _progress(disable: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=disable, transient=True)
