"""Prompt chunks run with few numbers of rows, and nobody sees the rows that were added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from keysift.attention import Attend
from keysift.engine.config import EngineConfig
from keysift.engine.model.cpu.linear import MAX_ROWS
from keysift.engine.model.cpu.padding import padded_length
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel

CPU = torch.device("cpu")
Dense = Callable[[LoadedModel, Tensor, Tensor], Attend]


def test_lengths_up_to_a_chunk_are_few() -> None:
    lengths = {padded_length(tokens, torch.bfloat16, CPU) for tokens in range(MAX_ROWS + 1, 1025)}
    assert len(lengths) == 52
    assert all(tokens <= padded_length(tokens, torch.bfloat16, CPU) <= 1.25 * tokens for tokens in range(1, 1025))
    assert max(lengths) == 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_compiles_nothing_is_not_padded(dtype: torch.dtype) -> None:
    """float32, other devices, and the few rows that the native kernels multiply."""
    device = CPU if dtype == torch.float32 else torch.device("cuda")
    assert [padded_length(tokens, dtype, device) for tokens in (1, 33, 100)] == [1, 33, 100]
    assert padded_length(MAX_ROWS, torch.bfloat16, CPU) == MAX_ROWS


@pytest.fixture
def tiny_bfloat16(tiny_llama: Path) -> LoadedModel:
    return load(EngineConfig(model=str(tiny_llama), dtype="bfloat16"), lambda message: None)


def test_a_forward_pass_over_many_lengths_meets_few(tiny_bfloat16: LoadedModel, dense: Dense) -> None:
    """What oneDNN compiles for: the rows of every product."""
    met: set[int] = set()
    for layer in tiny_bfloat16.module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _layer, given: met.add(given[0].shape[-2]))
    for tokens in range(40, 240, 3):
        order = torch.arange(tokens)
        tiny_bfloat16.forward(order, order, order[-1:], dense(tiny_bfloat16, torch.zeros(tokens), order))
    assert len(met - {1}) <= 19  # one row: the logits


def test_padding_changes_no_token(tiny_bfloat16: LoadedModel, dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, order = torch.randint(3, 259, (50,)), torch.arange(50)
    seen: list[int] = []

    def run() -> Tensor:
        attend = dense(tiny_bfloat16, torch.zeros(50), order)

        def counting(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.append(len(q))
            return attend(layer, q, k, v)

        return tiny_bfloat16.forward(tokens, order, order, counting)

    padded = run()
    monkeypatch.setattr("keysift.engine.model.loaded.padded_length", lambda tokens, dtype, device: tokens)
    torch.testing.assert_close(padded, run(), rtol=2e-2, atol=2e-2)
    assert len(padded) == 50
    assert set(seen) == {50}
