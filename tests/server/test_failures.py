"""Failures of one request: status on the wire, error of the client, and other requests that continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import grpc
import pytest
from prometheus_client import REGISTRY

from keysift.engine import (
    LLM,
    Engine,
    EngineConfig,
    Finish,
    FinishReason,
    KeysiftError,
    Output,
    ResourceExhausted,
    TokenOutput,
)
from keysift.engine import SamplingParams as Params
from keysift.kvcache import Phase, Step
from keysift.server import inference_pb2 as pb
from keysift.server import service
from keysift.server.client import Client
from keysift.server.errors import Internal
from keysift.server.inference_pb2_grpc import InferenceStub
from tests.engine.faults import KINDS, Act, install

from .conftest import Run, Running

LENGTHS = {77: "store full", 78: "store broken", 79: "memory"}
"""Prompt length in tokens -> fault that ends the request after a few tokens."""


def failing(engine: Engine) -> Engine:
    def fault(act: Act, layer: int, step: Step) -> None:
        victims = {each.handle: each.prompt_len for each in engine.scheduler.running if each.num_generated > 2}
        for span in step.spans if step.phase is Phase.DECODE else ():
            if kind := LENGTHS.get(victims.get(span.sequence, 0)):
                KINDS[kind]()

    install(engine, fault)
    return engine


@pytest.fixture(scope="module")
def faulty(start: Callable[..., Running], engine_config: EngineConfig) -> Running:
    return start(lambda: failing(Engine(engine_config)))


@pytest.fixture
def client(faulty: Running) -> Iterator[Client]:
    with Client(faulty.address) as client:
        yield client


@pytest.mark.parametrize(
    ("length", "code", "error", "named", "kind"),
    [
        (77, grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted, "4096 bytes needed", "exhausted"),
        (78, grpc.StatusCode.INTERNAL, Internal, "page 7 could not be read", "broken"),
        (
            79,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            ResourceExhausted,
            "memory: not enough for a decode step",
            "exhausted",
        ),
    ],
)
def test_the_status_separates_exhaustion_from_faults(
    faulty: Running,
    client: Client,
    length: int,
    code: grpc.StatusCode,
    error: type[KeysiftError],
    named: str,
    kind: str,
) -> None:
    pages, before = faulty.free_pages(), total(kind)
    with grpc.insecure_channel(faulty.address) as channel:
        replies: list[pb.GenerateReply] = []
        with pytest.raises(grpc.RpcError) as caught:
            replies.extend(InferenceStub(channel).Generate(pb.GenerateRequest(text="x" * length), timeout=60))
    assert caught.value.code() is code
    assert named in caught.value.details()
    finish = replies[-1].finish
    assert (finish.reason, finish.exhausted) == (pb.ERROR, code is grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert named in finish.error
    assert finish.usage.completion_tokens == 3
    assert faulty.free_pages() == pages
    outputs: list[Output] = []
    with pytest.raises(error, match=named):
        outputs.extend(client.generate("x" * length))
    assert isinstance(outputs[-1], Finish)
    assert outputs[-1].exhausted == finish.exhausted
    assert total(kind) == before + 2
    assert len(list(client.generate("still there", Params(max_new_tokens=4)))) > 2


def total(kind: str) -> float:
    """Failures of this kind over all strategies."""
    (family,) = (each for each in REGISTRY.collect() if each.name == "keysift_request_failures")
    return sum(
        sample.value for sample in family.samples if sample.labels.get("kind") == kind and "_total" in sample.name
    )


def test_other_requests_continue_after_a_failure(client: Client, faulty: Running) -> None:
    params = Params(max_new_tokens=40, ignore_eos=True)
    alone = [output for output in client.generate("other", params) if not isinstance(output, Finish)]
    streams = [client.generate("x" * length, params) for length in (77, 78, 79)]
    other = client.generate("other", params)
    heads = [next(stream) for stream in (*streams, other)]
    assert heads
    for stream, error in zip(streams, (ResourceExhausted, Internal, ResourceExhausted), strict=True):
        with pytest.raises(error):
            list(stream)
    assert tokens(other) == tokens(alone)
    assert faulty.free_pages() == faulty.engine.status.pages_total


def tokens(outputs: Iterable[Output]) -> list[int]:
    return [token for output in outputs if isinstance(output, TokenOutput) for token in output.token_ids]


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_the_command_prints_the_error(run: Run, faulty: Running, form: list[str]) -> None:
    for length, named in ((77, "4096 bytes needed"), (78, "page 7")):
        status, _, err = run("generate", "--address", faulty.address, "--prompt", "x" * length, *form)
        assert status == 1
        assert f"keysift: kv_offload: {named}" in err


def test_an_offline_run_yields_every_completion(engine_config: EngineConfig) -> None:
    llm = LLM(**engine_config.model_dump(exclude_unset=True))
    failing(llm.engine)
    params = Params(max_new_tokens=8, ignore_eos=True)
    done = list(llm.generate(["one", "x" * 77, "three"], params, progress=False))
    finishes = [completion.finish for completion in done]
    assert [finish.reason for finish in finishes if finish] == [
        FinishReason.LENGTH,
        FinishReason.ERROR,
        FinishReason.LENGTH,
    ]
    assert finishes[1] is not None
    assert "4096 bytes" in finishes[1].error
    assert [len(completion.token_ids) for completion in done] == [8, 3, 8]


def test_every_call_that_ends_with_an_error_is_counted(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by an exception of another kind; calls of the health service, which have no tenant, under none."""

    def count(tenant: str, status: str) -> float:
        labels = {"tenant": tenant, "status": status}
        return REGISTRY.get_sample_value("keysift_tenant_refusals_total", labels) or 0.0

    before = count("default", "INTERNAL"), count("", "INVALID_ARGUMENT"), count("default", "INVALID_ARGUMENT")
    monkeypatch.setattr(service, "model_info", lambda engine: 1 // 0)
    with Client(running.address) as client, pytest.raises(Internal, match="ZeroDivisionError"):
        client.info()
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff", timeout=30)
    after = count("default", "INTERNAL"), count("", "INVALID_ARGUMENT"), count("default", "INVALID_ARGUMENT")
    assert after == (before[0] + 1, before[1] + 1, before[2])
