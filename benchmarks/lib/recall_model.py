"""A model that recalls exactly by construction, with weights set by hand.

Two layers of a plain Llama. The first copies the token before; the second looks for the place that this token came
before, and copies what stands there. So after ``... k v ... k`` comes v, with a probability of 1, at any distance.
Other tokens read the first one, as they do in trained models. So every wrong answer of a sparse prompt is a loss of the
strategy, none of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, NAMES, WORDS = 0, 1535, 2560
"""The first token of every prompt; then tokens that records are made of; then filler, which queries nothing."""
VOCABULARY = 1 + NAMES + WORDS
CODE = 64
"""Size of a token's code: random signs scaled to length 1; no two names have a product of 0.7."""
SAYS, FIRST, ASKS, OTHER, BEFORE, BEFORE_OTHER, ANSWER, ALWAYS = 0, 64, 65, 129, 130, 194, 195, 259
"""Offsets in the hidden state: a token's code, or a flag of the first one; the code that it queries, or a flag of none;
the query of the token before it, or a flag of none; the answer, which alone is read at the end; and a constant 1."""
HIDDEN, HEADS, HEAD_DIM = 260, 2, 128
POSITIONS = 65536
THETA = 1e12
"""Rotary base: so large that half of the dimensions do not turn noticeably within `POSITIONS` tokens."""
FAST = 12
"""Pairs of rotary dimensions that distinguish a distance of 1 from others: periods from 6 to 700 tokens."""
PREVIOUS, MATCH, SINK, CERTAIN = 60.0, 100.0, 70.0, 40.0
"""Logits: of each fast pair; of a match; of the first token, which wins where nothing matches; of the answer."""
EARLIEST = 80
"""First position of records, after the tokens at the start that strategies always read."""
LAST_ROW = 64


@dataclass(frozen=True, slots=True)
class RecallPrompt:
    """Filler with records in its first 40 %, which are quoted in its second half and queried in its last row."""

    tokens: Tensor
    """[n] int64, `START` first; the last one asks."""
    spread: Tensor
    """[queries] int64, ascending: positions all over the second half whose next token only the records determine."""
    end: Tensor
    """[queries] int64, ascending: such positions among the last 64."""
    answers: Tensor
    """[n] int64, the right next token at `spread` and `end`, -1 elsewhere."""

    def right(self, positions: Tensor, answered: Tensor) -> float:
        """Share of `positions` [queries] where the answered token [queries] is right."""
        return float((answered == self.answers[positions]).float().mean())


