"""Complete model folders, small enough to write and load at once."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from packaging.version import Version
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from keysift.engine.model import embedded

needs_embedded = pytest.mark.skipif(
    importlib.util.find_spec(embedded.PACKAGE) is None, reason=f"needs {embedded.INSTALL}"
)
splits_odd_heads = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 does not split a head of 259 outputs between two ranks, 5.23 and later do",
)
SPECIAL = ("<unk>", "<|start|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Tokenizer with one token per byte, after three special ones: 259 in all."""
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


@cache
def embedded_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's tokenizer, which takes seconds to read."""
    gguf = embedded.package_file()
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)  # type: ignore[no-any-return]


def llama(**changes: Any) -> LlamaConfig:
    """Configuration of two layers with 4 query and 2 KV heads of 8, 259 tokens and 512 positions."""
    shape = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**shape | changes)


def save(config: PreTrainedConfig, folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a randomly initialised model of `config` with the byte tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return folder
