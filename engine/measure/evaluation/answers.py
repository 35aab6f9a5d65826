"""Questions after long contexts: generated answers, and the likelihood of the right one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from keysift.attention import Strategy

from .divergence import Divergence, logs, rounded
from .reader import Reader, Reading
from .sample import Sample

ENDING = 32
"""Tokens at the end of a prompt, its question, at which distributions are compared."""
TAIL = 240
"""Characters of a prompt's end that are stored for the report."""


@dataclass(slots=True)
class Answer:
    """Result of one strategy on one sample."""

    sample: Sample
    facts: dict[str, Any]
    logs: Tensor
    """[prompt positions + gold, V], log-probabilities after the prompt's last tokens and along the right answer."""

    @property
    def cut(self) -> int:
        """Number of prompt positions."""
        return len(self.logs) - len(self.sample.gold)

    @property
    def followers(self) -> Tensor:
        """[prompt positions + gold], the token that follows each position."""
        prompt = self.sample.prompt
        return torch.tensor([*prompt[len(prompt) - self.cut :], *self.sample.gold])

    def row(self, dense: Answer) -> dict[str, Any]:
        """Journal entry: the facts, and the divergence from dense along the prompt's end and along the answer."""
        parts = {"prefill": slice(None, self.cut), "decode": slice(self.cut, None)}
        found = {
            phase: asdict(Divergence.of(dense.logs[part], self.logs[part], self.followers[part]))
            for phase, part in parts.items()
        }
        return {**self.facts, "divergence": found}


@dataclass(slots=True)
class Interview:
    """Samples of one length, to be answered under any strategy."""

    reader: Reader
    samples: list[Sample]

    def ask(self, strategy: Strategy) -> list[Answer]:
        """Answers under one strategy: prompts are prefilled one by one, answers decoded in batches."""
        return [answer for batch in self._batches() for answer in self._ask(batch, strategy)]

    def _batches(self) -> Iterator[list[Sample]]:
        batch: list[Sample] = []
        for sample in self.samples:
            if batch and not self.reader.fits(
                [len(each.prompt) + _room([*batch, sample]) for each in [*batch, sample]]
            ):
                yield batch
                batch = []
            batch.append(sample)
        yield batch

    def _ask(self, batch: list[Sample], strategy: Strategy) -> list[Answer]:
        with self.reader.open([sample.prompt for sample in batch], strategy, _room(batch)) as readings:
            answers = [self._probe(*pair) for pair in zip(batch, readings, strict=True)]
            begun = time.perf_counter()
            made = dict(zip(map(id, readings), batch, strict=True))
            self.reader.generate(readings, lambda reading: self._ended(made[id(reading)], reading))
            each = (time.perf_counter() - begun) / len(batch)
            for answer, reading in zip(answers, readings, strict=True):
                answer.facts |= self._generated(answer.sample, reading)
                answer.facts["seconds"] += each
        return answers

    def _probe(self, sample: Sample, reading: Reading) -> Answer:
        """Prefill the prompt, decode the right answer, and rewind to the prompt's end."""
        begun, last = time.perf_counter(), len(sample.prompt) - 1
        ending: list[Tensor] = []
        self.reader.read(reading, range(max(last - ENDING + 1, 0), last), lambda at, logits: ending.append(logits))
        mark = reading.mark()
        rows = logs(torch.cat([*(row[None] for row in ending), self.reader.follow(reading, sample.gold)]))
        facts = {**_identity(sample), **_likelihood(rows[len(ending) :], torch.tensor(sample.gold))}
        facts["answer_density"] = reading.decode_density
        self.reader.rewind(reading, mark)
        return Answer(sample, {**facts, "seconds": time.perf_counter() - begun}, rows)

    def _ended(self, sample: Sample, reading: Reading) -> bool:
        """True at the length limit, at an end-of-text token, or once every answer was generated and the score is 1."""
        tokens = reading.generated
        ends = self.reader.engine.model.eos_token_ids
        return (
            len(tokens) >= sample.max_new_tokens
            or bool(tokens and tokens[-1] in ends)
            or self._score(sample, reading) == 1
        )

    def _score(self, sample: Sample, reading: Reading) -> float:
        return sample.score(self.reader.engine.tokenizer.decode(reading.generated))

    def _generated(self, sample: Sample, reading: Reading) -> dict[str, Any]:
        sparsity, decode = reading.sparsity, self.reader.engine.tokenizer.decode
        return {
            "score": self._score(sample, reading),
            "text": decode(reading.generated),
            "prompt_tail": decode(sample.prompt)[-TAIL:],
            "prefill_density": sparsity.prefill_density,
            "decode_density": reading.decode_density,
            "coverage": sparsity.coverage,
            "coverage_min": sparsity.coverage_min,
        }


def _room(batch: list[Sample]) -> int:
    return max(max(sample.max_new_tokens, len(sample.gold)) for sample in batch)


def _identity(sample: Sample) -> dict[str, Any]:
    return {
        "task": sample.task,
        "length": sample.length,
        "index": sample.index,
        "answers": list(sample.answers),
        "prompt_tokens": len(sample.prompt),
    }


def _likelihood(rows: Tensor, gold: Tensor) -> dict[str, Any]:
    """Negative log-likelihood and ranks of the right answer's tokens gold [n], from logs [n, V] that predict them."""
    each = rows[torch.arange(len(gold)), gold]
    ranks = 1 + (rows > each[:, None]).sum(-1)
    return {
        "answer_nll": rounded(-each.mean()[None])[0],
        "answer_rank": float(ranks.float().mean()),
        "answer_greedy": bool((ranks == 1).all()),
    }
