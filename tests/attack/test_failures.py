"""The failure table: an exception at any seam ends the request that met it, and changes nothing for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keysift.attention.strategies.streaming import Streaming
from keysift.attention.telemetry import Telemetry
from keysift.engine import FinishReason, Output, SamplingParams, TokenOutput, metrics
from keysift.engine.execution import runner
from keysift.engine.execution.runner import Runner
from keysift.engine.text.transcript import Transcript
from keysift.kvcache.index import CodeIndex
from keysift.kvcache.index.graph.graphs import Graphs
from keysift.kvcache.index.graph.index import GraphIndex
from keysift.kvcache.index.ivf.index import IvfIndex
from keysift.kvcache.index.ivf.segments import Segments
from keysift.kvcache.step import Phase, Step
from keysift.kvcache.tiers.device import DeviceTier
from keysift.server.client import Client
from keysift.server.errors import Internal
from tests.server.conftest import Running

NEW = 12
PROMPTS = {"one": "first of three " * 8, "victim": "the one that fails " * 6, "other": "and another " * 9}
STREAMING = ("streaming", {"dense_below": "0", "sink": "16", "window": "32"})
RETRIEVAL = {"dense_below": "0", "sink": "16", "window": "32", "budget": "32", "epsilon": "0"}
CODES = ("retrieval", RETRIEVAL)
IVF = ("retrieval", RETRIEVAL | {"index": "ivf"})
GRAPH = ("retrieval", RETRIEVAL | {"index": "graph", "wait": "true"})


class Panic(BaseException):
    """As the tokenizers' Rust code raises: no `Exception`."""


@dataclass(frozen=True)
class Seam:
    """A function that a request's work passes, and how to see in its arguments whether that is the victim's."""

    owner: Any
    name: str
    step_of: Callable[..., Any] | None = None
    """The step, from the arguments."""
    strategy: tuple[str, dict[str, str]] = STREAMING
    phase: Phase | None = None
    skip: int = 3
    """Calls that pass before the first failure."""
    names: str = ""
    """A part of the error."""
    kinds: tuple[BaseException, ...] = field(default=(ValueError("a bug"), StopIteration()))
    harmless: bool = False
    """It is no part of an answer: the victim goes on, too."""


def last(*args: Any) -> Step:
    step = args[-1]
    assert isinstance(step, Step)
    return step


def of_context(_self: Any, _q: Any, context: Any, *_: Any) -> Any:
    return context.step


PANICS = (ValueError("a bug"), Panic("called `Option::unwrap()` on a `None` value"))
SEAMS = {
    "prefill": Seam(Streaming, "prefill", of_context, phase=Phase.PREFILL, skip=1, names="strategy streaming"),
    "decode": Seam(Streaming, "prefill", of_context, phase=Phase.DECODE, names="strategy streaming: decode"),
    "masses": Seam(CodeIndex, "masses", of_context, CODES, names="strategy retrieval: decode"),
    "index add by ivf": Seam(Segments, "observe", of_context, IVF),
    "index add by graph": Seam(Graphs, "observe", of_context, GRAPH),
    "index search by ivf": Seam(IvfIndex, "masses", of_context, IVF, names="strategy retrieval: decode"),
    "index search by graph": Seam(GraphIndex, "masses", of_context, GRAPH, names="strategy retrieval: decode"),
    "append": Seam(DeviceTier, "write", last),
    "fetch": Seam(DeviceTier, "parts", last),
    "forward": Seam(Runner, "evaluate", lambda _self, _strategy, step, *_: step),
    "telemetry of a layer": Seam(Telemetry, "record", lambda self, *_: self._step, names="telemetry"),
    "telemetry of a step": Seam(Telemetry, "reads", lambda self: self._step, names="telemetry"),
    "sample": Seam(runner, "sample", names="sampling"),
    "detokenise": Seam(Transcript, "push", names="detokenising", kinds=PANICS),
    "metrics": Seam(metrics.RUNNING, "set", harmless=True),
    "metrics of a finish": Seam(metrics.GENERATION_TOKENS, "labels", skip=0, harmless=True),
}
CASES = [
    pytest.param(seam, kind, id=f"{name}: {type(kind).__name__}") for name, seam in SEAMS.items() for kind in seam.kinds
]


