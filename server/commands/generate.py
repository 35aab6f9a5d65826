"""`keysift generate`: the completion of one prompt, by this process or by a running server."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import typer

from keysift.engine.config import EngineConfig
from keysift.engine.errors import InvalidRequest
from keysift.engine.request import Finish, FinishReason, Output, PrefillProgress, Request, SamplingParams, TokenOutput

from ..client import connect
from ..errors import Cancelled, failure
from ..interrupts import importing
from ..options import Document, Prompt, Remote, Sampling, pair
from .flags import Config, Json, flag, from_fields, given
from .progress import count_bar, report


@from_fields(document=Document, sampling=Sampling, remote=Remote, engine=EngineConfig, skip=("engine.seed",))
def generate(
    context: typer.Context,
    document: Document,
    sampling: Sampling,
    remote: Remote,
    engine: EngineConfig,
    config: Config = None,
    json: Json = False,
) -> None:
    """Complete one prompt, in this process or on a running server.

    [bold]Examples[/bold]

      keysift generate --prompt-file report.txt --question "What was decided?" --chat

      cat report.txt | keysift generate --prompt-file - --strategy streaming --json

      keysift generate --prompt "Once upon a time" --address localhost:50051
    """
    if remote.address is None:
        outputs = run_local(engine, document.value(), sampling.params())
    else:
        _refuse_engine_flags(context)
        # The default strategy is for an engine in this process: a server has its own.
        strategy = engine.strategy if _is_set(context, "strategy") else ""
        outputs = run_remote(remote, engine, strategy, document.value(), sampling.params())
    (show_json if json else show)(outputs)


def _refuse_engine_flags(context: typer.Context) -> None:
    for name in given(context, set(EngineConfig.model_fields) - {"model", "strategy", "strategy_args"}):
        problem = f"{flag(name)} is for an engine of this process; a server at --address takes {Remote.TAKES}"
        raise InvalidRequest(name, problem)


def _is_set(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def run_local(config: EngineConfig, prompt: Prompt, params: SamplingParams) -> Iterator[Output]:
    """Outputs of an engine in this process."""
    with importing():
        from keysift.engine.engine import Engine

    engine = Engine(config, report)
    tokens = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else engine.tokenizer.chat(prompt)  # type: ignore[arg-type]
    engine.add(Request(uuid.uuid4().hex, tuple(tokens), params))
    while engine.has_work:
        yield from engine.step()


def run_remote(
    remote: Remote, engine: EngineConfig, strategy: str, prompt: Prompt, params: SamplingParams
) -> Iterator[Output]:
    """Outputs of a running server; of `engine`, only the fields that a request has are sent."""
    arguments = dict(pair(argument) for argument in engine.strategy_args)
    with connect(remote) as client:
        model = engine.model or ""
        yield from client.generate(
            prompt, params, model=model, strategy=strategy, strategy_args=arguments, priority=remote.priority
        )


def show(outputs: Iterable[Output]) -> None:
    """Print the text on standard output as it arrives, and the progress of the prompt on standard error."""
    with count_bar("reading the prompt") as bar:
        for output in outputs:
            if isinstance(output, PrefillProgress):
                bar.update(output.processed, output.total)
            elif isinstance(output, TokenOutput):
                bar.stop()
                print(output.text, end="", flush=True)
            elif isinstance(output, Finish):
                bar.stop()
                print()
                _check(output)


def show_json(outputs: Iterable[Output]) -> None:
    print(json.dumps(as_object(outputs), ensure_ascii=False))


def as_object(outputs: Iterable[Output]) -> dict[str, Any]:
    """All outputs of a request as one object."""
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
