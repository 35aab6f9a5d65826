"""Clients of one server, and a request whose tokens must never change."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from threading import Event

from keysift.engine.errors import KeysiftError, Unsupported
from keysift.engine.request import Finish, FinishReason, Output, SamplingParams, TokenOutput
from keysift.server.client import Client
from keysift.server.commands.load.report import Record
from keysift.server.errors import CODES, Cancelled, DeadlineExceeded

from .mix import Ending, Order, Recipe

OUTPUTS = 8
"""Most outputs until a client aborts a request or goes."""
DEADLINE_S = 2.0
"""Longest deadline of a request that is meant to be late."""
PATIENCE_S = 300.0
"""Deadline of all others: a stream that hangs must show."""
GOLDEN = (
    Recipe("dense"),
    Recipe("sift+retrieval", {"dense_below": "0"}),
    Recipe("nosa", {"dense_below": "0", "budget": "128"}),
)
GOLDEN_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Reading:
    """One request as its client saw it, in seconds; `sent` is from the start of the load."""

    server: str
    recipe: str
    sent: float
    outcome: str
    """How it ended: one of `Ending`, or a gRPC status that it was not meant to have."""
    ttft: float | None = None
    tpot: float | None = None
    """Both of complete requests only."""
    error: str = ""


@dataclass(slots=True)
class Golden:
    """Answers to one prompt under a few strategies, each alone, before the load."""

    prompt: str
    expected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    asked: int = 0
    differences: list[str] = field(default_factory=list)

    def ask(self, client: Client, recipe: Recipe) -> None:
        """Ask once and compare with the first answer, which any of the servers gave."""
        self.asked += 1
        try:
            found = answer(client, recipe, self.prompt)
        except KeysiftError as error:
            self.differences.append(f"{recipe}: {_status(error)}: {error}")
            return
        if (expected := self.expected.setdefault(str(recipe), found)) != found:
            self.differences.append(f"{recipe}: expected {expected}, got {found}")


def answer(client: Client, recipe: Recipe, prompt: str) -> tuple[int, ...]:
    """Greedy tokens, without the prefix cache, whose pages may round differently."""
    params = SamplingParams(max_new_tokens=GOLDEN_TOKENS, ignore_eos=True)
    options = {"strategy": recipe.strategy, "strategy_args": recipe.arguments, "timeout": PATIENCE_S}
    outputs = client.generate(prompt, params, bypass_prefix_cache=True, **options)  # type: ignore[arg-type]
    return tuple(token for output in outputs if isinstance(output, TokenOutput) for token in output.token_ids)


def supported(client: Client, recipes: Iterable[Recipe]) -> Iterator[Recipe]:
    """The recipes that fit the model and the server, by one token of each."""
    for recipe in recipes:
        params, options = SamplingParams(max_new_tokens=1), {"strategy_args": recipe.arguments}
        try:
            for _ in client.generate("x", params, strategy=recipe.strategy, **options):  # type: ignore[arg-type]
                pass
        except Unsupported:
            continue
        yield recipe


def run_client(server: str, client: Client, orders: Iterable[Order], began: float, stop: Event) -> Iterator[Reading]:
    """Make the requests one after the other until `stop`."""
    for number, order in enumerate(orders):
        if stop.is_set():
            return
        record = Record(number, time.monotonic() - began)
        outcome, error = _outcome(client, order, record, began)
        kept = outcome == Ending.COMPLETE.value
        yield Reading(
            server,
            str(order.recipe),
            record.sent,
            outcome,
            record.ttft if kept and record.first is not None else None,
            record.tpot if kept else None,
            error,
        )


def _outcome(client: Client, order: Order, record: Record, began: float) -> tuple[str, str]:
    """Ending of the request, and the message of an unplanned error."""
    try:
        ended = _run(client, order, record, began)
    except DeadlineExceeded as error:
        return (Ending.LATE.value, "") if order.ending is Ending.LATE else ("DEADLINE_EXCEEDED", str(error))
    except KeysiftError as error:
        return _status(error), str(error)
    return ended.value, ""


def _status(error: KeysiftError) -> str:
    return next((code.name for kind, code in CODES.items() if isinstance(error, kind)), "UNKNOWN")


def _run(client: Client, order: Order, record: Record, began: float) -> Ending:
    request_id = f"soak-{uuid.uuid4().hex}"
    late = order.ending is Ending.LATE
    outputs = client.generate(
        order.prompt,
        order.params,
        request_id=request_id,
        strategy=order.recipe.strategy,
        strategy_args=order.recipe.arguments,
        timeout=0.01 + order.patience * DEADLINE_S if late else PATIENCE_S,
        **order.fields,
    )
    if order.ending in (Ending.ABORTED, Ending.DROPPED):
        _read(itertools.islice(outputs, 1 + int(order.patience * OUTPUTS)), record, began)
    if order.ending is Ending.DROPPED:
        outputs.close()  # type: ignore[attr-defined]
        return Ending.DROPPED
    if order.ending is Ending.ABORTED:
        client.abort([request_id])
    _read(outputs, record, began)
    return _ending(record, aborted=order.ending is Ending.ABORTED)


def _read(outputs: Iterable[Output], record: Record, began: float) -> None:
    for output in outputs:
        record.add(output, time.monotonic() - began)


def _ending(record: Record, *, aborted: bool) -> Ending:
    """Ending of a stream that was read to its end; raises `KeysiftError` for an unplanned one."""
    finish: Finish | None = record.finish
    if finish is None:
        raise KeysiftError("the stream ended without a finish")
    if finish.reason is not FinishReason.CANCELLED:
        return Ending.COMPLETE
    if not aborted:
        raise Cancelled("a request that nobody aborted was cancelled")
    return Ending.ABORTED