def recall_prompt(length: int, seed: int, quotes: int = 16, run: int = 1, at_end: int = 8) -> RecallPrompt:
    """A prompt of `length` tokens with `quotes` of `run` asking tokens each, and `at_end` single ones at its end.

    Each record is ``run + 1`` names, is quoted once without the last, and has names of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = 1 + NAMES + torch.randint(WORDS, (length,), generator=generator)
    tokens[0] = START
    lengths = torch.tensor([run] * quotes + [1] * at_end)
    names = 1 + torch.randperm(NAMES, generator=generator)[: int((lengths + 1).sum())]
    records = torch.split(names, (lengths + 1).tolist())
    sources = _places(EARLIEST, 2 * length // 5, len(records), run + 1, generator)
    sources = sources[torch.randperm(len(sources), generator=generator)]
    there = _places(length // 2, length - LAST_ROW, quotes, run, generator)
    here = _places(length - LAST_ROW, length, at_end, 1, generator)
    here[-1] = length - 1
    answers = torch.full((length,), -1)
    for record, source, place in zip(records, sources.tolist(), torch.cat((there, here)).tolist(), strict=True):
        tokens[source : source + len(record)] = record
        tokens[place : place + len(record) - 1] = record[:-1]
        answers[place : place + len(record) - 1] = record[1:]
    asked = (answers >= 0).nonzero()[:, 0]
    return RecallPrompt(tokens, asked[: quotes * run], asked[quotes * run :], answers)


def _places(start: int, stop: int, count: int, size: int, generator: torch.Generator) -> Tensor:
    """[count] int64, where stretches of `size` tokens begin: one at random in each of as many even parts."""
    part = (stop - start) // count
    if part < size:
        raise ValueError(f"{count} stretches of {size} tokens do not fit between {start} and {stop}")
    return start + torch.arange(count) * part + torch.randint(part - size + 1, (count,), generator=generator)


def write_recall_model(folder: Path) -> Path:
    """Save the model and its tokenizer, 9 MB and 0.1 s, as any other model folder."""
    model = LlamaForCausalLM(_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the feed-forward layers stay so
        _write_tokens(model, _codes())
        _copy_the_token_before(model.model.layers[0])
        _match_what_came_before(model.model.layers[1])
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=START,
        eos_token_id=None,
        dtype=torch.float32,
    )


def _codes() -> Tensor:
    """[V, CODE], of length 1."""
    signs = torch.randint(2, (VOCABULARY, CODE), generator=torch.Generator().manual_seed(0))
    return (2 * signs - 1) / math.sqrt(CODE)


def _write_tokens(model: LlamaForCausalLM, codes: Tensor) -> None:
    """Write embeddings of squared length 3 (code or first, query or none, constant) and a head that compares codes."""
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    names = slice(1, 1 + NAMES)
    table[1:, SAYS : SAYS + CODE] = codes[1:]
    table[START, FIRST] = 1.0
    table[names, ASKS : ASKS + CODE] = codes[names]
    table[:, OTHER] = 1.0
    table[names, OTHER] = 0.0
    table[:, ALWAYS] = 1.0
    head[:, ANSWER : ANSWER + CODE] = CERTAIN * codes
    model.model.norm.weight.fill_((5 / HIDDEN) ** 0.5)  # with the token before and the answer, 5


def _copy_the_token_before(layer: Any) -> None:
    """Every query turned back by one position: of all keys, which are alike, the one before is nearest in angle."""
    attention, half = layer.self_attn, HEAD_DIM // 2
    layer.input_layernorm.weight.fill_((3 / HIDDEN) ** 0.5)  # undoes the norm: what comes in is the hidden state
    size = _amplitude(PREVIOUS)
    angles = _frequencies()[:FAST]
    for head in attention.q_proj.weight.unflatten(0, (HEADS, HEAD_DIM)):
        head[:FAST, ALWAYS] = size * angles.cos()
        head[half : half + FAST, ALWAYS] = -size * angles.sin()  # dimension i turns with dimension i + half
    attention.k_proj.weight[:FAST, ALWAYS] = size
    _copy(attention, source=ASKS, target=BEFORE, count=CODE + 1)  # BEFORE_OTHER too, so that lengths stay equal: 4


def _match_what_came_before(layer: Any) -> None:
    """Match a token's query with the token before each key, in dimensions that do not rotate; else the first token."""
    attention = layer.self_attn
    layer.input_layernorm.weight.fill_((4 / HIDDEN) ** 0.5)
    *still, last = _still()
    match, sink = _amplitude(MATCH), _amplitude(SINK)
    for head in attention.q_proj.weight.unflatten(0, (HEADS, HEAD_DIM)):
        head[still, ASKS : ASKS + CODE] = match * torch.eye(CODE)
        head[last, ALWAYS] = sink
    attention.k_proj.weight[still, BEFORE : BEFORE + CODE] = match * torch.eye(CODE)
    attention.k_proj.weight[last, FIRST] = sink
    _copy(attention, source=SAYS, target=ANSWER, count=CODE)


def _copy(attention: Any, source: int, target: int, count: int) -> None:
    """Copy values from `source` to `target` of the hidden state, an equal share through each head."""
    which = torch.arange(count)
    attention.v_proj.weight[which, source + which] = 1.0
    for head in range(HEADS):
        attention.o_proj.weight[target + which, head * HEAD_DIM + which] = 1 / HEADS


def _amplitude(logit: float) -> float:
    """Amplitude of a query and of a key whose scaled product is `logit`."""
    return math.sqrt(logit * math.sqrt(HEAD_DIM))


def _frequencies() -> Tensor:
    """[D / 2] float32, radians per token."""
    half = HEAD_DIM // 2
    return torch.pow(THETA, -torch.arange(half) / half)


def _still() -> list[int]:
    """The CODE + 1 slowest dimensions: they turn by less than 0.3 radians from the first position to the last."""
    half = HEAD_DIM // 2
    slow = range(half - 1, half - 2 - CODE // 2, -1)
    assert float(_frequencies()[slow[-1]]) * POSITIONS < 0.3
    return [dimension for pair in slow for dimension in (pair, pair + half)][: CODE + 1]


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word between spaces: ``<start>``, ``name0``, ``word0`` and so on."""
    words = ["<start>", *(f"name{number}" for number in range(NAMES)), *(f"word{number}" for number in range(WORDS))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<start>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<start>", unk_token="<start>"
    )
