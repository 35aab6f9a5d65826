"""Evaluation run: every sample and text under every strategy, with each finding stored at once."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keysift.attention import Strategy

from ...engine import Engine
from ...errors import InvalidRequest
from ...request import Request, SamplingParams
from ...version import keysift_version
from ..environment import commit
from ..variants import DENSE
from .along import DECODED
from .journal import Journal, Key
from .reader import Reader
from .sample import Sample
from .settings import Evaluation
from .tasks import TASKS, find, load_jsonl, make
from .texts import texts
from .units import Prompts, Questions, Tokens, Unit

Progress = Callable[[int, int, str], None]
"""Receives tokens read so far, tokens in all, and the title of the present unit."""
GROUP = 8
"""Samples of a file in one unit of work."""
NUMERICS = ("page_size", "code_bits", "prefill_chunk", "queries_per_row", "max_model_len", "backend")
"""Fields of the engine's configuration that may change a number."""


@dataclass(slots=True)
class Run:
    """One evaluation: its units of work and their findings."""

    settings: Evaluation
    engine: Engine
    strategies: dict[str, Strategy]
    units: list[Unit]
    journal: Journal

    @classmethod
    def open(cls, settings: Evaluation, engine: Engine) -> Run:
        """Plan the work, and load the findings that the output folder has already.

        Raises:
            InvalidRequest, ResourceExhausted, Unsupported: naming the field, before any forward pass.
        """
        strategies = {each.label: engine.strategy(each.name, each.args) for each in settings.variants}
        names, _ = _tasks(settings)
        if names or settings.agreement:
            _check_longest(max(settings.lengths), settings, engine)
        units = list(_plan(settings, engine))
        _check_plan(units, settings)
        if longest := _longest(units):
            _check_longest(longest, settings, engine)
        journal = Journal.open(settings.output_dir, _identity(settings, engine, strategies), restart=settings.restart)
        return cls(settings, engine, strategies, units, journal)

    @property
    def finished(self) -> bool:
        return not any(self._missing(unit) for unit in self.units)

    @property
    def found(self) -> dict[Key, Any]:
        """Findings of the planned units; the folder may hold more, from a run with more samples."""
        known = self.journal.found
        return {key: known[key] for key in self._keys() if key in known}

    @property
    def seconds(self) -> float:
        """Time that the findings took, in this process and before."""
        return sum(self.journal.seconds.get(key, 0.0) for key in self._keys())

    def _keys(self) -> Iterator[Key]:
        return (unit.key(label) for unit in self.units for label in self.strategies)

    def go(self, progress: Progress, found: Callable[[], object]) -> None:
        """Run the units that are missing; `found` is called after each of them."""
        reader, total = Reader(self.engine), sum(unit.cost for unit in self.units) * len(self.strategies)
        done = sum(unit.cost * (len(self.strategies) - len(self._missing(unit))) for unit in self.units)
        for unit in self.units:
            progress(done, total, unit.title)
            for cost in self._do(unit, reader):
                progress(done := done + cost, total, unit.title)
            found()

    def _do(self, unit: Unit, reader: Reader) -> Iterator[int]:
        """Run one unit; yields its cost in tokens for each finished strategy."""
        if not (missing := self._missing(unit)):
            return
        begun = time.perf_counter()
        wanted = {label: self.strategies[label] for label in dict.fromkeys((DENSE, *missing))}
        for key, value in unit.run(reader, wanted):
            if key not in self.journal.found:
                self.journal.add(key, value, time.perf_counter() - begun)
                yield unit.cost
            begun = time.perf_counter()

    def _missing(self, unit: Unit) -> list[str]:
        return [label for label in self.strategies if unit.key(label) not in self.journal.found]


def _identity(settings: Evaluation, engine: Engine, strategies: dict[str, Strategy]) -> dict[str, Any]:
    """Everything that two runs must share to be comparable; Python's version determines the prose."""
    files = [*_tasks(settings)[1], *settings.texts]
    return {
        **settings.identity(),
        "files": [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files],
        "keysift": keysift_version(),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: getattr(engine.config, name) for name in NUMERICS},
        "model": engine.model.fingerprint,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "strategies": {label: repr(strategy) for label, strategy in strategies.items()},
    }


def _check_longest(longest: int, settings: Evaluation, engine: Engine) -> None:
    """Check that model, cache and every strategy take sequences of `longest` tokens."""
    if longest > (limit := engine.model.max_model_len):
        raise InvalidRequest("lengths", f"at most {limit} tokens (max_model_len), got {longest}")
    for each in settings.variants:
        tokens = SamplingParams(max_new_tokens=1)
        engine.check(Request("longest", (0,) * (longest - 1), tokens, strategy=each.name, strategy_args=each.args))


def _check_plan(units: list[Unit], settings: Evaluation) -> None:
    """Check that the plan contains what the settings ask for."""
    asked = any(isinstance(unit, Questions) for unit in units)
    if settings.max_loss is not None and not asked:
        raise InvalidRequest("max_loss", "takes a task whose answers are scored, got none")
    if settings.texts and settings.agreement and not any(isinstance(unit, Prompts) for unit in units):
        raise InvalidRequest("lengths", f"one beyond {2 * DECODED} tokens, to follow texts, got {settings.lengths}")
    if not units:
        raise InvalidRequest("tasks", f"a task, or lengths beyond {2 * DECODED} tokens to follow texts, got neither")


def _longest(units: list[Unit]) -> int:
    """Tokens of the longest prompt with its answer."""
    samples = (sample for unit in units if isinstance(unit, Questions) for sample in unit.samples)
    return max((len(each.prompt) + max(each.max_new_tokens, len(each.gold)) for each in samples), default=0)


def _plan(settings: Evaluation, engine: Engine) -> Iterator[Unit]:
    """Units in order of value: one question of each task and length, then texts, then the other questions."""
    names, files = _tasks(settings)
    yield from _questions(settings, engine, names, range(1))
    if settings.agreement:
        yield from _along_texts(settings, engine)
    yield from _questions(settings, engine, names, range(1, settings.samples))
    for file in files:
        yield from _of_file(file, settings, engine)


def _tasks(settings: Evaluation) -> tuple[list[str], list[Path]]:
    """Names of built-in tasks, and task files. Raises `InvalidRequest` for a name that is neither."""
    files = [Path(name) for name in settings.tasks if name.endswith(".jsonl")]
    words = [name for name in settings.tasks if not name.endswith(".jsonl") and name != "none"]
    names = [task.name for task in find(TASKS if "all" in words else words)]
    called = [*names, *(file.stem for file in files)]
    if double := next((name for name in called if called.count(name) > 1), None):
        raise InvalidRequest("tasks", f"files and tasks of different names, got {double!r} twice")
    return names, files


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
    """Units of a task file, in order of length; lengths are rounded up to powers of two, to form groups."""
    samples = load_jsonl(path, engine.tokenizer, settings.chat, engine.model.max_model_len)
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        length = 1 << (len(sample.prompt) + sample.max_new_tokens - 1).bit_length()
        groups.setdefault(length, []).append(replace(sample, length=length))
    for length, group in sorted(groups.items()):
        for index, start in enumerate(range(0, len(group), GROUP)):
            yield Questions(path.name, length, index, tuple(group[start : start + GROUP]))
