"""Layers on two virtual devices: the same tokens, and no tensor on the wrong device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import PreTrainedConfig

from keysift.engine import Engine, EngineConfig, FinishReason, InvalidRequest, Request
from keysift.engine.errors import Unsupported
from keysift.engine.memory import budget
from keysift.engine.model import load, placement
from keysift.engine.model.cpu import swap
from keysift.kvcache import CacheSpec, MultiDeviceTier, Step
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens
from tests.engine.execution.test_graphs import arguments
from tests.models import llama
from tests.strategies import unnamed
from tests.virtual import device_of, put_all, virtual_devices

FIRST, SECOND = torch.device("cpu:0"), torch.device("cpu:1")
STRATEGIES = [
    "dense",
    "streaming window=40 sink=8",
    "sift dense_below=0",
    "flexprefill dense_below=0 min_budget=16",
    "ashape dense_below=0 local=40 sink=8",
    "sampleattention dense_below=0",
    "minference dense_below=0",
    "xattention dense_below=0",
    "quest budget=32 dense_below=0",
    "quest budget=32 dense_below=0 certify=true",
    "retrieval budget=32 sink=8 window=24 dense_below=0 certify=true",
    "retrieval budget=32 sink=8 window=24 dense_below=0 index=flat",
    "retrieval budget=32 sink=8 window=24 dense_below=0 index=summary",
    "retrieval budget=32 sink=8 window=24 dense_below=0 index=bound",
    "retrieval budget=32 sink=8 window=24 dense_below=0 index=ivf",
    "nosa budget=32 sink=8 window=24 dense_below=0",
    "topk top_k=5 sink=8 window=24",
    "infllmv2 topk=3 window_size=16 block_size=16 kernel_size=8 kernel_stride=8 dense_below=0",
]
STRATEGIES += unnamed(STRATEGIES, 16)


@pytest.fixture(scope="module")
def four_layers(write_model: Callable[[PreTrainedConfig], Path]) -> Path:
    return write_model(llama(num_hidden_layers=4, tie_word_embeddings=False))


@pytest.fixture(autouse=True)
def _torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native modules, as on a GPU: the devices of their tensors are not checked."""
    monkeypatch.setattr(swap, "native_kernel", lambda: None)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are loaded with their last layers on the second device, by accelerate's hooks, as transformers does it."""
    original = load._load_module

    def spread(*args: Any) -> tuple[Any, list[str]]:
        module, unexpected = original(*args)
        _spread(module, here=len(module.model.layers) // 2)
        return module, unexpected

    monkeypatch.setattr(load, "_load_module", spread)
    with virtual_devices():
        yield


def _spread(module: nn.Module, here: int) -> None:
    """Place the first `here` layers on the first device, the others on the second."""
    core: Any = module.model
    put_all([*module.parameters(), *module.buffers()], FIRST)
    later = [*core.layers[here:], core.norm, module.lm_head]
    for part in later:
        put_all([*part.parameters(), *part.buffers()], SECOND)
    for part in (core.embed_tokens, core.rotary_emb, *core.layers, core.norm, module.lm_head):
        add_hook_to_module(part, AlignDevicesHook(execution_device=SECOND if part in later else FIRST))
    add_hook_to_module(module, AlignDevicesHook(execution_device=FIRST, io_same_device=True))


def answer(engine: Engine) -> list[tuple[list[int], object]]:
    """Tokens and statistics of two prompts at the same time, then of one that begins as the first."""
    for name, length in (("a", 150), ("b", 70)):
        engine.add(Request(name, tokens(length), greedy(12)))
    outputs = drain(engine)
    engine.add(Request("c", tokens(150), greedy(6)))
    outputs += drain(engine)
    return [(said(outputs, name), finish_of(outputs, name).sparsity) for name in "abc"]


def config(folder: Path, strategy: str, **fields: Any) -> dict[str, Any]:
    sizes = {"backend": "reference", "page_size": 8, "queries_per_row": 16}
    return {"model": str(folder), **sizes, **arguments(strategy), **fields}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layers_on_two_devices_give_the_same_tokens_as_on_one(
    make: Make, four_layers: Path, request: pytest.FixtureRequest, strategy: str
) -> None:
    expected = answer(make(**config(four_layers, strategy)))
    request.getfixturevalue("two_devices")
    engine = make(**config(four_layers, strategy, device="cpu:0"))
    assert engine.model.devices == (FIRST, FIRST, SECOND, SECOND)
    assert isinstance(engine.cache.tier, MultiDeviceTier)
    got = answer(engine)
    assert [said for said, _ in got] == [said for said, _ in expected]
    for (_, mine), (_, theirs) in zip(got, expected, strict=True):
        for name in type(mine).__dataclass_fields__:  # type: ignore[attr-defined]
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-5), name


