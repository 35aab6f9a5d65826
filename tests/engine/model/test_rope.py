"""Stretched rotary embeddings: frequencies, tokens, prefix-cache keys and refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from keysift.engine import EngineConfig, InvalidRequest, Request
from keysift.engine.model import embedded as embedded_model
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens
from tests.models import llama

WriteModel = Callable[[PreTrainedConfig], Path]
LIMIT, LONG = 512, 1280
SCALINGS = pytest.mark.parametrize("scaling", ["yarn", "linear"])
INSTALLED = importlib.util.find_spec(embedded_model.PACKAGE) is not None
installed = pytest.mark.skipif(not INSTALLED, reason=f"needs {embedded_model.INSTALL}")


def open_model(folder: Path | None, **fields: Any) -> LoadedModel:
    model = None if folder is None else str(folder)
    return load(EngineConfig(model=model, **({"dtype": "float32"} | fields)), lambda message: None)


def rotary(module: Any) -> Any:
    (found,) = (part for part in module.modules() if hasattr(part, "rope_type"))
    return found


def frequencies(module: Any) -> tuple[Tensor, float]:
    found = rotary(module)
    return found.inv_freq, found.attention_scaling


@pytest.fixture(scope="module")
def by_hand(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The same weights with a stretched embedding, written to the folder in the way of transformers."""

    def write(scaling: str) -> Any:
        folder = tmp_path_factory.mktemp(scaling) / "model"
        shutil.copytree(tiny_llama, folder)
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] |= {"rope_type": scaling, "factor": LONG / LIMIT}
        if scaling == "yarn":
            config["rope_parameters"]["original_max_position_embeddings"] = LIMIT
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONG}))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    return write


@SCALINGS
def test_frequencies_are_those_of_transformers(tiny_llama: Path, by_hand: Callable[[str], Any], scaling: str) -> None:
    model = open_model(tiny_llama, max_model_len=LONG, rope_scaling=scaling)
    assert model.max_model_len == LONG
    (ours, factor), (theirs, their_factor) = frequencies(model.module), frequencies(by_hand(scaling))
    assert torch.equal(ours, theirs)
    assert factor == their_factor
    assert not torch.equal(ours, frequencies(open_model(tiny_llama).module)[0])


def test_frequencies_are_those_of_the_papers(write_model: WriteModel) -> None:
    """Peng et al. (YaRN), arXiv 2309.00071, section 3: a channel that turns more than 32 times within the old length
    keeps its speed, one that turns less than once is slowed by the whole factor; Chen et al. slow all of them."""
    folder = write_model(llama(head_dim=64))
    channel = torch.arange(32, dtype=torch.float64)
    plain = 1e4 ** (-channel / 32)
    turns, factor = LIMIT * plain / (2 * math.pi), LONG / LIMIT
    linear, one = frequencies(open_model(folder, max_model_len=LONG, rope_scaling="linear").module)
    torch.testing.assert_close(linear.double(), plain / factor, rtol=1e-6, atol=0)
    assert one == 1
    yarn, warmth = frequencies(open_model(folder, max_model_len=LONG, rope_scaling="yarn").module)
    slowed = plain / yarn.double()
    beyond = 1.4  # the borders fall between two channels, and the code rounds them outwards
    torch.testing.assert_close(slowed[turns > 32 * beyond], torch.ones_like(slowed[turns > 32 * beyond]))
    torch.testing.assert_close(slowed[turns < 1 / beyond], torch.full_like(slowed[turns < 1 / beyond], factor))
    assert (slowed.diff() >= -1e-6).all()
    assert min((turns > 32 * beyond).sum(), (turns < 1 / beyond).sum()) > 2
    assert warmth == pytest.approx(0.1 * math.log(factor) + 1)


@SCALINGS
def test_tokens_beyond_the_limit_are_those_of_transformers(
    make: Make, by_hand: Callable[[str], Any], scaling: str
) -> None:
    engine = make(max_model_len=LONG, rope_scaling=scaling)
    for index, length in enumerate((LIMIT - 5, 900)):
        engine.add(Request(str(index), tokens(length, index), greedy(12)))
    outputs = drain(engine)
    model = by_hand(scaling)
    for index, length in enumerate((LIMIT - 5, 900)):
        prompt = torch.tensor([tokens(length, index)])
        with torch.inference_mode():
            out = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert said(outputs, str(index)) == out[0, length:].tolist()
        assert finish_of(outputs, str(index)).usage.completion_tokens == 12


