"""Key bias: a checkpoint follows its paper's equations on every path, or is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from keysift.attention import bind, block, make
from keysift.engine import Engine, EngineConfig, Request, Unsupported
from keysift.engine.model import key_bias as product
from keysift.engine.model.cpu import swap
from keysift.engine.model.load import load
from keysift.kvcache import Span
from keysift.kvcache.ops import use_backend
from tests.engine.driver import drain, greedy, said, tokens
from tests.models import llama, save
from tests.replaying import Recorder
from tests.strategies import ROWS

LAYERS, KV_HEADS, DIM = 2, 2, 8
CONFIG = llama(max_position_embeddings=1024)
Tensors = dict[str, Tensor]


def biases() -> Tensors:
    """Biases of about -3 to 3, of either sign, that differ between tokens and heads."""
    generator = torch.Generator().manual_seed(0)
    found: Tensors = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn."
        found[name + "A"] = torch.tensor([1.5, -1.0]) * (layer + 1)
        found[name + "delta.weight"] = torch.randn(KV_HEADS, KV_HEADS * DIM, generator=generator)
        found[name + "delta.bias"] = torch.randn(KV_HEADS, generator=generator)
    return found


def write(folder: Path, tensors: Tensors, config: Any = CONFIG) -> Path:
    """Folder of the tiny Llama with these tensors added to its own."""
    save(config, folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("biased"), biases())


def oracle_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, scaling: float, **_others: Any
) -> tuple[Tensor, None]:
    """a_j ~ exp(b_j) exp(q . k_j scale), b = A softplus(delta(concat(v))): the paper's equations."""
    tensors: Tensors = module.config.biases
    name = f"model.layers.{module.layer_idx}.self_attn."
    (_, heads, length, _), kv_heads = query.shape, key.shape[1]
    flat = value[0].transpose(0, 1).flatten(1)  # [T, Hkv * D]
    inner = flat @ tensors[name + "delta.weight"].to(flat).T + tensors.get(name + "delta.bias", torch.zeros(())).to(
        flat
    )
    b = tensors[name + "A"].to(flat) * torch.log1p(inner.exp())  # [T, Hkv]
    out = torch.zeros_like(query)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        weights = (query[0, head] @ key[0, kv].T * scaling).exp() * b[:, kv].exp() * torch.ones(length, length).tril()
        out[0, head] = weights @ value[0, kv] / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2), None


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Callable[[list[int]], Tensor]:
    """Logits [T, V] float64 of a whole text."""
    AttentionInterface.register("biased_oracle", oracle_attention)
    AttentionMaskInterface.register("biased_oracle", lambda *args, **kwargs: None)
    logging.getLogger("transformers.modeling_utils").disabled = True
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="biased_oracle")
    logging.getLogger("transformers.modeling_utils").disabled = False
    model.config.biases = biases()

    def logits(text: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([text]), use_cache=False).logits[0]

    return logits


def start(folder: Path, **fields: Any) -> Engine:
    sizes = {"dtype": "float32", "strategy": "dense", "prefill_chunk": 64, "kv_memory": 2**24}
    return Engine(EngineConfig(model=str(folder), **sizes | fields))


def generate(engine: Engine, prompt: tuple[int, ...], count: int, **fields: Any) -> list[int]:
    engine.add(Request("r", prompt, greedy(count), **fields))
    return said(drain(engine), "r")


def greedily(logits: Callable[[list[int]], Tensor], prompt: tuple[int, ...], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits(text)[-1].argmax()))
    return text[len(prompt) :]


def logits_of(engine: Engine, text: tuple[int, ...], prompt_len: int) -> Tensor:
    """Logits [T, V]: of the prompt in chunks of 64, then token by token."""
    cache, model, found = engine.cache, engine.model, []
    cache.reserve(sequence := cache.open(), len(text))
    ids = torch.tensor(text)
    chunks = [(start, min(64, prompt_len - start)) for start in range(0, prompt_len, 64)]
    for begin, length in chunks + [(position, 1) for position in range(prompt_len, len(text))]:
        span = Span(sequence, begin, length)
        step = cache.prefill(span, 64) if begin < prompt_len else cache.decode([span])
        attend = bind(make("dense"), cache, step)
        found.append(model.forward(ids[begin : begin + length], step.positions, torch.arange(length), attend))
    cache.release(sequence)
    return torch.cat(found)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_are_the_papers_in_chunks_and_token_by_token(folder: Path, oracle: Any, backend: str) -> None:
    engine, text = start(folder), tokens(150)
    with use_backend(backend):  # type: ignore[arg-type]
        torch.testing.assert_close(logits_of(engine, text, 133).double(), oracle(list(text)), rtol=1e-4, atol=1e-4)


def test_logits_without_the_bias_are_another_models(folder: Path, oracle: Any, tmp_path: Path) -> None:
    text = tokens(150)
    plain = logits_of(start(write(tmp_path, {})), text, 133).double()
    assert (plain - oracle(list(text))).abs().max() > 0.5


