"""Decoder layers in two native calls give the results of the layers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from keysift.engine import EngineConfig
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel
from tests.models import llama, save

layers = pytest.importorskip("keysift.engine.model.cpu.decode_layer", exc_type=ImportError)
SHAPE: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SWAPPED = {
    "llama": llama(**SHAPE),
    "llama with biases": llama(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**{name: value for name, value in SHAPE.items() if name != "head_dim"}),
}
KEPT = {
    "gemma": GemmaConfig(**SHAPE),  # its norm adds one to the weight, and its activation is another
    "qwen3": Qwen3Config(**SHAPE),  # it has norms between projections and rotary embedding
    "llama with another activation": llama(**SHAPE, hidden_act="gelu"),
    "llama of an odd width": llama(**SHAPE | {"intermediate_size": 80}),
}


def loaded(config: PreTrainedConfig, folder: Path, dtype: str = "float32") -> LoadedModel:
    return load(EngineConfig(model=str(save(config, folder)), dtype=dtype), lambda message: None)


def swapped(model: LoadedModel) -> list[Any]:
    return [module for module in model.module.modules() if isinstance(module, layers.DecodeLayer)]


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 32, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(SWAPPED))
def test_equals_the_layer(name: str, dtype: str, rows: int, tmp_path: Path) -> None:
    model = loaded(SWAPPED[name], tmp_path, dtype)
    fast = swapped(model)
    assert len(fast) == 2
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, 64, generator=generator).to(model.dtype)
    angles = torch.rand(1, rows, model.head_dim // 2, generator=generator).repeat(1, 1, 2)
    options = {"position_embeddings": (angles.cos().to(x.dtype), angles.sin().to(x.dtype)), "attend": layers._mix}
    with torch.inference_mode():
        for layer in fast:
            expected, got = layer.layer(x, attention_mask=None, **options), layer(x, attention_mask=None, **options)
            tolerance = 1e-5 if dtype == "float32" else 2e-2
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
            if rows <= 32:
                one = tuple(turn[:, :1] for turn in options["position_embeddings"])  # type: ignore[index]
                alone = layer(x[:, :1], position_embeddings=one, attend=layers._mix)
                assert torch.equal(alone, got[:, :1])


@pytest.mark.parametrize("name", sorted(KEPT))
def test_other_layers_are_not_swapped(name: str, tmp_path: Path) -> None:
    assert not swapped(loaded(KEPT[name], tmp_path))


def test_every_instruction_set_gives_the_same(tmp_path: Path) -> None:
    from keysift.kvcache.native.library import isas, use_isa

    (layer, _) = swapped(loaded(SWAPPED["llama"], tmp_path))
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    turns = (torch.ones(1, 3, 16), torch.zeros(1, 3, 16))
    for isa in isas():
        with use_isa(isa), torch.inference_mode():
            got = layer(x, position_embeddings=turns, attend=layers._mix)
            torch.testing.assert_close(
                got, layer.layer(x, position_embeddings=turns, attend=layers._mix), atol=1e-5, rtol=1e-5
            )


def test_attributes_are_those_of_the_layer(tmp_path: Path) -> None:
    (layer, _) = swapped(loaded(SWAPPED["llama"], tmp_path))
    assert layer.hidden_size == 64
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = layer.nothing_such
