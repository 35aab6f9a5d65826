"""A whole model folder, small enough to write and load in a blink."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from keysift.attention import Attend
from keysift.engine.model import LoadedModel

SPECIAL = ("<unk>", "<|start|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for every byte, after three special ones: 259 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=chat_template,
    )


def attend_densely(model: LoadedModel, sequences: Tensor, positions: Tensor) -> Attend:
    """Causal softmax attention with the model's scale and windows among the tokens of each sequence, all [T]."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = model.num_query_heads // model.num_kv_heads
        behind = positions[:, None] - positions[None]  # [T, T]
        seen = (sequences[:, None] == sequences[None]) & (behind >= 0)
        if window := model.windows[layer]:
            seen &= behind < window
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
        folder = tmp_path_factory.mktemp(config.model_type)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_llama(write_model: Callable[[PreTrainedConfig], Path]) -> Path:
    """A Llama of two layers with 4 query and 2 KV heads of 8, 259 tokens and 512 positions."""
    return write_model(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