@pytest.fixture(scope="module")
def clean() -> dict[str, dict[str, list[int]]]:
    """Tokens of the three requests without a failure, by strategy."""
    return {}


@pytest.mark.parametrize(("seam", "error"), CASES)
def test_a_failure_stays_where_it_arises(
    running: Running,
    clean: dict[str, dict[str, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    seam: Seam,
    error: BaseException,
) -> None:
    key = repr(seam.strategy)
    if key not in clean:
        clean[key] = {name: tokens_of(outputs) for name, outputs in together(running, seam.strategy).items()}
    expected, pages = clean[key], running.free_pages()
    hits = inject(monkeypatch, running, seam, error)
    answers = together(running, seam.strategy)
    assert hits, "the seam was never passed"
    monkeypatch.undo()
    for name in ("one", "other"):
        assert tokens_of(answers[name]) == expected[name]
    check_victim(answers["victim"], expected["victim"], seam)
    assert running.free_pages() == pages == running.engine.status.pages_total
    assert healthy(running)


def inject(monkeypatch: pytest.MonkeyPatch, running: Running, seam: Seam, error: BaseException) -> list[int]:
    """Make the seam raise for the victim; the list that is returned grows with every failure."""
    real, hits, passed = getattr(seam.owner, seam.name), [], [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if seam.harmless or concerns_victim(running, seam, args):
            passed[0] += 1
            if passed[0] > seam.skip:
                hits.append(passed[0])
                raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(seam.owner, seam.name, failing)
    return hits


def concerns_victim(running: Running, seam: Seam, args: tuple[Any, ...]) -> bool:
    job = next((job for name, job in list(running.engine._jobs.items()) if name.endswith("victim")), None)
    if job is None:
        return False
    if seam.step_of is None:
        return job.transcript is args[0] or (isinstance(args[-1], list) and job.sampler in args[-1])
    step = seam.step_of(*args)
    return seam.phase in (None, step.phase) and job.sequence.handle in {span.sequence for span in step.spans}


def together(running: Running, strategy: tuple[str, dict[str, str]]) -> dict[str, list[Output] | Internal]:
    """Outputs, or the error, of three requests that arrive before the engine's next step."""
    with ThreadPoolExecutor(3) as pool, Client(running.address) as client:
        with running.holding():
            answers = {name: pool.submit(answer, client, name, strategy) for name in PROMPTS}
            running.wait_for_streams(len(PROMPTS))
        return {name: future.result(60) for name, future in answers.items()}


def answer(client: Client, name: str, strategy: tuple[str, dict[str, str]]) -> list[Output] | Internal:
    stream = client.generate(
        PROMPTS[name],
        SamplingParams(max_new_tokens=NEW, ignore_eos=True, temperature=1.0, seed=7),
        request_id=name,
        strategy=strategy[0],
        strategy_args={f"{strategy[0]}.{key}": value for key, value in strategy[1].items()},
        bypass_prefix_cache=True,
    )
    outputs: list[Output] = []
    try:
        outputs.extend(stream)
    except Internal as error:
        error.outputs = outputs  # type: ignore[attr-defined]
        return error
    return outputs


def tokens_of(outputs: list[Output] | Internal) -> list[int]:
    said = outputs.outputs if isinstance(outputs, Internal) else outputs  # type: ignore[attr-defined]
    return [token for output in said if isinstance(output, TokenOutput) for token in output.token_ids]


def check_victim(outputs: list[Output] | Internal, expected: list[int], seam: Seam) -> None:
    if seam.harmless:
        assert tokens_of(outputs) == expected
        return
    assert isinstance(outputs, Internal)
    assert seam.names in str(outputs)
    said = tokens_of(outputs)
    assert said == expected[: len(said)]
    assert len(said) < NEW
    assert outputs.outputs[-1].reason is FinishReason.ERROR  # type: ignore[attr-defined]


def healthy(running: Running) -> bool:
    with grpc.insecure_channel(running.address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture(autouse=True)
def _still_one_server(running: Running) -> Iterator[None]:
    """The server that met all failures before is the one that answers now."""
    before = running.server.worker._thread
    yield
    assert running.server.worker._thread is before
    assert before.alive
