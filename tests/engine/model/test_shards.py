"""Tensor-parallel parts of a model: even shares of the heads, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from keysift.engine import EngineConfig, InvalidRequest
from keysift.engine.errors import Unsupported
from keysift.engine.model.checks import check_model
from keysift.engine.model.seam import AttentionCall
from keysift.engine.model.shards import check_split, own, placed, splits_weights
from keysift.engine.parallel.group import assemble

TEXT = SimpleNamespace(model_type="llama", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)


def call(query_heads: int, kv_heads: int) -> AttentionCall:
    return AttentionCall(0, query_heads, kv_heads, head_dim=8, scale=1.0, window=0, device=torch.device("cpu"))


def test_an_even_share_of_the_heads_is_taken() -> None:
    check_split(call(2, 1), TEXT, 2)
    check_split(call(4, 2), TEXT, 1)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 2), (2, 2), (4, 1)])
def test_heads_that_the_plan_left_whole_are_refused(query_heads: int, kv_heads: int) -> None:
    with pytest.raises(Unsupported, match="llama: its tensor parallel plan does not split attention by heads"):
        check_split(call(query_heads, kv_heads), TEXT, 2)


def test_a_bias_that_mixes_all_heads_is_refused() -> None:
    module = nn.Module()
    module.config = SimpleNamespace(get_text_config=lambda decoder: TEXT)  # type: ignore[assignment]
    calls, split = [call(2, 1)], EngineConfig(tensor_parallel_size=2)
    check_model(split, module, calls, 16, biased=False)
    with pytest.raises(Unsupported, match="tensor_parallel_size: 1 with a checkpoint that has a bias of its keys"):
        check_model(split, module, calls, 16, biased=True)


def test_a_transformers_that_cannot_share_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert splits_weights()
    monkeypatch.setitem(sys.modules, "transformers.distributed", None)
    with pytest.raises(
        InvalidRequest, match=r"tensor_parallel_size: 1 with a transformers that has no DistributedConfig, .*, got 2"
    ):
        assemble(EngineConfig(model=str(tiny_llama), tensor_parallel_size=2), lambda message: None)
    assert placed(EngineConfig(), torch.device("cpu")) == {"device_map": None}


def test_a_tensor_of_one_process_is_its_own() -> None:
    whole = torch.ones(2)
    assert own(whole) is whole
