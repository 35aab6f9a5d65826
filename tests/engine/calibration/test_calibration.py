"""Calibration: the fit, use of a measured crossover, and a measurement on a tiny model."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from keysift.attention import Strategy
from keysift.attention import make as make_strategy
from keysift.engine import Engine, EngineConfig, Request, Unsupported
from keysift.engine.calibration import calibration, crossover
from keysift.engine.calibration.calibration import Calibration, calibrated
from keysift.engine.calibration.fit import Chunk, Crossover, fit
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel
from keysift.kvcache import Phase
from tests.engine.driver import Make, drain, finish_of, greedy, tokens

LIBRARY = "keysift.kvcache.native.library"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYSIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def chunks(*wins: bool, queries: int = 1024) -> list[Chunk]:
    return [
        Chunk(queries=queries, context=queries * (i + 1), dense_ms=10.0, strategy_ms=9.0 if win else 10.0)
        for i, win in enumerate(wins)
    ]


def runs(strategy: Strategy, measured: list[Chunk], dense_below: int) -> list[bool]:
    """Per chunk: it runs the strategy and not dense."""
    chosen = make_strategy(strategy.name, dense_below=dense_below)
    return [chosen.at(Phase.PREFILL, chunk.context, chunk.queries) == chosen for chunk in measured]


FITS = {
    "never": ((False,) * 6, (False,) * 6),
    "always": ((True,) * 6, (True,) * 6),
    "from the middle": ((False, False, True, True, True, True), (False, False, True, True, True, True)),
    "not for good": ((True, False, True, False, True, True), (False, False, False, False, True, True)),
    "until the last": ((True, True, True, True, True, False), (False,) * 6),
    "one chunk": ((True,), (True,)),
    "one lost chunk": ((False,), (False,)),
}


@pytest.mark.parametrize("queries", [1024, 192])
@pytest.mark.parametrize(("wins", "expected"), FITS.values(), ids=FITS.keys())
def test_the_fit_runs_chunks_that_win_for_good(
    wins: tuple[bool, ...], expected: tuple[bool, ...], queries: int
) -> None:
    measured = chunks(*wins, queries=queries)
    found = fit(measured, queries)
    for strategy in crossover.prompt_strategies().values():
        assert tuple(runs(strategy, measured, found.dense_below)) == expected
    first = next((chunk.context for chunk, sparse in zip(measured, expected, strict=True) if sparse), None)
    assert found.wins_from == first
    assert found.dense_up_to == (2 * measured[-1].context if first is None else None)


@pytest.mark.parametrize(("queries", "count"), [(1024, 6), (192, 2), (512, 1), (64, 40)])
def test_a_strategy_that_never_won_stays_dense_up_to_twice_the_measured_length(queries: int, count: int) -> None:
    found = fit(chunks(*[False] * count, queries=queries), queries)
    twice = 2 * queries * count
    strategy = make_strategy("sift", dense_below=found.dense_below)
    ends = [*range(queries, twice, queries), twice]
    assert all(strategy.at(Phase.PREFILL, end, queries).name == "dense" for end in ends)
    assert strategy.at(Phase.PREFILL, twice + queries, queries) == strategy, "nothing is known about longer ones"
    assert found.dense_up_to == twice


def test_a_measurement_shorter_than_a_chunk_speaks_for_longer_chunks() -> None:
    """A model of 512 positions measured one chunk of 512; served with more, a prompt of 1,024 would be one chunk."""
    strategy = make_strategy("sift", dense_below=fit(chunks(False, queries=512), 1024).dense_below)
    assert strategy.at(Phase.PREFILL, 1024, 1024).name == "dense"
    assert strategy.at(Phase.PREFILL, 1088, 1024) == strategy


def test_the_fit_in_words() -> None:
    assert crossing(*[False] * 6).summary == "not up to 6,144: dense up to 12,288"
    assert crossing(False, True).summary == "from 2,048"


def test_yardsticks_are_not_calibrated() -> None:
    names = set(crossover.prompt_strategies())
    assert {"flexprefill", "sift"} <= names
    assert not names & {"oracle", "dense", "streaming"}


ARGUMENTS = {
    "plain": ("sift", (), ("sift.dense_below=700",)),
    "defaults stated": ("sift", ("sift.sink=64",), ("sift.sink=64", "sift.dense_below=700")),
    "with other options": ("sift", ("sift.sink=0",), ("sift.sink=0",)),
    "options of the other part": (
        "sift+streaming",
        ("streaming.sink=0",),
        ("streaming.sink=0", "sift.dense_below=700"),
    ),
    "of a pair": ("sift+streaming", (), ("sift.dense_below=700",)),
    "for the tokens only": ("dense+retrieval", (), ()),
    "not measured": ("streaming", (), ()),
    "stated": ("sift", ("sift.dense_below=5",), ("sift.dense_below=5",)),
    "stated without a name": ("sift", ("dense_below = 5",), ("dense_below = 5",)),
    "stated for the other part": (
        "sift+streaming",
        ("streaming.dense_below=5",),
        ("streaming.dense_below=5", "sift.dense_below=700"),
    ),
}


@pytest.mark.parametrize(("strategy", "given", "expected"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_stated_options_override_measured_ones(
    strategy: str, given: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    measured = {"sift": crossing(dense_below=700), "flexprefill": crossing(dense_below=800, name="flexprefill")}
    assert calibrated(strategy, given, measured) == expected


def test_wrong_arguments_are_left_as_they_are() -> None:
    assert calibrated("sift", ("sift.sunk=3",), {"sift": crossing()}) == ("sift.sunk=3",)


def crossing(*wins: bool, name: str = "sift", dense_below: int | None = None) -> Crossover:
    """A crossover of default options with a given `dense_below`."""
    found = dict(fit(measured := chunks(*wins or (False,)), 1024))
    found |= {} if dense_below is None else {"dense_below": dense_below}
    options = calibration.options(make_strategy(name))
    return Crossover(options=options, measured="2026-11-22 10:00", chunks=tuple(measured), **found)


def config_of(model: Path, **fields: object) -> EngineConfig:
    return EngineConfig(model=str(model), dtype="float32", prefill_chunk=64, **fields)


def made(config: EngineConfig, model: LoadedModel, **setting: object) -> Calibration:
    """A calibration of `sift` to 100 tokens; `setting` overrides that of this machine."""
    here = calibration.setting(config, model).model_copy(update=setting)
    return Calibration(setting=here, model="tiny", crossovers={"sift": crossing(dense_below=100)})


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load(config_of(tiny_llama), lambda message: None)


OTHER = {
    "machine": calibration.Machine(processor="another", threads=1, version="0"),
    "device": "another",
    "fingerprint": "another",
    "dtype": "bfloat16",
    "page_size": 32,
    "prefill_chunk": 128,
    "queries_per_row": 32,
    "backend": "another",
    "dense_kernel": "another",
}


def test_only_the_same_setting_counts(tiny_llama: Path, loaded: LoadedModel) -> None:
    config = config_of(tiny_llama)
    assert calibration.crossovers(config, loaded) == {}
    for name, value in OTHER.items():
        calibration.keep(made(config, loaded, **{name: value}))
        assert calibration.crossovers(config, loaded) == {}, name
    assert set(OTHER) == set(calibration.Setting.model_fields)
    calibration.keep(made(config, loaded))
    assert set(calibration.crossovers(config, loaded)) == {"sift"}
    assert len(calibration.stored()) == len(OTHER) + 1


@pytest.mark.parametrize("name", ["processor", "threads", "version"])
def test_another_machine_is_another_setting(tiny_llama: Path, loaded: LoadedModel, name: str) -> None:
    config, here = config_of(tiny_llama), calibration.machine()
    changed = {"processor": "another", "threads": here.threads + 1, "version": "0.0.0"}[name]
    calibration.keep(made(config, loaded, machine=here.model_copy(update={name: changed})))
    assert calibration.crossovers(config, loaded) == {}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_threads_are_those_that_compute(tiny_llama: Path, loaded: LoadedModel) -> None:
    config = config_of(tiny_llama)
    torch.set_num_threads(1)
    calibration.keep(made(config, loaded))
    assert calibration.machine().threads == 1
    assert "sift" in calibration.crossovers(config, loaded)
    torch.set_num_threads(64)
    assert calibration.machine().threads == len(os.sched_getaffinity(0))


def test_the_backend_is_the_one_that_runs(
    tiny_llama: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setitem(sys.modules, LIBRARY, types.SimpleNamespace(isa=lambda: "avx2"))
    assert calibration.running_backend("auto", cpu) == calibration.running_backend("native", cpu) == "native avx2"
    monkeypatch.setitem(sys.modules, LIBRARY, None)  # as if it were not built
    assert calibration.running_backend("auto", cpu) == calibration.running_backend("reference", gpu) == "reference"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert calibration.running_backend("auto", gpu) == "triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert calibration.running_backend("auto", gpu) == "reference"
    assert calibration.setting(config_of(tiny_llama), loaded).backend == "reference"


def test_engine_and_requests_take_it_unless_they_state_their_own(
    make: Make, tiny_llama: Path, loaded: LoadedModel
) -> None:
    calibration.keep(made(config_of(tiny_llama), loaded))
    engine = make(strategy="sift")
    requests = {
        "engine": {},
        "request": {"strategy": "sift+dense"},
        "its defaults": {"strategy_args": ("sift.sink=64",)},
        "other options": {"strategy_args": ("sift.sink=16",)},
        "stated": {"strategy": "sift", "strategy_args": ("sift.dense_below=2048",)},
    }
    for name, fields in requests.items():
        engine.add(Request(name, tokens(448), greedy(1), **fields))  # type: ignore[arg-type]
    outputs = drain(engine)
    found = {name: finish_of(outputs, name).sparsity.dense_fallback for name in requests}
    assert [name for name, fell_back in found.items() if fell_back] == ["other options", "stated"]
    stated = make(strategy="sift", strategy_args=("dense_below=2048",))
    stated.add(Request("a", tokens(448), greedy(1)))
    assert finish_of(drain(stated), "a").sparsity.dense_fallback


def test_without_one_the_strategys_own_default_holds(make: Make) -> None:
    engine = make(strategy="sift")
    engine.add(Request("a", tokens(448), greedy(1)))
    assert finish_of(drain(engine), "a").sparsity.dense_fallback


def test_the_engine_tells_once_that_a_measured_crossover_counts(tiny_llama: Path, loaded: LoadedModel) -> None:
    def heard(**fields: object) -> list[str]:
        said: list[str] = []
        Engine(config_of(tiny_llama, kv_memory=2**22, **fields), said.append)
        return [line for line in said if "dense_below" in line]

    assert heard(strategy="sift") == [], "nothing is stored"
    calibration.keep(made(config_of(tiny_llama), loaded))
    (line,) = heard(strategy="sift")
    assert all(part in line for part in ("sift.dense_below=100", "2026-11-22 10:00", "dense up to 2,048")), line
    assert len(heard(strategy="sift+dense")) == 1
    for others in ({"strategy": "dense"}, {"strategy_args": ("dense_below=7",)}, {"strategy_args": ("sink=0",)}):
        assert heard(**{"strategy": "sift"} | others) == []


def test_a_tiny_model_is_measured(tiny_llama: Path, loaded: LoadedModel) -> None:
    """512 positions in chunks of 192: two whole ones."""
    config = config_of(tiny_llama).model_copy(update={"prefill_chunk": 192})
    seen: list[tuple[int, int]] = []
    found = crossover.measure(config, loaded, lambda done, total: seen.append((done, total)))
    assert set(found.crossovers) == set(crossover.prompt_strategies())
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert found.setting == calibration.setting(config, loaded)
    for name, each in found.crossovers.items():
        assert [(chunk.queries, chunk.context) for chunk in each.chunks] == [(192, 192), (192, 384)]
        assert all(chunk.dense_ms > 0 and chunk.strategy_ms > 0 for chunk in each.chunks)
        assert each.options == repr(make_strategy(name, dense_below=0))
    assert len({tuple(chunk.dense_ms for chunk in each.chunks) for each in found.crossovers.values()}) == 1


def test_each_strategy_gets_the_fit_of_its_own_times(
    tiny_llama: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers and two chunks: sift is slower than dense in the first chunk only, flexprefill in both."""
    turns = iter([0, 0, 1, 1])

    def times(works: dict[str, object], device: torch.device) -> crossover.Times:
        faster = {"sift": next(turns) == 1, "flexprefill": False}
        return {name: 2.0 if name == "dense" else 1.0 if faster.get(name, True) else 3.0 for name in works}

    monkeypatch.setattr(crossover, "side_by_side", times)
    config = config_of(tiny_llama).model_copy(update={"prefill_chunk": 192})
    found = crossover.measure(config, loaded, lambda done, total: None).crossovers
    summaries = {name: found[name].summary for name in ("sift", "flexprefill", "xattention")}
    assert summaries == {"sift": "from 384", "flexprefill": "not up to 384: dense up to 768", "xattention": "from 192"}
    assert (found["sift"].dense_below, found["xattention"].dense_below) == (271, 191)  # isqrt(192 * 384 - 1), ...
    assert found["flexprefill"].dense_below == 384  # its square is 192 * 768
    chunk = Chunk(queries=192, context=192, dense_ms=4.0, strategy_ms=6.0)
    assert found["sift"].chunks == (chunk, chunk.model_copy(update={"context": 384, "strategy_ms": 2.0}))


