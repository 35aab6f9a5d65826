"""Tokenizers to make samples with: one token per byte, words with spaces in front, and the embedded model's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keysift.engine.model import embedded
from keysift.engine.model.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def bytewise(byte_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Tokenizer:
    return Tokenizer(byte_tokenizer())


@pytest.fixture(scope="session")
def plain(byte_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Tokenizer:
    """Has no chat template."""
    return Tokenizer(byte_tokenizer(None))


@pytest.fixture(scope="session")
def underscored() -> Tokenizer:
    """As SentencePiece models do: a text begins with `<s>` and a space that was not there."""
    words = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    merged = ["▁T", "▁o", "▁i"]
    vocabulary = {word: number for number, word in enumerate([*words, *merged])}
    merges = [("▁", word[1]) for word in merged]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<s>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


@pytest.fixture(scope="session")
def real() -> Tokenizer:
    """The embedded model's."""
    if importlib.util.find_spec(embedded.PACKAGE) is None:
        pytest.skip(f"needs {embedded.INSTALL}")
    return Tokenizer(AutoTokenizer.from_pretrained(embedded.embedded(lambda message: None)))
