"""Tokenizer: streamed text equals text decoded at once, in whole characters."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, processors
from transformers import PreTrainedTokenizerFast

from keysift.engine.errors import InvalidRequest, Unsupported
from keysift.engine.model.tokenizer import WINDOW, Detokenizer, Tokenizer
from tests.models import embedded_tokenizer, make_tokenizer, needs_embedded

ByteTokenizer = Callable[..., PreTrainedTokenizerFast]
HARD = "naïve 👨‍👩‍👧 你好，世界 🇨🇭 e\u0301 \ufffd fin"


@pytest.fixture(scope="module")
def byte_level(byte_tokenizer: ByteTokenizer) -> Tokenizer:
    return Tokenizer(byte_tokenizer())


def make_metaspace() -> Tokenizer:
    """Decoder like SentencePiece's: underscores are spaces, the first of a text is dropped, bytes fall back."""
    words = ["<s>", "▁Hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    return FALLBACK


BYTES, FALLBACK = Tokenizer(make_tokenizer()), make_metaspace()


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


def test_long_texts_leave_the_interpreter_to_other_threads(byte_level: Tokenizer) -> None:
    """Tokenising a million characters takes seconds, in which others must run."""
    text, gaps, done = "你好世界" * 100_000, [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()

    with ThreadPoolExecutor(1) as pool:
        ticking = pool.submit(tick)
        begun = time.perf_counter()
        byte_level.encode(text)
        taken = time.perf_counter() - begun
        done.set()
        ticking.result()
    assert max(gaps) < 0.5 * taken


def test_texts_that_are_none_are_the_requests_errors(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt: text without lone surrogates, got U\+D800 at character 1"):
        byte_level.encode("a\ud800")
    assert byte_level.decode(byte_level.encode("a\0b")) == "a\0b"

    class PanicException(BaseException):
        """What a panic of the library is in Python."""

    def panic(text: str, add_special_tokens: bool) -> list[int]:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(byte_level, "_ids", panic)
    with pytest.raises(InvalidRequest, match="prompt: the tokenizer cannot read it: PanicException"):
        byte_level.encode("a")


def test_a_text_that_begins_as_the_model_expects_gets_no_second_beginning(byte_tokenizer: ByteTokenizer) -> None:
    library = byte_tokenizer()
    library.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 2)]
    )
    tokenizer = Tokenizer(library)
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == tokenizer.encode("<|start|>hi") == [1, *plain, 2]
    assert tokenizer.encode("<|start|><|start|>hi") == [1, 1, *plain, 2]
    assert tokenizer.encode("<|start|>hi", add_special_tokens=False) == [1, *plain]
    assert tokenizer.encode("") == [1, 2]


def test_tokens_without_text_cost_the_same_after_thousands(byte_level: Tokenizer) -> None:
    """Also where decoding them gives only what stands for broken characters."""
    for token in (1, 300, byte_level.encode("你")[0], byte_level.encode("你")[1]):
        detokenizer = Detokenizer(byte_level, skip_special_tokens=True)
        text = "".join(detokenizer.push(token) for _ in range(5000))
        assert len(detokenizer._pending) <= WINDOW
        assert text + detokenizer.flush() == byte_level.decode([token] * 5000)


@pytest.mark.parametrize("character", ["é", "你", "😀"])
def test_a_stream_in_which_no_token_ends_a_character_still_comes_out(character: str) -> None:
    """One token is the last byte of a character and the first of the next."""
    *begin, last = (BYTES.backend.id_to_token(token) for token in BYTES.encode(character))
    words = {word: number for number, word in enumerate(["<unk>", *begin, last + begin[0]])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    first, *middle, joint = range(1, len(words))
    *pieces, rest = stream(tokenizer, [first, *[*middle, joint] * 500])
    assert "".join(pieces) + rest == character * 500 + "\ufffd"
    assert len(rest) <= WINDOW


@given(runs=st.lists(st.tuples(st.lists(st.integers(0, 270), min_size=1, max_size=4), st.integers(1, 90)), max_size=6))
def test_a_stream_of_repeated_tokens_equals_decoding_at_once(runs: list[tuple[list[int], int]]) -> None:
    """Also of special tokens and of ids that are no token."""
    tokens = [token for run, times in runs for token in run * times]
    for skip in (True, False):
        assert "".join(stream(BYTES, tokens, skip)) == BYTES.decode(tokens, skip)


@pytest.mark.parametrize("between", [[], [1], [300], [1, 300, 2]], ids=str)
def test_a_character_may_begin_in_one_window_and_end_in_the_next(between: list[int]) -> None:
    """Whatever garbage, special tokens and ids that are no token are around and within it."""
    garbage = BYTES.encode("\ufffd")[2:]  # a byte that follows others, alone
    said = [token for byte in BYTES.encode("😀你é😀") for token in (byte, *between * 9)]
    for before in range(WINDOW + 2):
        tokens = [*garbage * before, *said, *garbage * 3]
        assert "".join(stream(BYTES, tokens)) == BYTES.decode(tokens)


@given(st.lists(st.tuples(st.lists(st.integers(4, 259), min_size=1, max_size=3), st.integers(1, 50)), max_size=5))
def test_bytes_after_an_invalid_one_stay_invalid_to_the_end_of_their_run(runs: list[tuple[list[int], int]]) -> None:
    invalid, word = 4 + 0xFF, 2
    tokens = [token for some, times in runs for token in (word, invalid, *some * times)]
    assert "".join(stream(FALLBACK, tokens)) == FALLBACK.decode(tokens)


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, *(4 + byte for byte in range(128, 193))]), st.integers(1, 90))))
def test_runs_of_invalid_bytes_of_a_fallback_equal_decoding_at_once(runs: list[tuple[int, int]]) -> None:
    """Bytes of which no text consists: no part of a run is a character until a later byte makes it none."""
    tokenizer, tokens = FALLBACK, [token for token, times in runs for _ in range(times)]
    assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    with pytest.raises(Unsupported, match="object: has no fast tokenizer"):
        Tokenizer(object())


@needs_embedded
def test_the_embedded_tokenizer_streams_hard_text() -> None:
    library = embedded_tokenizer()
    tokenizer = Tokenizer(library)
    tokens = tokenizer.encode(HARD)
    assert tokens == library(HARD).input_ids
    pieces = stream(tokenizer, tokens)
    assert "".join(pieces) == HARD
    assert "" in pieces[:-1]
    prompt = tuple(tokenizer.encode("Hello"))
    assert stream(tokenizer, tokenizer.encode(" world"), prompt=prompt) == [" world", ""]