def test_bfloat16_is_as_near_as_bfloat16_is_without_a_bias(folder: Path, oracle: Any, tmp_path: Path) -> None:
    text = tokens(150)
    plain = write(tmp_path, {})
    error, usual = (
        (logits_of(start(place, dtype="bfloat16"), text, 133) - truth).abs().mean()
        for place, truth in ((folder, oracle(list(text))), (plain, logits_of(start(plain), text, 133)))
    )
    assert error < 1.5 * usual


@pytest.mark.parametrize("bias", [1.0, 30.0, -30.0])
def test_bfloat16_channels_lose_no_bias(bias: float) -> None:
    """With one channel of 8 bits alone, a bias of 30 would be off by up to 0.06, and a weight by 6 %."""
    layer = product.KeyBias(torch.tensor([bias]), torch.randn(1, 8) / 30, None)
    q, k = torch.randn(2, 50, 1, 8).bfloat16()
    seen: list[Tensor] = []

    def scores(_layer: int, wide_q: Tensor, wide_k: Tensor, wide_v: Tensor) -> Tensor:
        assert wide_q.shape == wide_k.shape == wide_v.shape == (50, 1, 16)
        assert wide_v[..., 8:].abs().max() == 0
        seen.append(torch.einsum("qhd,khd->qk", wide_q.double(), wide_k.double()) * 8**-0.5)
        return torch.zeros_like(wide_q)

    v = torch.randn(50, 1, 8).bfloat16()
    assert layer.attend(scores, 0, q, k, v, 8**-0.5).shape == (50, 1, 8)
    b = bias * torch.nn.functional.softplus(v[:, 0].double() @ layer.weight.double().T)[:, 0]
    exact = torch.einsum("qhd,khd->qk", q.double(), k.double()) * 8**-0.5 + b
    torch.testing.assert_close(seen[0], exact, rtol=0, atol=abs(bias) * 2e-5)


def test_pages_carry_their_mean_bias(engine: Engine) -> None:
    """Scores that a strategy trained with the bias computes from the cache are the model's."""
    attention = engine.model.module.model.layers[1].self_attn  # type: ignore[union-attr, index]
    cache, layer, found = engine.cache, product.of(attention), []  # type: ignore[arg-type]
    assert layer is not None
    cache.reserve(sequence := cache.open(), 33)
    v = torch.randn(33, KV_HEADS, DIM)

    def note(number: int, q: Tensor, k: Tensor, wide_v: Tensor) -> Tensor:
        cache.append(number, k, wide_v, step)
        found.append(block.biases(q, cache.context(number, step)))
        return q

    for span in (Span(sequence, 0, 32), Span(sequence, 32, 1)):
        step = cache.decode([span]) if span.length == 1 else cache.prefill(span, 64)
        q, k = torch.randn(span.length, 4, DIM), torch.randn(span.length, KV_HEADS, DIM)
        layer.attend(note, 1, q, k, v[span.start : span.stop], engine.model.scale)
    cache.release(sequence)
    means = layer(v[:32]).unflatten(0, (2, 16)).mean(1)  # [F, Hkv]
    torch.testing.assert_close(found[1][0, :, :2], means.T)


@pytest.mark.parametrize(("head_dim", "whole"), [(8, 16), (14, 16), (64, 80), (120, 128), (128, 144)])
def test_wide_heads_fit_every_native_kernel(head_dim: int, whole: int) -> None:
    assert head_dim + product.channels(head_dim) == whole


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("chunk", [64, 1024])
def test_dense_follows_the_paper(folder: Path, oracle: Any, backend: str, chunk: int) -> None:
    engine, prompt = start(folder, backend=backend, prefill_chunk=chunk), tokens(140, seed=3)
    assert generate(engine, prompt, 20) == greedily(oracle, prompt, 20)


FULL = [row for row in ROWS if row.full]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return start(folder)


@pytest.fixture(scope="module")
def plain_engine(folder: Path) -> Engine:
    return start(folder, backend="reference")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("row", FULL, ids=[f"{row.name} {row.full}" for row in FULL])
def test_every_strategy_that_reads_everything_follows_the_paper(
    engine: Engine, plain_engine: Engine, oracle: Any, row: Any, backend: str
) -> None:
    prompt, engine = tokens(140, seed=3), engine if backend == "auto" else plain_engine
    arguments = tuple(f"{key}={value}" for key, value in ({"dense_below": 0} | row.full).items())
    fields = {"strategy": row.name, "strategy_args": arguments, "bypass_prefix_cache": True}
    assert generate(engine, prompt, 12, **fields) == greedily(oracle, prompt, 12)


TRAINED = ("kernel_size=16", "kernel_stride=8", "block_size=16", "window_size=16", "topk=6", "query_blocks=4")


