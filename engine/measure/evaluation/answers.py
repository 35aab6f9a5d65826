"""Asks questions behind long contexts: what the model says, and how likely it finds the right answer."""

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
"""Tokens at the end of a prompt, where its question is, at which distributions are compared."""
TAIL = 240
"""Characters of a prompt's end that are kept to look at."""


@dataclass(slots=True)
class Answer:
    """How one strategy did on one sample."""

    sample: Sample
    facts: dict[str, Any]
    logs: Tensor
    """[prompt positions + gold, V], logs of the distributions after the prompt's last tokens and along the answer."""

    @property
    def cut(self) -> int:
        """How many of them are of the prompt."""
        return len(self.logs) - len(self.sample.gold)

    @property
    def followers(self) -> Tensor:
        """[prompt positions + gold], the tokens that these distributions should have found likely."""
        prompt = self.sample.prompt
        return torch.tensor([*prompt[len(prompt) - self.cut :], *self.sample.gold])

    def row(self, dense: Answer) -> dict[str, Any]:
        """All that is told of it, with its distance from dense: along the end of the prompt, then along the answer."""
        parts = {"prefill": slice(None, self.cut), "decode": slice(self.cut, None)}
        found = {
            phase: asdict(Divergence.of(dense.logs[part], self.logs[part], self.followers[part]))
            for phase, part in parts.items()
        }
        return {**self.facts, "divergence": found}


@dataclass(slots=True)
class Interview:
    """Samples of one length, asked under one strategy after the other."""

    reader: Reader
    samples: list[Sample]

    def ask(self, strategy: Strategy) -> list[Answer]:
        """Every sample under one strategy: prompts one by one, what follows side by side as far as memory allows."""
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
            self.reader.go_on(readings, lambda reading: self._ended(made[id(reading)], reading))
            each = (time.perf_counter() - begun) / len(batch)
            for answer, reading in zip(answers, readings, strict=True):
                answer.facts |= self._said(answer.sample, reading)
                answer.facts["seconds"] += each
        return answers

    def _probe(self, sample: Sample, reading: Reading) -> Answer:
        """Reads the prompt, then the right answer, and forgets the answer again."""
        begun, last = time.perf_counter(), len(sample.prompt) - 1
        heard: list[Tensor] = []
        self.reader.read(reading, range(max(last - ENDING + 1, 0), last), lambda position, row: heard.append(row))
        ahead = reading.ahead
        rows = logs(torch.cat([*(row[None] for row in heard), self.reader.follow(reading, sample.gold)]))
        facts = {**_told(sample), **_likelihood(rows[len(heard) :], torch.tensor(sample.gold))}
        facts["answer_density"] = reading.decode_density
        self.reader.forget(reading, ahead)
        return Answer(sample, {**facts, "seconds": time.perf_counter() - begun}, rows)

    def _ended(self, sample: Sample, reading: Reading) -> bool:
        """At the limit, at the model's own end, or once all answers were said: the score can only stay."""
        said = reading.said
        ends = self.reader.engine.model.eos_token_ids
        return (
            len(said) >= sample.max_new_tokens or bool(said and said[-1] in ends) or self._score(sample, reading) == 1
        )

    def _score(self, sample: Sample, reading: Reading) -> float:
        return sample.score(self.reader.engine.tokenizer.decode(reading.said))

    def _said(self, sample: Sample, reading: Reading) -> dict[str, Any]:
        sparsity, decode = reading.sparsity, self.reader.engine.tokenizer.decode
        return {
            "score": self._score(sample, reading),
            "text": decode(reading.said),
            "prompt_tail": decode(sample.prompt)[-TAIL:],
            "prefill_density": sparsity.prefill_density,
            "decode_density": reading.decode_density,
            "coverage": sparsity.coverage,
            "coverage_min": sparsity.coverage_min,
        }


def _room(batch: list[Sample]) -> int:
    return max(max(sample.max_new_tokens, len(sample.gold)) for sample in batch)


def _told(sample: Sample) -> dict[str, Any]:
    return {
        "task": sample.task,
        "length": sample.length,
        "index": sample.index,
        "answers": list(sample.answers),
        "prompt_tokens": len(sample.prompt),
    }


def _likelihood(rows: Tensor, gold: Tensor) -> dict[str, Any]:
    """From logs [n, V] that predict the right answer's tokens gold [n]: how unlikely they were, and their ranks."""
    each = rows[torch.arange(len(gold)), gold]
    ranks = 1 + (rows > each[:, None]).sum(-1)
    return {
        "answer_nll": rounded(-each.mean()[None])[0],
        "answer_rank": float(ranks.float().mean()),
        "answer_greedy": bool((ranks == 1).all()),
    }
