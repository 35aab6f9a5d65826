"""One prompt from the command line, run in this process or by a server, shown as text or as one JSON object."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from keysift.engine.config import EngineConfig
from keysift.engine.request import Finish, FinishReason, Output, PrefillProgress, Request, SamplingParams, TokenOutput

from ..client import connect
from ..errors import Cancelled, failure
from ..interrupts import importing
from ..options import Prompt, Remote, pair


def run_here(config: EngineConfig, prompt: Prompt, params: SamplingParams) -> Iterator[Output]:
    """The outputs of an engine of our own."""
    with importing():
        from keysift.engine.engine import Engine

    engine = Engine(config, report)
    tokens = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else engine.tokenizer.chat(prompt)  # type: ignore[arg-type]
    engine.add(Request(uuid.uuid4().hex, tuple(tokens), params))
    while engine.has_work:
        yield from engine.step()


def run_there(
    remote: Remote, engine: EngineConfig, strategy: str, prompt: Prompt, params: SamplingParams
) -> Iterator[Output]:
    """The outputs of a running server; of `engine`, only what one request may choose is sent."""
    arguments = dict(pair(argument) for argument in engine.strategy_args)
    with connect(remote) as client:
        model = engine.model or ""
        yield from client.generate(prompt, params, model=model, strategy=strategy, strategy_args=arguments)


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def show(outputs: Iterable[Output]) -> None:
    """Progress on standard error, text on standard output as it comes."""
    with _progress() as progress:
        task = progress.add_task("reading the prompt", total=None)
        for output in outputs:
            if isinstance(output, PrefillProgress):
                progress.update(task, total=output.total, completed=output.processed)
            elif isinstance(output, TokenOutput):
                progress.stop()
                print(output.text, end="", flush=True)
            elif isinstance(output, Finish):
                progress.stop()
                print()
                _check(output)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def show_json(outputs: Iterable[Output]) -> None:
    print(json.dumps(as_object(outputs), ensure_ascii=False))


def as_object(outputs: Iterable[Output]) -> dict[str, Any]:
    """Everything that a request brought, as one object."""
    text, token_ids = "", list[int]()
    for output in outputs:
        if isinstance(output, TokenOutput):
            text += output.text
            token_ids += output.token_ids
        elif isinstance(output, Finish):
            finish = _check(output)
    return {
        "text": text,
        "token_ids": token_ids,
        "finish_reason": finish.reason.value,
        "usage": asdict(finish.usage),
        "timings": asdict(finish.timings),
        "sparsity": asdict(finish.sparsity),
    }


def _check(finish: Finish) -> Finish:
    if error := failure(finish):
        raise error
    if finish.reason is FinishReason.CANCELLED:
        raise Cancelled(f"cancelled after {finish.usage.completion_tokens} tokens: aborted, or the server shuts down")
    return finish