def test_all_layers_may_lie_on_the_second_device(
    make: Make, four_layers: Path, two_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first may have no room for any."""
    original = load._load_module

    def crowded(*args: Any) -> tuple[Any, list[str]]:
        module, unexpected = original(*args)
        _spread(module, here=0)
        return module, unexpected

    halves = answer(make(**config(four_layers, "sift+retrieval", device="cpu:0")))
    monkeypatch.setattr(load, "_load_module", crowded)
    engine = make(**config(four_layers, "sift+retrieval", device="cpu:0"))
    assert set(engine.model.devices) == {SECOND}
    assert answer(engine) == halves


def test_a_tensor_on_the_wrong_device_is_detected(
    make: Make, four_layers: Path, two_devices: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without this the tests above could not fail."""
    monkeypatch.setattr(Step, "on", lambda self, device: self)
    engine = make(**config(four_layers, "dense", device="cpu:0"))
    engine.add(Request("a", tokens(20), greedy(2)))
    assert finish_of(drain(engine), "a").reason is FinishReason.ERROR
    assert "tensors on cpu:0, cpu:1" in caplog.text


def test_pages_are_where_their_layers_are(two_devices: None) -> None:
    spec = CacheSpec(num_layers=3, num_kv_heads=2, head_dim=8)
    tier = MultiDeviceTier(spec, 5, [FIRST, SECOND, SECOND])
    for layer, device in enumerate((FIRST, SECOND, SECOND)):
        assert device_of(tier.summaries(layer)) == device
        assert {device_of(part) for part in tier.codes(layer)} == {device}
    sizes = [[place.tier.k.shape[0], place.layer] for place in tier._places]
    assert sizes == [[1, 0], [2, 0], [2, 1]]


def test_pages_are_as_many_as_the_fullest_device_has_room_for(
    make: Make, four_layers: Path, two_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {FIRST: 10**6, SECOND: 10**5}
    monkeypatch.setattr(budget, "free_memory", lambda device: free.get(device, 10**9))
    engine = make(**config(four_layers, "dense", device="cpu:0", kv_memory=None))
    half = placement.page_bytes(engine.cache.spec, engine.model.devices)
    assert half == dict.fromkeys((FIRST, SECOND), engine.cache.spec.page_bytes // 2)
    assert engine.status.pages_total == int(budget.SHARE * 10**5) // half[SECOND]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "device_map: none on cpu"),
        ({"device": "cpu"}, "device_map: none on cpu"),
        ({"kv_offload": "/tmp"}, "kv_offload: none with device_map auto"),
        ({"cuda_graphs": True}, "cuda_graphs: false with device_map auto"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: 1 with device_map auto"),
        ({"device_map": "balanced"}, "device_map: .*'none' or 'auto'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_combinations_with_a_device_map_are_refused(make: Make, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(**{"device_map": "auto", **fields})


def test_weights_that_do_not_fit_are_not_left_on_the_host() -> None:
    module = nn.Linear(2, 2)
    placement.check_placed(module)
    module.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}  # type: ignore[assignment]
    placement.check_placed(module)
    module.hf_device_map = {"model.layers.0": 0, "model.layers.1": "disk"}  # type: ignore[assignment]
    with pytest.raises(Unsupported, match="do not fit on the CUDA devices together"):
        placement.check_placed(module)


def test_transformers_spreads_a_device_map() -> None:
    asked = EngineConfig(device_map="auto")
    assert placement.placed(asked, torch.device("cuda")) == {"device_map": "balanced"}
    assert placement.placed(EngineConfig(), torch.device("cuda:1")) == {"device_map": {"": torch.device("cuda:1")}}
