"""A strategy that raises, or returns nonsense, is named with its method; failures of the machine pass as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from keysift.attention import Dense, Strategy, StrategyFailure, Telemetry, bind, make
from keysift.attention.failure import describe
from keysift.attention.token import TokenStrategy
from keysift.kvcache import CacheSpec, Context, Evidence, OffloadError, PagedCache, Phase, Selection, Span, Step
from keysift.kvcache.index import FlatIndex
from keysift.kvcache.native.checks import checked
from keysift.kvcache.ops import BackendUnavailable

Change = Callable[[Selection], object]


@dataclass(frozen=True, kw_only=True)
class Foreign(Strategy):
    """A plug-in: what it returns or raises, given the right selection."""

    change: Any = None

    def __post_init__(self) -> None:
        pass

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return self.change(replace(context.all(), complete=False))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class ForeignMasses(TokenStrategy):
    """A plug-in that weighs pages."""

    change: Any = None

    def __post_init__(self) -> None:
        pass

    def index_spec(self) -> FlatIndex:
        return FlatIndex()

    def masses(self, q: Tensor, context: Context) -> Tensor:
        return self.change(context.page_mass(q))  # type: ignore[no-any-return]


def attend(strategy: Strategy, phase: Phase = Phase.DECODE) -> None:
    """Run a step of two sequences, or of a prompt chunk of 23 tokens, through one layer."""
    cache = PagedCache(CacheSpec(1, 2, 16, page_size=4), 16, max_sequences=2, max_len=40)
    sequences = [cache.open(), cache.open()]
    for sequence in sequences:
        cache.reserve(sequence, 24)
        run(Dense(), cache, cache.prefill(Span(sequence, 0, 23), 8))
    if phase is Phase.PREFILL:
        return run(strategy, cache, cache.prefill(Span(sequences[0], 0, 23), 8))
    return run(strategy, cache, cache.decode([Span(sequence, 23, 1) for sequence in sequences]))


def run(strategy: Strategy, cache: PagedCache, step: Step) -> None:
    telemetry = Telemetry(cache.spec, step)
    k = torch.randn(len(step.positions), 2, 16)
    out = bind(strategy, cache, step, telemetry)(0, torch.cat([k, k], 1), k, k)
    assert not out.isnan().any()
    telemetry.coverage(telemetry.reads())


def raising(error: BaseException) -> Change:
    def change(selection: object) -> object:
        raise error

    return change


def pages(values: Callable[[Tensor], Tensor]) -> Change:
    return lambda selection: replace(selection, pages=values(selection.pages.clone()))


def evidence(**fields: Tensor) -> Change:
    return lambda selection: replace(selection, evidence=Evidence(**fields))


def put(place: int, page: int) -> Change:
    def change(each: Tensor) -> Tensor:
        each[-1, -1, place] = page
        return each

    return pages(change)


@pytest.mark.parametrize("phase", Phase)
def test_a_selection_may_list_pages_for_each_query_head(phase: Phase) -> None:
    attend(Foreign(change=lambda selection: selection), phase)
    attend(Foreign(change=pages(lambda each: each.repeat_interleave(2, 1))), phase)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(
    "error", [ValueError("no\nsuch page"), SystemExit(3), StopIteration(), AssertionError()], ids=repr
)
def test_an_exception_names_strategy_and_method(phase: Phase, error: BaseException) -> None:
    message = rf"^strategy foreign: {phase.value} failed: {type(error).__name__}"
    with pytest.raises(StrategyFailure, match=message) as caught:
        attend(Foreign(change=raising(error)), phase)
    assert (caught.value.strategy, caught.value.method) == ("foreign", phase.value)
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OffloadError("disk full", exhausted=True),
        BackendUnavailable("no kernel"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.AcceleratorError("CUDA error"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_failures_of_the_machine_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        attend(Foreign(change=raising(error)))
    assert caught.value is error


NONSENSE: dict[str, tuple[Change, str]] = {
    "nothing": (lambda selection: None, "a Selection is expected, got NoneType"),
    "a mask": (lambda selection: selection.mask(6), "a Selection is expected, got Tensor"),
    "a list": (lambda selection: replace(selection, pages=[[[0]]]), "pages: torch.int32 on cpu is expected, got list"),
    "int64": (pages(Tensor.long), "pages: torch.int32 on cpu is expected, got torch.int64 on cpu"),
    "another device": (pages(lambda each: each.to("meta")), "pages: .* got torch.int32 on meta"),
    "no heads": (pages(lambda each: each[:, 0]), r"pages: \[.*\] is expected"),
    "a head too few": (pages(lambda each: each[:, :1]), r"pages: \[\d, 2 or 4, any\] is expected, got"),
    "a row too few": (pages(lambda each: each[1:]), r"pages: \[\d, 2 or 4, any\] is expected, got"),
    "no pages": (pages(lambda each: each[..., :0]), "pages: the row's own pages are missing in row 0"),
    "beyond the context": (put(-1, 6), "pages: page numbers out of range in row"),
    "far beyond": (put(-1, 2**31 - 1), "pages: page numbers out of range in row"),
    "negative": (put(0, -7), "pages: page numbers out of range in row"),
    "unsorted": (pages(lambda each: each.flip(-1)), "pages: page numbers that do not ascend"),
    "twice": (put(1, 0), "pages: page numbers that do not ascend"),
    "a gap": (put(1, -1), "pages: page numbers that do not ascend, or -1 before the end"),
    "not its own": (put(-1, -1), "pages: the row's own pages are missing in row"),
    "estimated twice": (lambda each: replace(each, estimated=each.pages.clamp(max=0)), "estimated: .* do not ascend"),
    "estimated too": (
        lambda each: replace(each, estimated=each.pages[..., :1]),
        "estimated: pages that are chosen, too",
    ),
    "fetched, too": (lambda each: replace(each, prefetch=each.pages), "prefetch: pages that are chosen, too"),
    "coverage of rows": (evidence(coverage=torch.ones(2)), r"coverage: \[.*, 4\] is expected, got \[2\]"),
    "coverage in double": (evidence(coverage=torch.ones(2, 4).double()), "coverage: torch.float32 on cpu is expected"),
    "overlap of queries": (evidence(overlap=torch.ones(2, 4)), r"overlap: \[\d, 2\] is expected"),
}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_before_an_op_sees_it(name: str, phase: Phase) -> None:
    change, message = NONSENSE[name]
    with checked(), pytest.raises(StrategyFailure, match=f"strategy foreign: {phase.value} failed: .*{message}"):
        attend(Foreign(change=change), phase)


@pytest.mark.parametrize("field", ["pages", "estimated", "prefetch"])
@pytest.mark.parametrize("page", [6, 2**31 - 1, -2])
def test_pages_that_an_op_would_read_beyond_a_table_are_refused_outside_of_checked_mode(field: str, page: int) -> None:
    def change(selection: Selection) -> Selection:
        return replace(selection, **{field: torch.full((2, 2, 1), page, dtype=torch.int32)})

    message = rf"{field}: page numbers out of range: from -1 to 5 are .* got {page} to"
    with checked(False), pytest.raises(StrategyFailure, match=message):
        attend(Foreign(change=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (raising(ZeroDivisionError()), "ZeroDivisionError"),
        (lambda masses: masses[:1], r"masses: \[2, 4, 6\] is expected, got \[1, 4, 6\]"),
        (lambda masses: masses[..., :5], r"masses: \[2, 4, 6\] is expected, got \[2, 4, 5\]"),
        (lambda masses: masses.double(), "masses: torch.float32 on cpu is expected, got torch.float64"),
        (lambda masses: masses.numpy(), "masses: torch.float32 on cpu is expected, got ndarray"),
    ],
)
def test_masses_of_another_shape_are_refused(change: Change, message: str) -> None:
    with pytest.raises(StrategyFailure, match=f"foreignmasses: decode failed: .*{message}"):
        attend(ForeignMasses(change=change))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_masses_that_are_no_numbers_choose_lawful_pages(value: float, epsilon: float) -> None:
    masses = ForeignMasses(
        change=lambda masses: torch.full_like(masses, value), budget=8, window=1, sink=0, epsilon=epsilon
    )
    attend(masses)
    attend(replace(masses, change=lambda masses: masses.masked_fill(masses == masses.amax(-1, True), value)))


def test_checked_mode_holds_built_in_strategies_to_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "keysift.attention.strategies.streaming.Context.zones",
        lambda self, **zones: Selection(self.all().pages.flip(-1)),
    )
    strategy = make("streaming")
    with checked(False):
        attend(strategy)
    with (
        checked(),
        pytest.raises(
            StrategyFailure, match="strategy streaming: decode failed: ValueError: pages: page numbers that do not"
        ),
    ):
        attend(strategy)


def test_telemetry_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keysift.attention.telemetry._measure", lambda *_: raising(IndexError("gone"))(None))
    with pytest.raises(StrategyFailure, match="strategy streaming: telemetry failed: IndexError: gone"):
        attend(make("streaming"))


def test_an_index_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatIndex, "masses", lambda *_: raising(IndexError("gone"))(None))
    with pytest.raises(StrategyFailure, match="strategy retrieval: decode failed: IndexError: gone"):
        attend(make("retrieval", index="flat"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "/srv/models/x"),
            "FileNotFoundError: No such file or directory",
        ),
        (ValueError("cannot read /srv/models/a b"), "ValueError: cannot read (a path, see the log) b"),
        (ValueError("'/srv/models/x': 3/4 of it"), "ValueError: '(a path, see the log)': 3/4 of it"),
        (ValueError("a / b, and/or c"), "ValueError: a / b, and/or c"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_callers_are_told_no_path(error: Exception, text: str) -> None:
    assert describe(error) == text
