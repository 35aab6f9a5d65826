"""Dense kernels of prompts: all give the same tokens, and one that cannot run is refused at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keysift.attention.contiguous import KERNELS
from keysift.engine import Engine, EngineConfig, InvalidRequest, Request
from keysift.engine.calibration import calibration, crossover
from keysift.engine.model.load import load
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens
from tests.models import llama

Expected = Callable[[list[int], int], list[int]]


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries and keys of each chunk that torch's kernel computed in a layer."""
    chunks: list[tuple[int, int]] = []
    sdpa = KERNELS["sdpa"]

    def noted(q: Any, k: Any, v: Any, scale: float) -> Any:
        chunks.append((len(q), k.shape[1]))
        return sdpa(q, k, v, scale)

    monkeypatch.setitem(KERNELS, "sdpa", noted)
    return chunks


def test_chunked_batched_and_cached_prompts_give_the_same_tokens(
    make: Make, expected: Expected, chunks: list[tuple[int, int]]
) -> None:
    first, second = tokens(150), tokens(203, 1)
    third = (*first[:140], *tokens(30, 9))
    for kernel in ("paged", "sdpa"):
        engine = make(dense_kernel=kernel)
        engine.add(Request("first", first, greedy(12)))
        engine.add(Request("second", second, greedy(12)))
        outputs = drain(engine)
        engine.add(Request("third", third, greedy(12)))
        outputs += drain(engine)
        assert finish_of(outputs, "third").usage.cached_tokens == 128
        assert finish_of(outputs, "third").sparsity.prefill_density == 1.0
        for name, prompt in (("first", first), ("second", second), ("third", third)):
            assert said(outputs, name) == expected(list(prompt), 12), (kernel, name)
    of_first, of_second = [(64, 64), (64, 128), (22, 150)], [(64, 64), (64, 128), (64, 192), (11, 203)]
    assert sorted(chunks) == sorted(2 * [*of_first, *of_second, (42, 170)]), "two layers, and no token"


def test_a_sparse_strategy_that_reads_a_short_prompt_densely_takes_it(
    make: Make, chunks: list[tuple[int, int]]
) -> None:
    args = ("sink=16", "window=32", "dense_below=64")
    engine = make(strategy="streaming", strategy_args=args, dense_kernel="sdpa")
    for name, length in (("short", 60), ("long", 192)):
        engine.add(Request(name, tokens(length), greedy(3)))
        drain(engine)
    assert chunks == 2 * [(60, 60)] + 2 * [(64, 64)], "of the long one, its first chunk"


def test_layers_with_and_without_a_window(write_model: Callable[..., Path], chunks: list[tuple[int, int]]) -> None:
    from transformers import Gemma3TextConfig

    shape = {name: getattr(llama(), name) for name in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim")}
    kinds = ["sliding_attention", "full_attention"]
    folder = write_model(
        Gemma3TextConfig(
            **shape,
            num_hidden_layers=2,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=512,
            initializer_range=0.2,
            query_pre_attn_scalar=8,
            layer_types=kinds,
            sliding_window=32,
        )
    )
    answers = []
    for kernel in ("paged", "sdpa"):
        config = EngineConfig(
            model=str(folder), strategy="dense", dtype="float32", prefill_chunk=64, kv_memory=2**22, dense_kernel=kernel
        )
        engine = Engine(config)
        engine.add(Request("a", tokens(100), greedy(8)))
        answers.append(said(drain(engine), "a"))
    assert answers[0] == answers[1]
    assert chunks == [(64, 64), (36, 100)], "of the one layer that reads everything"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("flash-attn", "dense_kernel: flash-attn takes a CUDA device, got cpu"),
        ("flash", "dense_kernel: .*'paged', 'sdpa' or 'flash-attn', got 'flash'"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_at_the_start(make: Make, kernel: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(dense_kernel=kernel, device="cpu")


def test_crossovers_are_measured_against_the_kernel_that_runs(
    tiny_llama: Path, chunks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(crossover.LENGTH, "cpu", 128)
    fields: dict[str, Any] = {"model": str(tiny_llama), "dtype": "float32", "prefill_chunk": 64, "device": "cpu"}
    model = load(EngineConfig(**fields), lambda message: None)
    measured = crossover.measure(EngineConfig(**fields, dense_kernel="sdpa"), model, lambda done, total: None)
    assert set(chunks) == {(64, 64), (64, 128)}
    assert measured.setting == calibration.setting(EngineConfig(**fields, dense_kernel="sdpa"), model)
    assert measured.setting != calibration.setting(EngineConfig(**fields), model)
    with pytest.raises(InvalidRequest, match="dense_kernel: flash-attn takes a CUDA device, got cpu"):
        crossover.measure(EngineConfig(**fields, dense_kernel="flash-attn"), model, lambda done, total: None)
