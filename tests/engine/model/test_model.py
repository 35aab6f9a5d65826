"""Decoders of transformers give the same logits through the engine's attention, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from keysift.attention import Attend
from keysift.engine.config import EngineConfig
from keysift.engine.devices import choose_device, choose_dtype
from keysift.engine.engine import Engine
from keysift.engine.errors import InvalidRequest, ModelNotFound, Unsupported
from keysift.engine.model import seam
from keysift.engine.model.cpu.linear import KERNEL_ROWS, MAX_ROWS, DecodeLinear, native_kernel, swap_linears
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel
from keysift.engine.request import Request, SamplingParams, TokenOutput

WriteModel = Callable[[PreTrainedConfig], Path]
Dense = Callable[[LoadedModel, Tensor, Tensor], Attend]
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
PHI3 = Phi3Config(**SHAPE, original_max_position_embeddings=64, rope_parameters=LONGROPE)
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]

SERVED = {
    "llama": (LlamaConfig(**SHAPE), (0, 0, 0), 8**-0.5),
    "llama-dynamic-rope": (
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        (0, 0, 0),
        8**-0.5,
    ),
    "qwen2": (Qwen2Config(**SHAPE), (0, 0, 0), 8**-0.5),
    "qwen3": (Qwen3Config(**SHAPE), (0, 0, 0), 8**-0.5),
    "mistral-window": (MistralConfig(**SHAPE, sliding_window=16), (16, 16, 16), 8**-0.5),
    "gemma3": (
        Gemma3TextConfig(
            **SHAPE,
            sliding_window=16,
            query_pre_attn_scalar=20,
            layer_types=SLIDING,
            final_logit_softcapping=5.0,
        ),
        (16, 16, 0),
        20**-0.5,
    ),
}
MLA = {key: value for key, value in SHAPE.items() if key != "head_dim"} | {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
REFUSED = {
    "softcap": (Gemma2Config(**SHAPE, sliding_window=16), "Gemma2Attention: cannot honour softcap"),
    "sinks": (GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1), "GptOssAttention: .* s_aux"),
    "bidirectional": (Gemma3TextConfig(**SHAPE, use_bidirectional_attention=True), "Gemma3Attention: .* is_causal"),
    "chunked": (Llama4TextConfig(**SHAPE, attention_chunk_size=16, num_local_experts=2), "chunked_attention"),
    "value-dim": (DeepseekV3Config(**MLA), "head_dim of queries is 16, of values 8"),
    "alibi": (BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), "(?i)bloom"),
    "own-attention": (
        FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "keysift",
    ),
    "no-attention": (MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), "MambaForCausalLM"),
    "longrope": (
        Phi3Config(**SHAPE, original_max_position_embeddings=64, rope_parameters=LONGROPE),
        "longrope: .* at most 64, got 128",
    ),
}


def quiet(_message: str) -> None:
    """Drop progress messages."""


def open_model(folder: Path, **fields: Any) -> LoadedModel:
    return load(EngineConfig(model=str(folder), **({"dtype": "float32"} | fields)), quiet)


@pytest.mark.parametrize("name", SERVED)
def test_equals_the_library_for_every_position(name: str, write_model: WriteModel, dense: Dense) -> None:
    config, windows, scale = SERVED[name]
    folder = write_model(config)
    model = open_model(folder)
    assert (model.num_layers, model.num_query_heads, model.num_kv_heads, model.head_dim) == (3, 4, 2, 8)
    assert (model.windows, model.scale) == (windows, pytest.approx(scale))
    assert (model.vocab_size, model.max_model_len, model.eos_token_ids) == (97, 128, {2, 5})

    tokens, positions = torch.randint(3, 97, (50,)), torch.arange(50)
    logits = model.forward(tokens, positions, positions, dense(model, torch.zeros(50), positions))
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(logits, eager(tokens[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SERVED)
def test_the_engine_gives_the_tokens_of_transformers(name: str, write_model: WriteModel) -> None:
    folder = write_model(SERVED[name][0])
    engine = Engine(EngineConfig(model=str(folder), dtype="float32", prefill_chunk=64, kv_memory=2**22))
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    prompts = [torch.randint(6, 97, (length,)) for length in (70, 9)]
    said: dict[str, list[int]] = {"0": [], "1": []}
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_new_tokens=20, ignore_eos=True)
        engine.add(Request(str(index), tuple(prompt.tolist()), params))
    while engine.has_work:
        for output in engine.step():
            said[output.request_id] += output.token_ids if isinstance(output, TokenOutput) else ()
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            out = eager.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert said[str(index)] == out[0, len(prompt) :].tolist()


def test_packed_sequences_are_independent(tiny_llama: Path, dense: Dense) -> None:
    model = open_model(tiny_llama)
    lengths = (17, 1, 40)
    positions = torch.cat([torch.arange(length) for length in lengths])
    sequences = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    tokens, last = torch.randint(3, 259, (sum(lengths),)), torch.tensor(lengths).cumsum(0) - 1
    packed = model.forward(tokens, positions, last, dense(model, sequences, positions))
    for sequence, length in enumerate(lengths):
        own, order = sequences == sequence, torch.arange(length)
        alone = model.forward(tokens[own], order, order[-1:], dense(model, torch.zeros(length), order))
        torch.testing.assert_close(packed[sequence], alone[0], rtol=1e-5, atol=1e-5)


def test_a_chunk_that_samples_nothing_gives_no_logits(tiny_llama: Path, dense: Dense) -> None:
    model, positions = open_model(tiny_llama), torch.arange(5)
    none = torch.empty(0, dtype=torch.long)
    assert model.forward(positions, positions, none, dense(model, positions * 0, positions)).shape == (0, 259)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name: str, write_model: WriteModel) -> None:
    config, message = REFUSED[name]
    folder = write_model(config)
    with pytest.raises(Unsupported, match=message):
        open_model(folder)


def test_longrope_runs_where_its_frequencies_are_constant(write_model: WriteModel) -> None:
    folder = write_model(PHI3)
    assert open_model(folder, max_model_len=64).max_model_len == 64


def test_refuses_an_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="T5Config"):
        open_model(tmp_path)


def test_a_model_is_not_loaded_from_pickles(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="safetensors"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [("./nowhere", "no such folder or file"), ("a/b/c", "no such"), ("x.gguf", "no such"), (__file__, r"\.gguf file")],
)
def test_missing_models_are_named(model: str, message: str) -> None:
    with pytest.raises(ModelNotFound, match=message):
        load(EngineConfig(model=model), quiet)


def test_a_hub_name_without_network_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="keysift-tests/no-such-model"):
        load(EngineConfig(model="keysift-tests/no-such-model"), quiet)


def test_max_model_len_is_bounded_by_the_model(tiny_llama: Path) -> None:
    assert open_model(tiny_llama, max_model_len=100).max_model_len == 100
    with pytest.raises(InvalidRequest, match=r"max_model_len: at most 512, .* got 513"):
        open_model(tiny_llama, max_model_len=513)


def test_names_and_fingerprints(tiny_llama: Path, write_model: WriteModel) -> None:
    model, again = open_model(tiny_llama), open_model(tiny_llama, served_model_name="mine")
    assert (model.name, again.name) == (tiny_llama.name, "mine")
    assert model.fingerprint == again.fingerprint
    assert model.fingerprint != open_model(tiny_llama, dtype="bfloat16").fingerprint
    assert model.fingerprint != open_model(write_model(LlamaConfig(**SHAPE))).fingerprint


def test_devices_and_dtypes() -> None:
    with pytest.raises(InvalidRequest, match="device: auto, cpu, cuda or cuda:N, got 'tpu9'"):
        choose_device("tpu9")
    with pytest.raises(InvalidRequest, match="CUDA devices here, got 'cuda:99'"):
        choose_device("cuda:99")
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("float16", torch.device("cpu")) is torch.float16
    assert choose_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("argument", [*seam.REFUSED, "attention_mask", "dropout", "is_causal", "attend"])
def test_arguments_that_cannot_be_honoured_are_refused(argument: str) -> None:
    module, states = nn.Module().train(), torch.zeros(1, 2, 3, 8)
    module.layer_idx = 0  # type: ignore[assignment]
    arguments: dict[str, Any] = {"attention_mask": None, "attend": lambda layer, q, k, v: q}
    arguments |= {argument: {"dropout": 0.1, "is_causal": False, "attend": None}.get(argument, states)}
    with pytest.raises(Unsupported, match=argument):
        seam.attention(module, states, states, states, **arguments)


def test_the_seam_copies_nothing() -> None:
    module, seen = nn.Module().eval(), {}
    module.layer_idx = 7  # type: ignore[assignment]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[layer] = [q.data_ptr(), k.data_ptr(), v.data_ptr(), q.shape]
        return q

    projected = [torch.randn(1, 3, heads, 8) for heads in (4, 2, 2)]  # [1, T, heads, D], as a model computes them
    out, weights = seam.attention(module, *(part.transpose(1, 2) for part in projected), None, attend=attend)
    assert seen == {7: [*(part.data_ptr() for part in projected), (3, 4, 8)]}
    assert weights is None
    assert out.shape == (1, 3, 4, 8)
    assert out.data_ptr() == projected[0].data_ptr()


def test_swapped_linears_share_weights_and_keep_ties(tiny_llama: Path) -> None:
    calls = []

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(len(x))
        return functional.linear(x, weight, bias)

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert swap_linears(model, kernel) == 2 * 7 + 1
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    layer = DecodeLinear(nn.Linear(6, 5), kernel)
    calls.clear()
    with torch.inference_mode():
        for rows in (1, MAX_ROWS, MAX_ROWS + 1):
            x = torch.randn(1, rows, 6)
            torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias))
    assert calls == [1, KERNEL_ROWS, KERNEL_ROWS]


@pytest.mark.skipif(native_kernel() is None, reason="the native library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_native_linear_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    kernel = native_kernel()
    assert kernel is not None
    layer = DecodeLinear(nn.Linear(192, 80).to(dtype), kernel)
    with torch.inference_mode():
        x = torch.randn(MAX_ROWS, 192).to(dtype)
        together = layer(x)
        assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(
            together.float(),
            functional.linear(x.float(), layer.weight.float(), layer.bias.float()),
            rtol=tolerance,
            atol=tolerance,
        )
