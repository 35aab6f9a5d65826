"""Runs an evaluation: every sample and text under every strategy, each finding kept as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keysift.attention import Strategy

from ..engine import Engine
from ..errors import InvalidRequest
from ..request import Request, SamplingParams
from ..variants import DENSE
from .along import DECODED
from .journal import Journal
from .reader import Reader
from .sample import Sample
from .settings import Evaluation
from .tasks import TASKS, find, load_jsonl, make
from .texts import texts
from .units import Prompts, Questions, Tokens, Unit

Progress = Callable[[int, int, str], None]
"""Tokens read so far and in all, and what is being read."""
TOGETHER = 8
"""Samples of a file that are asked together."""
NUMERICS = ("page_size", "code_bits", "prefill_chunk", "queries_per_row", "max_model_len", "backend")
"""Fields of the engine that may change a number."""


@dataclass(slots=True)
class Run:
    """One evaluation."""

    settings: Evaluation
    engine: Engine
    strategies: dict[str, Strategy]
    units: list[Unit]
    journal: Journal
    seconds: float = 0.0
    """Time that this process has spent on it."""

    @classmethod
    def open(cls, settings: Evaluation, engine: Engine) -> Run:
        """What there is to do, less what its folder has already.

        Raises `InvalidRequest`, `ResourceExhausted` or `Unsupported` naming the field, before anything takes time.
        """
        strategies = {each.label: engine.strategy(each.name, each.args) for each in settings.variants}
        _tasks(settings)
        _check_lengths(settings, engine)
        units = list(_plan(settings, engine))
        journal = Journal.open(settings.output_dir, _identity(settings, engine, strategies), restart=settings.restart)
        return cls(settings, engine, strategies, units, journal)

    @property
    def finished(self) -> bool:
        return not any(self._missing(unit) for unit in self.units)

    def go(self, progress: Progress, found: Callable[[], object]) -> None:
        """Do what is missing; `found` is called after every unit of work."""
        reader, total = Reader(self.engine), sum(unit.cost for unit in self.units) * len(self.strategies)
        done = sum(unit.cost * (len(self.strategies) - len(self._missing(unit))) for unit in self.units)
        for unit in self.units:
            progress(done, total, unit.title)
            for cost in self._do(unit, reader):
                progress(done := done + cost, total, unit.title)
            found()

    def _do(self, unit: Unit, reader: Reader) -> Iterator[int]:
        """Yields the tokens of each strategy that it has finished."""
        if not (missing := self._missing(unit)):
            return
        begun = time.perf_counter()
        wanted = {label: self.strategies[label] for label in dict.fromkeys((DENSE, *missing))}
        for key, value in unit.run(reader, wanted):
            self.seconds += time.perf_counter() - begun
            if key not in self.journal.found:
                self.journal.add(key, value)
                yield unit.cost
            begun = time.perf_counter()

    def _missing(self, unit: Unit) -> list[str]:
        return [label for label in self.strategies if unit.key(label) not in self.journal.found]


def _identity(settings: Evaluation, engine: Engine, strategies: dict[str, Strategy]) -> dict[str, Any]:
    """What makes two runs comparable, number by number."""
    return {
        **settings.identity(),
        **{name: getattr(engine.config, name) for name in NUMERICS},
        "model": engine.model.fingerprint,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "strategies": {label: repr(strategy) for label, strategy in strategies.items()},
    }


def _check_lengths(settings: Evaluation, engine: Engine) -> None:
    """Every strategy takes prompts of every length."""
    longest, limit = max(settings.lengths), engine.model.max_model_len
    if longest > limit:
        raise InvalidRequest("lengths", f"at most {limit} tokens (max_model_len), got {longest}")
    for each in settings.variants:
        tokens = SamplingParams(max_new_tokens=1)
        engine.check(Request("longest", (0,) * (longest - 1), tokens, strategy=each.name, strategy_args=each.args))


def _plan(settings: Evaluation, engine: Engine) -> Iterator[Unit]:
    """First one question of everything, then texts, then the other questions: a run that is cut short is worth most."""
    names, files = _tasks(settings)
    yield from _questions(settings, engine, names, range(1))
    if settings.agreement:
        yield from _along_texts(settings, engine)
    yield from _questions(settings, engine, names, range(1, settings.samples))
    for file in files:
        yield from _of_file(file, settings, engine)


def _tasks(settings: Evaluation) -> tuple[list[str], list[Path]]:
    """Built-in tasks by name, and files. Raises `InvalidRequest` for a name that is neither."""
    files = [Path(name) for name in settings.tasks if name.endswith(".jsonl")]
    names = [name for name in settings.tasks if not name.endswith(".jsonl") and name != "none"]
    return [task.name for task in find(TASKS if "all" in names else names)], files


def _questions(settings: Evaluation, engine: Engine, names: list[str], indices: range) -> Iterator[Unit]:
    for index in indices if names else ():
        for length in sorted(settings.lengths):
            samples = (make(name, engine.tokenizer, length, index, settings.seed, settings.chat) for name in names)
            yield Questions("built-in", length, index, tuple(samples))


def _along_texts(settings: Evaluation, engine: Engine) -> Iterator[Unit]:
    lengths = [length for length in sorted(settings.lengths) if length > 2 * DECODED]
    for text in texts(settings.texts, max(lengths, default=0), engine.tokenizer):
        for length in lengths:
            yield Prompts(text.name, text.tokens[:length])
            yield Tokens(text.name, text.tokens[:length])


def _of_file(path: Path, settings: Evaluation, engine: Engine) -> Iterator[Unit]:
    """In order of their length; each counts as of the next power of two, so that some share a length."""
    samples = load_jsonl(path, engine.tokenizer, settings.chat, engine.model.max_model_len)
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        length = 1 << (len(sample.prompt) + sample.max_new_tokens - 1).bit_length()
        groups.setdefault(length, []).append(replace(sample, length=length))
    for length, group in sorted(groups.items()):
        for index, start in enumerate(range(0, len(group), TOGETHER)):
            yield Questions(path.name, length, index, tuple(group[start : start + TOGETHER]))
