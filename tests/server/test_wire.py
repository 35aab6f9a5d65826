"""Public contract of the protocol: names, limits and behaviour of the connection."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from keysift.engine import (
    Engine,
    EngineConfig,
    Finish,
    FinishReason,
    InvalidRequest,
    Logprob,
    Output,
    PrefillProgress,
    PromptInfo,
    SamplingParams,
    Sparsity,
    Timings,
    TokenOutput,
    Usage,
)
from keysift.server import inference_pb2 as pb
from keysift.server.client import Client
from keysift.server.convert import GROUPS, from_params, from_reply, to_params, to_reply

from .conftest import Running

SAMPLING = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.05,
    seed=2**63 - 1,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    repetition_penalty=1.1,
    logit_bias={3: -1.5},
    allowed_token_ids=(3, 4),
    max_new_tokens=7,
    min_new_tokens=2,
    stop_token_ids=(9,),
    stop_strings=("end", "\n"),
    include_stop_strings=True,
    ignore_eos=True,
    logprobs=0,
    skip_special_tokens=False,
)

COUNTS = Usage(11, 3, 4), Timings(1.5, 2.5, 4.0, 8.0, 4.0)
SPARSITY = Sparsity("streaming", 0.25, 0.125, None, True, 2**40, 7, None, 0.0)
MEASURED = Sparsity("sift", 0.25, 1.0, 0.875, False, 2**40, 0, 0.0, 0.5)
OUTPUTS: list[Output] = [
    PromptInfo("r", 11, 4, "dense", 1.5),
    PrefillProgress("r", 11, 4, 8),
    TokenOutput("r", "Grüße", (1, 2), ((Logprob(1, -0.5, 1), Logprob(2, -1.5, 2)), (Logprob(2, -0.25, 1),))),
    Finish("r", FinishReason.STOP, *COUNTS, SPARSITY, matched_stop="end"),
    Finish("r", FinishReason.STOP, *COUNTS, SPARSITY, matched_stop=0),
    Finish("r", FinishReason.LENGTH, *COUNTS, MEASURED),
    Finish("r", FinishReason.ERROR, *COUNTS, SPARSITY, error="broken"),
]


def test_every_sampling_parameter_has_a_field_of_its_name() -> None:
    wire = {"temperature"}
    for group in GROUPS:
        wire |= set(pb.GenerateRequest.DESCRIPTOR.fields_by_name[group].message_type.fields_by_name)
    assert wire == set(SamplingParams.model_fields)


@pytest.mark.parametrize("params", [SAMPLING, SamplingParams()], ids=["all set", "defaults"])
def test_parameters_survive_the_wire(params: SamplingParams) -> None:
    message = pb.GenerateRequest.FromString(from_params(params).SerializeToString())
    assert to_params(message) == params


def test_unset_fields_are_the_defaults() -> None:
    assert to_params(pb.GenerateRequest()) == SamplingParams()


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: type(output).__name__)
def test_outputs_survive_the_wire(output: Output) -> None:
    assert from_reply(pb.GenerateReply.FromString(to_reply(output).SerializeToString()), "r") == output


@pytest.mark.parametrize(
    ("message", "dataclass"),
    [(pb.Usage, Usage), (pb.Timings, Timings), (pb.Sparsity, Sparsity)],
    ids=["usage", "timings", "sparsity"],
)
def test_statistics_have_the_same_names(message: type[pb.Usage], dataclass: type[Usage]) -> None:
    assert [field.name for field in message.DESCRIPTOR.fields] == [field.name for field in fields(dataclass)]


def test_the_generated_code_is_that_of_the_proto_file() -> None:
    """Regenerate with `make proto`: every message, enum, method, field and number must be the same."""
    text = re.sub(r"//.*", "", (Path(pb.__file__).parent / "inference.proto").read_text())
    fields = set(re.findall(r"([\w.]+(?:<.*>)?)\s+(\w+)\s*=\s*(\d+);", text))
    written = {(name, int(number)) for _, name, number in fields}
    written |= {(name, int(number)) for name, number in re.findall(r"^\s*(\w+)\s*=\s*(\d+);", text, re.MULTILINE)}
    file = pb.DESCRIPTOR
    generated = {(f.name, f.number) for message in file.message_types_by_name.values() for f in message.fields}
    generated |= {(v.name, v.number) for enum in file.enum_types_by_name.values() for v in enum.values}
    assert generated == written
    assert set(re.findall(r"^message (\w+)", text, re.MULTILINE)) == set(file.message_types_by_name)
    assert set(re.findall(r"^enum (\w+)", text, re.MULTILINE)) == set(file.enum_types_by_name)
    assert re.findall(r"rpc (\w+)", text) == [m.name for m in file.services_by_name["Inference"].methods]


WRONG: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (object(), {}),
    "prompt that is None": (None, {}),
    "prompt of bytes": (b"abc", {}),
    "prompt with a surrogate": ("\udc80", {}),
    "prompt of negative tokens": ([-1], {}),
    "prompt of turns with more": ([{"role": "user", "body": "x"}], {}),
    "request_id": ("x", {"request_id": 7}),
    "model": ("x", {"model": "\udc80"}),
    "strategy": ("x", {"strategy": b"\xff"}),
    "strategy_args": ("x", {"strategy_args": {"streaming.window": 16}}),
    "cache_salt": ("x", {"cache_salt": 1.5}),
    "truncate_prompt_tokens": ("x", {"truncate_prompt_tokens": -1}),
    "priority": ("x", {"priority": 2**40}),
    "top_k": ("x", {"params": SamplingParams(top_k=2**40)}),
}


@pytest.mark.parametrize(("prompt", "options"), WRONG.values(), ids=WRONG.keys())
def test_the_client_names_a_field_that_does_not_fit(
    client: Client, prompt: Any, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(prompt, **options)
    assert caught.value.field == request.node.callspec.id.split()[0]


def test_info(client: Client, running: Running) -> None:
    info, engine = client.info(), running.engine
    assert list(info.eos_token_ids) == [2]
    assert (info.model, info.max_model_len, info.vocab_size) == ("tiny", 2048, 259)
    assert (info.num_layers, info.num_query_heads, info.num_kv_heads, info.head_dim) == (2, 4, 2, 8)
    assert (info.device, info.strategy) == ("cpu", "sift+retrieval")
    server = client.server_info()
    assert server.state == pb.READY
    assert server.load.pages_total == engine.status.pages_total
    assert (server.max_num_seqs, server.max_queue) == (engine.config.max_num_seqs, engine.config.max_queue)


def test_reflection_lists_the_services(running: Running) -> None:
    with grpc.insecure_channel(running.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="keysift.v1.Inference"),
        ]
        listed, described = list(stub.ServerReflectionInfo(iter(requests)))
    names = {service.name for service in listed.list_services_response.service}
    assert {"keysift.v1.Inference", "grpc.health.v1.Health"} <= names
    assert b"keysift.v1" in described.file_descriptor_response.file_descriptor_proto[0]


class SilentEngine(Engine):
    """Engine that is silent for 5 s, as in a long prefill: time for five pings, which are at least 1 s apart."""

    def step(self) -> list[Output]:
        if self.has_work:
            time.sleep(5)
        return super().step()


def test_pings_during_silence_do_not_end_the_connection(
    start: Callable[..., Running], engine_config: EngineConfig
) -> None:
    silent = start(lambda: SilentEngine(engine_config))
    with Client(silent.address, keepalive_s=0.05) as client:
        outputs = list(client.generate("x", SamplingParams(max_new_tokens=1)))
    assert isinstance(outputs[-1], Finish)


def test_a_prompt_may_exceed_the_limit_of_grpc(client: Client) -> None:
    params = SamplingParams(max_new_tokens=1)
    prompt = [20_000] * (3 * 2**19) + [200] * 64
    assert 3 * 3 * 2**19 > 4 * 2**20, "bytes: ids from 16,384 take three"
    outputs = list(client.generate(prompt, params, truncate_prompt_tokens=64))
    assert isinstance(outputs[-1], Finish)
    assert outputs[-1].usage.prompt_tokens == 64
