"""Calibration: the fit, the store, who takes a measured crossover, and a measurement on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keysift.attention import Strategy
from keysift.attention import make as make_strategy
from keysift.engine import EngineConfig, KeysiftError, Request, Unsupported, calibration, crossover
from keysift.engine.calibration import Calibration, Chunk, calibrated, fit
from keysift.engine.model import LoadedModel, load
from keysift.kvcache import Phase
from tests.engine.driver import Make, drain, finish_of, greedy, tokens


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
    """Whether each chunk runs the strategy and not dense."""
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
def test_the_fit_runs_what_wins_and_keeps_winning(
    wins: tuple[bool, ...], expected: tuple[bool, ...], queries: int
) -> None:
    measured = chunks(*wins, queries=queries)
    found = fit(measured)
    for strategy in crossover.prompt_strategies().values():
        assert tuple(runs(strategy, measured, found.dense_below)) == expected
    first = next((chunk.context for chunk, sparse in zip(measured, expected, strict=True) if sparse), None)
    assert found.wins_from == first
    assert found.chunks == tuple(measured)


def test_yardsticks_are_not_calibrated() -> None:
    names = set(crossover.prompt_strategies())
    assert {"flexprefill", "sift"} <= names
    assert not names & {"oracle", "dense", "streaming"}


ARGUMENTS = {
    "plain": ("sift", (), ("sift.dense_below=700",)),
    "beside others": ("sift", ("sift.sink=0",), ("sift.sink=0", "sift.dense_below=700")),
    "of a pair": ("sift+streaming", (), ("sift.dense_below=700",)),
    "for the tokens only": ("dense+sift", (), ()),
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
def test_what_is_stated_goes_before_what_was_measured(
    strategy: str, given: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert calibrated(strategy, given, {"sift": 700, "flexprefill": 800}) == expected


def config_of(model: Path, **fields: object) -> EngineConfig:
    return EngineConfig(model=str(model), dtype="float32", prefill_chunk=64, **fields)


def made(config: EngineConfig, model: LoadedModel, **setting: object) -> Calibration:
    """A calibration of `sift` to 100 tokens; `setting` differs from what holds here."""
    here = calibration.setting(config, model).model_copy(update=setting)
    found = fit(chunks(False)).model_copy(update={"dense_below": 100})
    return Calibration(setting=here, model="tiny", measured="2026-11-22 10:00", crossovers={"sift": found})


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load(config_of(tiny_llama), lambda message: None)


OTHER = {
    "processor": "another",
    "cores": 99,
    "device": "another",
    "fingerprint": "another",
    "dtype": "bfloat16",
    "page_size": 32,
    "prefill_chunk": 128,
    "queries_per_row": 32,
    "backend": "native",
    "version": "0.0.0",
}


def test_only_the_same_setting_counts(tiny_llama: Path, loaded: LoadedModel) -> None:
    config = config_of(tiny_llama)
    assert calibration.crossovers(config, loaded) == {}
    for name, value in OTHER.items():
        calibration.keep(made(config, loaded, **{name: value}))
        assert calibration.crossovers(config, loaded) == {}, name
    assert set(OTHER) == set(calibration.Setting.model_fields)
    calibration.keep(made(config, loaded))
    assert calibration.crossovers(config, loaded) == {"sift": 100}
    assert len(calibration.stored()) == len(OTHER) + 1


def test_a_newer_one_takes_the_place_of_an_older_one(tiny_llama: Path, loaded: LoadedModel, cache: Path) -> None:
    first = made(config := config_of(tiny_llama), loaded)
    second = first.model_copy(update={"measured": "2026-11-22 11:00"})
    for each in (first, second):
        calibration.keep(each)
    assert calibration.stored() == (second,)
    assert calibration.crossovers(config, loaded) == {"sift": 100}
    assert [file.name for file in cache.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"calibrations": [{}]}', b'{"calibrations": 3}'])
def test_a_file_that_is_none_of_ours_counts_as_missing(
    tiny_llama: Path, loaded: LoadedModel, cache: Path, content: bytes
) -> None:
    cache.mkdir()
    calibration.store_file().write_bytes(content)
    assert calibration.crossovers(config_of(tiny_llama), loaded) == {}
    calibration.keep(mine := made(config_of(tiny_llama), loaded))
    assert calibration.stored() == (mine,)


def test_a_folder_that_cannot_be_written_is_named(tiny_llama: Path, loaded: LoadedModel, cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(KeysiftError, match=str(cache / "calibration.json")):
        calibration.keep(made(config_of(tiny_llama), loaded))


def test_engine_and_requests_take_it_unless_they_state_their_own(
    make: Make, tiny_llama: Path, loaded: LoadedModel
) -> None:
    calibration.keep(made(config_of(tiny_llama), loaded))
    engine = make(strategy="sift", strategy_args=("sift.threshold=0.1", "sift.sink=0"))
    requests = {
        "engine": {},
        "request": {"strategy": "sift+dense"},
        "options": {"strategy_args": ("sift.sink=16",)},
        "stated": {"strategy": "sift", "strategy_args": ("sift.dense_below=2048",)},
    }
    for name, fields in requests.items():
        engine.add(Request(name, tokens(448), greedy(1), **fields))  # type: ignore[arg-type]
    outputs = drain(engine)
    told = {name: finish_of(outputs, name).sparsity.dense_fallback for name in requests}
    assert told == {"engine": False, "request": False, "options": False, "stated": True}
    stated = make(strategy="sift", strategy_args=("dense_below=2048",))
    stated.add(Request("a", tokens(448), greedy(1)))
    assert finish_of(drain(stated), "a").sparsity.dense_fallback


def test_without_one_the_strategys_own_default_holds(make: Make) -> None:
    engine = make(strategy="sift")
    engine.add(Request("a", tokens(448), greedy(1)))
    assert finish_of(drain(engine), "a").sparsity.dense_fallback


def test_a_tiny_model_is_measured(tiny_llama: Path, loaded: LoadedModel) -> None:
    """512 positions in chunks of 192: two whole ones."""
    config = config_of(tiny_llama).model_copy(update={"prefill_chunk": 192})
    seen: list[tuple[int, int]] = []
    found = crossover.measure(config, loaded, lambda done, total: seen.append((done, total)))
    assert set(found.crossovers) == set(crossover.prompt_strategies())
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert found.setting == calibration.setting(config, loaded)
    for each in found.crossovers.values():
        assert [(chunk.queries, chunk.context) for chunk in each.chunks] == [(192, 192), (192, 384)]
        assert all(chunk.dense_ms > 0 and chunk.strategy_ms > 0 for chunk in each.chunks)
        assert each == fit(each.chunks)


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
