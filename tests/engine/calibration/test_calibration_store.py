"""File of calibrations: replacement, records of other versions, and permissions."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from keysift.engine import KeysiftError
from keysift.engine.calibration import calibration
from keysift.engine.calibration.calibration import Calibration, Machine, Setting
from keysift.engine.calibration.fit import Chunk, Crossover, fit

HERE = Setting(
    machine=Machine(processor="p", threads=2, version="1"),
    device="cpu",
    fingerprint="f",
    dtype="float32",
    page_size=16,
    prefill_chunk=1024,
    queries_per_row=64,
    backend="reference",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYSIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def crossing(*, up_to: int = 4, hour: int = 10, options: str = "Sift()") -> Crossover:
    """A crossover measured up to `up_to` chunks, none of which won."""
    contexts = range(1024, 1024 * up_to + 1, 1024)
    chunks = tuple(Chunk(queries=1024, context=context, dense_ms=1.0, strategy_ms=2.0) for context in contexts)
    return Crossover(options=options, measured=f"2026-11-22 {hour}:00", chunks=chunks, **dict(fit(chunks, 1024)))


def made(setting: Setting = HERE, **crossovers: Crossover) -> Calibration:
    return Calibration(setting=setting, model="tiny", crossovers=crossovers or {"sift": crossing()})


def test_a_newer_one_takes_the_place_of_an_older_one(cache: Path) -> None:
    first, second = made(), made(sift=crossing(hour=11))
    for each in (first, second):
        assert calibration.keep(each) == each
    assert calibration.stored() == (second,)
    assert [file.name for file in cache.iterdir()] == ["calibration.json"]


def test_a_shorter_one_does_not_replace_a_longer_one() -> None:
    long, short = crossing(up_to=6), crossing(up_to=2, hour=11)
    calibration.keep(made(sift=long, other=short))
    held = calibration.keep(made(sift=short, other=long, new=short))
    assert held.crossovers == {"sift": long, "other": long, "new": short}
    assert calibration.stored() == (held,)
    changed = crossing(up_to=2, options="Sift(sink=0)")
    assert calibration.keep(made(sift=changed)).crossovers["sift"] == changed, "the longer one is of other options"


def test_another_setting_stays() -> None:
    other = made(HERE.model_copy(update={"page_size": 32}))
    for each in (other, made(), made()):
        calibration.keep(each)
    assert calibration.stored() == (other, made())


FOREIGN = [{"of": "another version"}, {**made().model_dump(mode="json"), "new_field": 1}, 3, None, []]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_record_that_this_version_cannot_read_hides_and_loses_nothing(cache: Path, foreign: object) -> None:
    cache.mkdir()
    other = made(HERE.model_copy(update={"page_size": 32}))
    calibration.store_file().write_text(json.dumps({"calibrations": [foreign, other.model_dump(mode="json")]}))
    assert calibration.stored() == (other,)
    calibration.keep(made())
    assert calibration.stored() == (other, made())
    assert json.loads(calibration.store_file().read_text())["calibrations"][0] == foreign


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"calibrations": 3}'])
def test_a_file_that_is_none_of_ours_counts_as_missing(cache: Path, content: bytes) -> None:
    cache.mkdir()
    calibration.store_file().write_bytes(content)
    assert calibration.stored() == ()
    calibration.keep(made())
    assert calibration.stored() == (made(),)


def test_a_folder_that_cannot_be_written_is_named(cache: Path) -> None:
    calibration.check_writable()
    assert [*cache.iterdir()] == [], "checking leaves no file"
    cache.rmdir()
    cache.write_text("in the way")
    assert calibration.stored() == ()
    for attempt in (calibration.check_writable, lambda: calibration.keep(made())):
        with pytest.raises(KeysiftError, match=str(cache / "calibration.json")):
            attempt()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.keep(made())

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(KeysiftError, match="no space left"):
        calibration.keep(made(sift=crossing(hour=11)))
    assert [file.name for file in cache.iterdir()] == ["calibration.json"]
    assert calibration.stored() == (made(),)


def test_writers_wait_for_each_other(cache: Path) -> None:
    calibration.keep(made())
    other = made(HERE.model_copy(update={"page_size": 32}))
    handle = os.open(cache, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    writer = threading.Thread(target=calibration.keep, args=(other,))
    writer.start()
    writer.join(0.2)
    assert writer.is_alive()
    assert calibration.stored() == (made(),), "reading needs no lock"
    os.close(handle)
    writer.join(10)
    assert calibration.stored() == (made(), other)


def test_forgetting_deletes_the_file(cache: Path) -> None:
    assert not calibration.forget()
    calibration.keep(made())
    assert calibration.forget()
    assert calibration.stored() == ()
