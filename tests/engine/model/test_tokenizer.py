"""Tokenizer: streamed text equals text decoded at once, in whole characters."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from tokenizers import decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keysift.engine.errors import InvalidRequest, Unsupported
from keysift.engine.model import embedded
from keysift.engine.model.tokenizer import Detokenizer, Tokenizer

ByteTokenizer = Callable[..., PreTrainedTokenizerFast]
HARD = "naïve 👨‍👩‍👧 你好，世界 🇨🇭 e\u0301 \ufffd fin"


@pytest.fixture(scope="module")
def byte_level(byte_tokenizer: ByteTokenizer) -> Tokenizer:
    return Tokenizer(byte_tokenizer())


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """Decoder like SentencePiece's: underscores are spaces, the first of a text is dropped, bytes fall back."""
    words = ["<s>", "▁Hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


def stream(tokenizer: Tokenizer, tokens: list[int], skip: bool = True, prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


def test_characters_come_whole(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode(HARD)
    pieces = stream(byte_level, tokens)
    assert len(tokens) == len(HARD.encode())
    assert "".join(pieces) == HARD
    assert "".join(pieces).count("\ufffd") == 1
    assert pieces[:2] == ["n", "a"]


@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_of_any_tokens_equals_decoding_at_once(byte_level: Tokenizer, skip: bool) -> None:
    dice, text = random.Random(0), byte_level.encode(HARD)
    for _ in range(100):
        tokens = [dice.choice((dice.choice(text), dice.randrange(259))) for _ in range(30)]
        assert "".join(stream(byte_level, tokens, skip)) == byte_level.decode(tokens, skip)


def test_a_character_that_never_ends_comes_with_flush(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("ok 你")[:-1]
    assert stream(byte_level, tokens) == ["o", "k", " ", "", "", "\ufffd"]


def test_the_prompt_decides_about_the_leading_space(metaspace: Tokenizer) -> None:
    assert stream(metaspace, [2, 1, 3]) == ["world", " Hello", "!", ""]
    assert stream(metaspace, [2, 1, 3], prompt=(0, 1)) == [" world", " Hello", "!", ""]


def test_a_prompt_that_ends_within_a_character_does_not_leak(metaspace: Tokenizer, byte_level: Tokenizer) -> None:
    first_byte = 4 + 0xE4
    assert stream(metaspace, [2, 3], prompt=(1, first_byte)) == [" world", "!", ""]
    assert "".join(stream(byte_level, byte_level.encode("ab"), prompt=tuple(byte_level.encode("x你")[:-1]))) == "ab"


def test_byte_fallback_characters_come_whole(metaspace: Tokenizer) -> None:
    tokens = [1, *(4 + byte for byte in "你".encode()), 3]
    assert stream(metaspace, tokens) == ["Hello", "", "", "你", "!", ""]


def test_bytes_that_no_text_contains_do_not_break_a_stream(metaspace: Tokenizer) -> None:
    dice = random.Random(0)
    for _ in range(100):
        tokens = [dice.choice((1, 2, 3, 4 + dice.randrange(256))) for _ in range(20)]
        text = "".join(stream(metaspace, tokens))
        assert text.count("Hello") == tokens.count(1)
        assert text.count("world") == tokens.count(2)


def test_special_tokens(byte_level: Tokenizer) -> None:
    tokens = [*byte_level.encode("a"), 2, *byte_level.encode("b")]
    assert "".join(stream(byte_level, tokens, skip=True)) == "ab"
    assert "".join(stream(byte_level, tokens, skip=False)) == "a<|end|>b"


def test_chat_uses_the_models_template(byte_level: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hé"}]
    tokens = byte_level.chat(messages)
    assert byte_level.decode(tokens, skip_special_tokens=False) == "<|start|>user\nhé<|end|>\n<|start|>assistant\n"
    assert byte_level.chat(messages, add_generation_prompt=False) == tokens[: -len("assistant\n") - 1]


def test_chat_errors_are_the_requests(byte_level: Tokenizer, byte_tokenizer: ByteTokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"chat: .* unknown role"):
        byte_level.chat([{"role": "oracle", "content": "hi"}])
    with pytest.raises(InvalidRequest, match="chat: the model has no chat template"):
        Tokenizer(byte_tokenizer(chat_template=None)).chat([{"role": "user", "content": "hi"}])


def test_threads_share_one_tokenizer(byte_level: Tokenizer) -> None:
    texts = [HARD * n for n in range(1, 40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(byte_level.encode, texts)) == [byte_level.encode(text) for text in texts]


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    with pytest.raises(Unsupported, match="object: has no fast tokenizer"):
        Tokenizer(object())


@pytest.mark.skipif(importlib.util.find_spec(embedded.PACKAGE) is None, reason=f"needs {embedded.INSTALL}")
def test_the_embedded_tokenizer_streams_hard_text() -> None:
    gguf = embedded.package_file()
    library = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = Tokenizer(library)
    tokens = tokenizer.encode(HARD)
    assert tokens == library(HARD).input_ids
    pieces = stream(tokenizer, tokens)
    assert "".join(pieces) == HARD
    assert "" in pieces[:-1]
    prompt = tuple(tokenizer.encode("Hello"))
    assert stream(tokenizer, tokenizer.encode(" world"), prompt=prompt) == [" world", ""]