def test_time_is_limited(tiny_llama: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "SECONDS", 0.0)
    found = crossover.measure(config_of(tiny_llama), loaded, lambda done, total: None)
    assert {len(each.chunks) for each in found.crossovers.values()} == {2}


def test_a_model_of_windows_has_nothing_to_choose_in(loaded: LoadedModel) -> None:
    windows = {name: getattr(loaded, name) for name in loaded.__slots__} | {"windows": (8, 8)}
    with pytest.raises(Unsupported, match="window"):
        crossover._layers(LoadedModel(**windows))


def test_disturbed_runs_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_and_quiet = iter([9.0, 1.0, 9.0, 1.1, 9.0, 1.05, 1.0])
    monkeypatch.setattr(crossover, "_milliseconds", lambda work, device: work())
    times = crossover.side_by_side({"a": lambda: next(slow_and_quiet), "b": lambda: 2.0}, torch.device("cpu"))
    assert times == {"a": 1.05, "b": 2.0}


def test_a_machine_that_never_rests_gets_the_median_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_of = iter([0.0, *(2.0**i for i in range(8))])
    monkeypatch.setattr(crossover, "_milliseconds", lambda work, device: work())
    assert crossover.side_by_side({"a": lambda: next(runs_of)}, torch.device("cpu")) == {"a": 12.0}
