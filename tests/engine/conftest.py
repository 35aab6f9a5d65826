"""Model folders for the engine's tests, and a plain dense attention as reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from keysift.attention import Attend
from keysift.engine import Engine, EngineConfig
from keysift.engine.model.loaded import LoadedModel
from tests.engine.driver import Make, drain
from tests.models import llama, make_tokenizer, save


def attend_densely(model: LoadedModel, sequences: Tensor, positions: Tensor) -> Attend:
    """Causal softmax attention with the model's scale and windows among the tokens of each sequence, all [T]."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = model.num_query_heads // model.num_kv_heads
        distance = positions[:, None] - positions[None]  # [T, T]
        seen = (sequences[:, None] == sequences[None]) & (distance >= 0)
        if window := model.windows[layer]:
            seen &= distance < window
        scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(groups, 1)).float() * model.scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype)
        return torch.einsum("hts,shd->thd", weights, v.repeat_interleave(groups, 1))

    return attend


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def dense() -> Callable[[LoadedModel, Tensor, Tensor], Attend]:
    return attend_densely


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedConfig], Path]:
    """Writes a randomly initialised model of a configuration, with the byte tokenizer, and returns its folder."""

    def write(config: PreTrainedConfig) -> Path:
        return save(config, tmp_path_factory.mktemp(config.model_type))

    return write


@pytest.fixture(scope="session")
def tiny_llama(write_model: Callable[[PreTrainedConfig], Path]) -> Path:
    """A Llama of two layers with 4 query and 2 KV heads of 8, 259 tokens and 512 positions."""
    return write_model(llama())


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Make]:
    """Builds engines over the tiny model, and checks after the test that drained engines have all pages free."""
    engines: list[Engine] = []

    def build(**config: Any) -> Engine:
        fields = {"model": str(tiny_llama), "strategy": "dense", "dtype": "float32"}
        sizes = {"prefill_chunk": 64, "kv_memory": 2**22}
        engines.append(Engine(EngineConfig(**fields | sizes | config)))
        return engines[-1]

    yield build
    for engine in engines:
        drain(engine)
        assert engine.status.pages_free == engine.status.pages_total


@pytest.fixture(scope="session")
def expected(tiny_llama: Path) -> Callable[[list[int], int], list[int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")

    def generate(prompt: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
        return out[0, len(prompt) :].tolist()

    return generate