def test_every_stretch_has_pages_of_its_own(tiny_llama: Path) -> None:
    stretches: list[dict[str, Any]] = [
        {},
        {"max_model_len": LONG, "rope_scaling": "yarn"},
        {"max_model_len": LONG, "rope_scaling": "linear"},
        {"max_model_len": 2 * LONG, "rope_scaling": "yarn"},
    ]
    assert len({open_model(tiny_llama, **fields).fingerprint for fields in stretches}) == len(stretches)


@pytest.mark.parametrize("length", [None, 100, LIMIT])
def test_within_the_limit_nothing_changes(tiny_llama: Path, length: int | None) -> None:
    plain, asked = open_model(tiny_llama), open_model(tiny_llama, max_model_len=length, rope_scaling="yarn")
    assert asked.fingerprint == plain.fingerprint
    assert asked.max_model_len == (length or LIMIT)
    assert torch.equal(frequencies(asked.module)[0], frequencies(plain.module)[0])


def test_layers_with_a_window_keep_their_frequencies(write_model: WriteModel) -> None:
    kinds = ["sliding_attention", "full_attention"]
    shape = llama(max_position_embeddings=LIMIT).to_diff_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: shape[name] for name in (*names, "num_key_value_heads", "head_dim", "max_position_embeddings")}
    folder = write_model(Gemma3TextConfig(**fields, layer_types=kinds, sliding_window=32, eos_token_id=2))
    plain, long = open_model(folder), open_model(folder, max_model_len=LONG, rope_scaling="linear")
    before, after = rotary(plain.module), rotary(long.module)
    assert torch.equal(before.sliding_attention_inv_freq, after.sliding_attention_inv_freq)
    torch.testing.assert_close(before.full_attention_inv_freq * LIMIT / LONG, after.full_attention_inv_freq)


def test_without_the_option_the_error_names_it(tiny_llama: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"max_model_len: at most 512, .* unless rope_scaling .* got 513"):
        open_model(tiny_llama, max_model_len=513)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": LIMIT // 2},
    "llama3": {"factor": 4.0} | LLAMA3,
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_embedding_is_not_scaled_again(write_model: WriteModel, kind: str) -> None:
    folder = write_model(llama(rope_parameters={"rope_type": kind, "rope_theta": 1e4} | SCALED[kind]))
    with pytest.raises(InvalidRequest, match=rf"rope_scaling: .*rope_type {kind}, .* at most 512, got 513"):
        open_model(folder, max_model_len=513, rope_scaling="yarn")
    assert open_model(folder, max_model_len=512, rope_scaling="yarn").max_model_len == 512


def test_positions_that_were_learnt_cannot_be_stretched(write_model: WriteModel) -> None:
    folder = write_model(GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(InvalidRequest, match=r"rope_scaling: .* got gpt2, which has none"):
        open_model(folder, max_model_len=65, rope_scaling="linear")


def test_other_names_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"rope_scaling: .*'yarn' or 'linear', got 'dynamic'"):
        EngineConfig(rope_scaling="dynamic")


@installed
def test_the_embedded_model_stretches() -> None:
    model = open_model(None, max_model_len=3 * 8192, rope_scaling="yarn")
    assert model.max_model_len == 3 * 8192
    parameters = model.module.config.rope_parameters
    assert parameters["factor"] == 3
    assert parameters["original_max_position_embeddings"] == 8192
    found = AutoModelForCausalLM.from_config(LlamaConfig(**model.module.config.to_dict()), dtype=torch.float32)
    assert torch.equal(frequencies(model.module)[0], frequencies(found)[0])


@installed
@pytest.mark.slow
def test_a_gguf_file_stretches() -> None:
    model = open_model(embedded_model.package_file(), max_model_len=2 * 8192, rope_scaling="linear")
    plain = open_model(embedded_model.package_file())
    assert model.max_model_len == 2 * 8192
    torch.testing.assert_close(frequencies(model.module)[0] * 2, frequencies(plain.module)[0])
    assert model.fingerprint != plain.fingerprint
