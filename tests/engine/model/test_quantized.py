"""8-bit weights: rounding, multiplication, and the laws of an engine over them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from keysift.engine import Engine, EngineConfig, InvalidRequest, Request
from keysift.engine.model.cpu.heap import release_heap
from keysift.engine.model.cpu.quantized import GROUP, Int8Linear, quantize, swap_linears
from keysift.engine.model.cpu.swap import swap_modules
from tests.engine.driver import drain, greedy, said, tokens
from tests.models import llama, save

native = pytest.importorskip("keysift.engine.model.cpu.native", exc_type=ImportError)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 3), st.floats(1e-6, 1e6))
def test_rounds_each_weight_to_the_nearest_step(seed: int, outputs: int, groups: int, size: float) -> None:
    weight = size * torch.randn(outputs, groups * GROUP, generator=torch.Generator().manual_seed(seed))
    rounded, scales = quantize(weight)
    steps = scales.double().repeat_interleave(GROUP, 1)
    assert torch.equal(scales, scales.bfloat16().float())
    assert bool(((weight.double() - rounded.double() * steps).abs() <= steps * 0.5000001).all())
    # No more than a step of bfloat16 above the least scale that cuts nothing off.
    least = weight.view(outputs, groups, GROUP).abs().amax(-1) / 127
    assert bool((scales <= least * (1 + 2**-6) + 1e-37).all())


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0])
def test_small_weights_keep_their_steps_in_float16(size: float) -> None:
    """float16 rounds the scales of such weights, but not the weights themselves."""
    linear = nn.Linear(GROUP, 8, bias=False, dtype=torch.float16)
    nn.init.normal_(linear.weight, std=size)
    layer = Int8Linear(linear)
    exact = layer.weight.double() * layer.scales.double().repeat_interleave(GROUP, 1)
    torch.testing.assert_close(layer.widened(), exact.half(), atol=0.0, rtol=0.0)


def test_zeros_stay_zeros() -> None:
    rounded, scales = quantize(torch.zeros(3, GROUP))
    assert not rounded.any()
    assert bool((scales > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "outputs", "inputs"), [(1, 1, 64), (3, 33, 128), (16, 70, 576), (5, 8, 1536)])
def test_few_rows_multiply_as_many_do(batch: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    from keysift.kvcache.native.library import isas, use_isa

    generator = torch.Generator().manual_seed(batch)
    linear = nn.Linear(inputs, outputs, dtype=dtype)
    layer = Int8Linear(linear)
    x = torch.randn(batch, inputs, generator=generator).to(dtype)
    assert layer.bias is not None
    exact = (
        x.double() @ (layer.weight.double() * layer.scales.double().repeat_interleave(GROUP, 1)).T + layer.bias.double()
    )
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close((x.double() @ layer.widened().double().T + layer.bias.double()), exact, **tolerance)
    for isa in isas():
        with use_isa(isa):
            out = layer(x)
            alone = torch.cat([layer(row[None]) for row in x])
        torch.testing.assert_close(out.double(), exact, **tolerance)
        assert torch.equal(out, alone), isa


def test_a_tied_embedding_is_not_rounded() -> None:
    model = nn.Sequential(nn.Embedding(50, GROUP), nn.Linear(GROUP, 50, bias=False), nn.Linear(33, 5))
    model[1].weight = model[0].weight  # type: ignore[union-attr]
    kept = model[0].weight.clone()  # type: ignore[union-attr]
    assert swap_linears(model) == 1
    assert torch.equal(model[0].weight, kept)  # type: ignore[arg-type]
    assert type(model[2]) is nn.Linear


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(**WIDE), tmp_path_factory.mktemp("wide"))


def engine(folder: Path, **fields: Any) -> Engine:
    sizes = {"kv_memory": 2**24, "prefill_chunk": 64}
    return Engine(
        EngineConfig(**{"model": str(folder), "strategy": "dense", "quantization": "int8", **sizes, **fields})
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_or_in_a_batch_the_same_tokens(folder: Path, dtype: str) -> None:
    """Law 4, prefix hits included."""
    prompts = [tokens(n, seed=n) for n in (70, 33, 5)]
    alone = engine(folder, dtype=dtype)
    expected = []
    for number, prompt in enumerate(prompts):
        alone.add(Request(str(number), prompt, greedy(12)))
        expected.append(said(drain(alone), str(number)))
    together = engine(folder, dtype=dtype)
    for turn in ("first", "again"):
        for number, prompt in enumerate(prompts):
            together.add(Request(f"{turn}{number}", prompt, greedy(12)))
        outputs = drain(together)
        assert [said(outputs, f"{turn}{number}") for number in range(3)] == expected


def test_takes_half_of_the_memory_and_another_name(folder: Path) -> None:
    plain, small = engine(folder, quantization="none", dtype="bfloat16"), engine(folder, dtype="bfloat16")
    assert plain.model.fingerprint != small.model.fingerprint
    linears = [m for m in small.model.module.modules() if isinstance(m, Int8Linear)]
    assert len(linears) == 2 * 7 + 1
    assert all(m.weight.dtype == torch.int8 and m.weight.numel() / 16 >= m.scales.numel() for m in linears)
    assert not any(p.shape[0] > 259 and p.dtype == torch.bfloat16 for p in small.model.module.parameters())


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another allocator than glibc's")
def test_the_weights_as_they_were_go_back_to_the_system() -> None:
    """Weights of 1 MiB, allocated on the heap like those of a model of this size."""
    release_heap()
    model = nn.Sequential(*(nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16) for _ in range(128)))
    swap_modules(model, "int8", layers=False)
    kept = psutil.Process().memory_info().rss
    release_heap()
    assert kept - psutil.Process().memory_info().rss < 2**24


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="quantization"):
        EngineConfig(quantization="int3")