@pytest.mark.parametrize("name", ["nosa-trained", "dense"])
def test_replayed_steps_follow_the_paper(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(swap, "native_kernel", lambda: None)  # its work would not show among the ops of torch
    options = ("dense_below=0", *TRAINED) if name != "dense" else ()
    fields = {"strategy": name, "strategy_args": options}
    plain, replaying = (start(folder, backend="reference", page_size=8) for _ in range(2))
    replaying.runner.record(recorder := Recorder())
    prompt = tokens(200, seed=3)
    assert generate(replaying, prompt, 40, **fields) == generate(plain, prompt, 40, **fields)
    assert recorder.replayed > 30


def test_the_cache_knows_content_from_bias(engine: Engine) -> None:
    spec = engine.cache.spec
    assert (spec.head_dim, spec.bias_channels, spec.content_dim) == (16, 8, 8)
    assert spec.softmax_scale == engine.model.scale == 8**-0.5
    assert (engine.model.head_dim, engine.model.bias_channels) == (8, 8)


def test_a_model_without_the_tensors_has_no_bias(tmp_path: Path) -> None:
    model = load(EngineConfig(model=str(write(tmp_path, {})), dtype="float32"), lambda line: None)
    assert model.bias_channels == 0


def test_shards_and_a_linear_without_bias(tmp_path: Path) -> None:
    """The same model in two files with an index, whose `delta` has no bias, which equals one of zero."""
    zero = {name: tensor * (not name.endswith("bias")) for name, tensor in biases().items()}
    whole, parts = write(tmp_path / "whole", zero), write(tmp_path / "parts", {})
    without = {name: tensor for name, tensor in biases().items() if not name.endswith("bias")}
    own = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    files = {"model-1-of-2.safetensors": own, "model-2-of-2.safetensors": without}
    for name, tensors in files.items():
        save_file(tensors, parts / name, {"format": "pt"})
    weights = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    text = tokens(40)
    torch.testing.assert_close(logits_of(start(parts), text, 30), logits_of(start(whole), text, 30))


def test_names_without_a_prefix(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, biases())
    tensors = load_file(file := tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, file, {"format": "pt"})
    assert torch.equal(logits_of(start(tmp_path), text := tokens(40), 30), logits_of(start(folder), text, 30))


@pytest.mark.parametrize("part", ["A", "delta.weight", "delta.bias"])
def test_the_fingerprint_covers_them(folder: Path, tmp_path: Path, part: str) -> None:
    changed = biases()
    changed[f"model.layers.1.self_attn.{part}"] *= 1.5
    fingerprints = [
        load(EngineConfig(model=str(place), dtype="float32"), lambda line: None).fingerprint
        for place in (folder, write(tmp_path, changed), write(tmp_path / "plain", {}))
    ]
    assert len(set(fingerprints)) == 3


REFUSED = {
    "A alone": ({"1.self_attn.delta.weight": None}, r"layer 1 lacks self_attn\.delta\.weight"),
    "delta alone": ({"0.self_attn.A": None}, r"layer 0 lacks self_attn\.A"),
    "a layer missing": ({f"1.self_attn.{part}": None for part in product.PARTS}, r"layer 1 lacks self_attn\.A"),
    "a bias missing": ({"1.self_attn.delta.bias": None}, r"layer 1 lacks self_attn\.delta\.bias"),
    "a layer too many": ({"2.self_attn.A": torch.ones(2)}, "2 layers: has tensors of layer 2"),
    "A's shape": ({"1.self_attn.A": torch.ones(4)}, r"model\.layers\.1\.self_attn\.A: shape \(4,\).* need \(2,\)"),
    "delta's shape": (
        {"0.self_attn.delta.weight": torch.ones(2, 8)},
        r"model\.layers\.0\.self_attn\.delta\.weight: shape \(2, 8\), but 2 KV heads of 8 need \(2, 16\)",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_half_a_bias_is_refused(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    tensors: dict[str, Tensor | None] = {**biases(), **{f"model.layers.{key}": x for key, x in changes.items()}}
    write(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(Unsupported, match=message):
        load(EngineConfig(model=str(tmp_path), dtype="float32"), lambda line: None)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_no_warning_of_tensors_that_are_served(folder: Path, warnings: list[str]) -> None:
    load(EngineConfig(model=str(folder), dtype="float32"), lambda line: None)
    assert warnings == []


def test_other_tensors_are_still_reported(tmp_path: Path, warnings: list[str]) -> None:
    write(tmp_path, biases() | {"model.layers.0.self_attn.other": torch.ones(2)})
    load(EngineConfig(model=str(tmp_path), dtype="float32"), lambda line: None)
    assert any("other" in line for line in warnings)


@pytest.mark.parametrize(("longest", "reported"), [(16_384, False), (16_385, True)])
def test_contexts_beyond_the_trained_ones_are_reported(tmp_path: Path, longest: int, reported: bool) -> None:
    lines: list[str] = []
    write(tmp_path, biases(), llama(max_position_embeddings=32_768))
    load(EngineConfig(model=str(tmp_path), dtype="float32", max_model_len=longest), lines.append)
    assert any("trained on 16384 tokens" in line for line in lines) == reported
