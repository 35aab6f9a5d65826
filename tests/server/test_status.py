"""Status codes of failed calls, with their details."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_status import rpc_status

from keysift.engine import (
    DuplicateRequest,
    Engine,
    EngineConfig,
    InvalidRequest,
    KeysiftError,
    ModelNotFound,
    Request,
    ResourceExhausted,
    SamplingParams,
    Unsupported,
)
from keysift.server import inference_pb2 as pb
from keysift.server.client import Client
from keysift.server.errors import CODES, Internal, Unavailable, to_status
from keysift.server.inference_pb2_grpc import InferenceStub

from .conftest import MAX_LEN, Running

LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)
VOCABULARY = 259


def failure(running: Running, message: pb.GenerateRequest) -> grpc.RpcError:
    with grpc.insecure_channel(running.address, [("grpc.max_send_message_length", -1)]) as channel:
        stub = InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(message, timeout=60))
        return caught.value


def request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"text": "x"} | fields))  # type: ignore[arg-type]


BAD_FIELDS = {
    "no prompt": (pb.GenerateRequest(), "prompt", "none"),
    "empty text": (request(text=""), "prompt", "0"),
    "prompt too long": (request(text="x" * MAX_LEN), "prompt", str(MAX_LEN)),
    "unknown token": (request(text=None, token_ids=pb.TokenIds(ids=[5, 999_999])), "prompt", "999999"),
    "negative temperature": (request(temperature=-1), "temperature", "-1"),
    "temperature that is no number": (request(temperature=float("nan")), "temperature", "nan"),
    "top_p of zero": (request(sampling=pb.Sampling(top_p=0)), "top_p", "0"),
    "seed too large": (request(sampling=pb.Sampling(seed=2**63)), "seed", str(2**63)),
    "no new token": (request(stopping=pb.Stopping(max_new_tokens=0)), "max_new_tokens", "0"),
    "least above most": (request(stopping=pb.Stopping(max_new_tokens=2, min_new_tokens=3)), "min_new_tokens", "3"),
    "empty stop string": (request(stopping=pb.Stopping(stop_strings=[""])), "stop_strings.0", "''"),
    "bias of no token": (request(decoding=pb.Decoding(logit_bias={999_999: 1.0})), "logit_bias", "999999"),
    "too many logprobs": (request(response=pb.Response(logprobs=99)), "logprobs", "99"),
    "truncated to nothing": (request(truncate_prompt_tokens=0), "truncate_prompt_tokens", "0"),
    "temperature that overflows": (request(temperature=1e-39), "temperature", "1e-39"),
    "penalty that overflows": (request(decoding=pb.Decoding(repetition_penalty=1e-45)), "repetition_penalty", "1e-45"),
    "bias that overflows": (request(decoding=pb.Decoding(logit_bias={5: 1e300})), "logit_bias", "1e+300"),
    "no token left": (
        request(decoding=pb.Decoding(logit_bias=dict.fromkeys(range(VOCABULARY), -math.inf))),
        "logit_bias",
        "-inf",
    ),
    "every token ends it": (
        request(stopping=pb.Stopping(min_new_tokens=1, stop_token_ids=range(VOCABULARY))),
        "stop_token_ids",
        "min_new_tokens",
    ),
    "too many stop strings": (request(stopping=pb.Stopping(stop_strings=["x"] * 65)), "stop_strings", "64"),
    "option that overflows": (
        request(strategy="streaming", strategy_args={"streaming.window": "9" * 30}),
        "streaming.window",
        "999",
    ),
    "request id of two lines": (request(request_id="a\nb"), "request_id", "ASCII"),
    "request id beyond ASCII": (request(request_id="\u00e4"), "request_id", "ASCII"),
    "long request id": (request(request_id="x" * 300), "request_id", "300"),
    "unknown strategy": (request(strategy="nope"), "strategy", "nope"),
    "unknown option": (request(strategy="streaming", strategy_args={"streaming.nope": "1"}), "streaming.nope", "sink"),
}


@pytest.mark.parametrize(("message", "field", "named"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_bad_field_is_named(running: Running, message: pb.GenerateRequest, field: str, named: str) -> None:
    error = failure(running, message)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in error.details()
    (detail,) = rpc_status.from_call(error).details
    bad = BadRequest()
    assert detail.Unpack(bad)
    assert bad.field_violations[0].field == field
    with Client(running.address) as client:
        assert list(client.generate("still there", SamplingParams(max_new_tokens=1)))


ECHOES = {
    "strategy": request(strategy="x" * 20_000),
    "option": request(strategy="streaming", strategy_args={f"streaming.{'x' * 20_000}": "1"}),
    "value": request(strategy="streaming", strategy_args={"streaming.window": "\U0001f600" * 20_000}),
    "request id": request(request_id="\u00e4" * 200),
}


@pytest.mark.parametrize("message", ECHOES.values(), ids=ECHOES.keys())
def test_a_long_value_is_not_echoed_whole(running: Running, message: pb.GenerateRequest) -> None:
    error = failure(running, message)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(error.details()) < 1100
    assert rpc_status.from_call(error).details


class Panic(BaseException):
    """Rust panic, as the tokenizer raises it for a bug of its own."""


def test_a_panic_of_the_tokenizer_is_an_internal_error(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(text: str) -> list[int]:
        raise Panic

    with monkeypatch.context() as patch:
        patch.setattr(running.engine.tokenizer, "encode", encode)
        error = failure(running, request())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "Panic" in error.details()


def test_a_panic_in_the_engine_fails_all_requests(start: Callable[..., Running], engine_config: EngineConfig) -> None:
    class Panicking(Engine):
        def add(self, request: Request) -> None:
            raise Panic

    panicking = start(lambda: Panicking(engine_config))
    with Client(panicking.address) as client:
        with pytest.raises(Internal, match="Panic"):
            list(client.generate("x", timeout=10))
        deadline = time.monotonic() + 10
        while client.server_info().state != pb.FAILED:
            assert time.monotonic() < deadline


def test_six_megabytes_of_text_are_refused_not_broken(running: Running) -> None:
    error = failure(running, request(text="word " * 1_200_000))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "6000000" in error.details()


def test_a_message_above_the_limit_is_refused(start: Callable[..., Running]) -> None:
    error = failure(start(max_message_size="1MiB"), request(text="x" * 2**21))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_another_model(running: Running) -> None:
    error = failure(running, request(model="gpt-17"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "'tiny'" in error.details()


def test_an_unknown_method(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/keysift.v1.Inference/Nope")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_live_request_id(slow: Running) -> None:
    with Client(slow.address) as client:
        first = client.generate("x", LONG, request_id="twin")
        next(first)
        with pytest.raises(DuplicateRequest, match="twin"):
            list(client.generate("x", LONG, request_id="twin"))
        first.close()  # type: ignore[attr-defined]
    slow.free_pages()


def test_a_full_queue_has_a_retry_delay(slow: Running) -> None:
    with Client(slow.address) as client:
        first = client.generate("x", LONG)
        next(first)
        with grpc.insecure_channel(slow.address) as channel:
            queued = InferenceStub(channel).Generate(
                request(request_id="queued", stopping=pb.Stopping(max_new_tokens=9))
            )
            assert dict(queued.initial_metadata())["x-request-id"] == "queued"
            error = failure(slow, request())
            queued.cancel()
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = RetryInfo()
        assert rpc_status.from_call(error).details[0].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() > 0
        first.close()  # type: ignore[attr-defined]
    slow.free_pages()


REFUSALS = {"unsupported": Unsupported("this strategy does not fit"), "bug": RuntimeError("secret detail")}


class RefusingEngine(Engine):
    """Engine that refuses each request with the error named by its id."""

    def add(self, request: Request) -> None:
        raise REFUSALS[request.request_id]


def test_a_strategy_that_does_not_fit_and_a_bug(
    start: Callable[..., Running], engine_config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = start(lambda: RefusingEngine(engine_config))
    unsupported = failure(refusing, request(request_id="unsupported"))
    assert (unsupported.code(), unsupported.details()) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this strategy does not fit",
    )
    bug = failure(refusing, request(request_id="bug"))
    assert bug.code() is grpc.StatusCode.INTERNAL
    assert "RuntimeError" in bug.details()
    assert "secret detail" not in bug.details()
    assert caplog.text.count("RuntimeError: secret detail") == 1
    assert "request bug" in caplog.text


ERRORS = [
    InvalidRequest("top_p", "at most 1, got 2"),
    ModelNotFound("no such model"),
    DuplicateRequest("live"),
    Unsupported("does not fit"),
    ResourceExhausted("full", 1.5),
    ResourceExhausted("full"),
    Unavailable("loading", 2.0),
    Internal("a bug"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_client_raises_what_the_engine_raised(
    start: Callable[..., Running], engine_config: EngineConfig, error: KeysiftError
) -> None:
    class Raising(Engine):
        def add(self, request: Request) -> None:
            raise error

    raising = start(lambda: Raising(engine_config))
    with Client(raising.address) as client, pytest.raises(type(error)) as caught:
        list(client.generate("x"))
    assert vars(caught.value) == vars(error)
    assert str(caught.value) == str(error)


def test_every_error_has_a_code_of_its_own() -> None:
    assert len(set(CODES.values())) == len(CODES)
    assert to_status(KeysiftError("other")).code == grpc.StatusCode.INTERNAL.value[0]
