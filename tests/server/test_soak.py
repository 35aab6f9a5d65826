"""Soak test: 300 concurrent requests of every kind, after which all pages are free."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import grpc

from keysift.engine import Finish, FinishReason, Output, SamplingParams
from keysift.server import inference_pb2 as pb
from keysift.server.client import Client
from keysift.server.convert import from_params
from keysift.server.errors import DeadlineExceeded
from keysift.server.inference_pb2_grpc import InferenceStub

from .conftest import Running

REQUESTS = 300


def one(client: Client, channel: grpc.Channel, number: int) -> str:
    """Run one random kind of request; returns the name of its end."""
    chance = random.Random(number)
    prompt = f"request {number} " * chance.randint(1, 40)
    params = SamplingParams(max_new_tokens=chance.randint(1, 40), temperature=chance.choice([0.0, 1.0]), seed=number)
    match chance.choice(["whole", "stopped", "dropped", "late", "aborted", "bad"]):
        case "whole":
            return finished(list(client.generate(prompt, params)))
        case "stopped":
            stops = tuple(chance.sample("abcdefghijklmnopqrstuvwxyz", 12))
            return finished(list(client.generate(prompt, params.model_copy(update={"stop_strings": stops}))))
        case "dropped":
            outputs = client.generate(prompt, params)
            list(itertools.islice(outputs, chance.randint(1, 5)))
            outputs.close()  # type: ignore[attr-defined]
            return "dropped"
        case "late":
            return late(client, prompt, params, chance.uniform(0.001, 0.05))
        case "aborted":
            outputs = client.generate(prompt, params, request_id=f"soak-{number}")
            first = next(outputs)
            client.abort([f"soak-{number}"])
            return finished([first, *outputs])
        case _:
            return refused(channel, from_params(params))


def finished(outputs: list[Output]) -> str:
    assert isinstance(outputs[-1], Finish)
    assert outputs[-1].reason is not FinishReason.ERROR
    return outputs[-1].reason.value


def late(client: Client, prompt: str, params: SamplingParams, timeout: float) -> str:
    try:
        return finished(list(client.generate(prompt, params, timeout=timeout)))
    except DeadlineExceeded:
        return "late"


def refused(channel: grpc.Channel, message: pb.GenerateRequest) -> str:
    message.text, message.sampling.top_p = "x", 7
    try:
        list(InferenceStub(channel).Generate(message))
    except grpc.RpcError as error:
        return str(error.code().name)
    return "accepted"


def test_soak(running: Running) -> None:
    pages = running.free_pages()
    with Client(running.address) as client, grpc.insecure_channel(running.address) as channel:
        with ThreadPoolExecutor(16) as pool:
            endings = list(pool.map(lambda number: one(client, channel, number), range(REQUESTS)))
        assert {"length", "stop", "dropped", "late", "cancelled", "INVALID_ARGUMENT"} == set(endings)
        assert running.free_pages() == pages == running.engine.status.pages_total
        assert finished(list(client.generate("still there?", SamplingParams(max_new_tokens=4)))) in ("length", "stop")
