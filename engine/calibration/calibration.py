"""Store of calibrations: the length from which each strategy beats dense, measured once per machine and model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from keysift.attention import Strategy, StrategyError, parse
from keysift.kvcache import Phase
from keysift.kvcache.native.cores import num_threads

from ..config import Backend, EngineConfig
from ..errors import KeysiftError
from ..model.embedded import cache_folder
from ..model.loaded import LoadedModel
from ..version import keysift_version
from .fit import Crossover, Record


class Machine(Record):
    """Machine that a calibration was measured on, and the version that measured it."""

    processor: str
    threads: int
    """Threads that compute."""
    version: str
    """Version of Keysift."""


class Setting(Record):
    """Machine, model and options that a calibration is valid for; any other setting needs its own."""

    machine: Machine
    device: str
    fingerprint: str
    """`LoadedModel.fingerprint`."""
    dtype: str
    page_size: int
    prefill_chunk: int
    queries_per_row: int
    backend: str
    """Backend that runs, not the configured one; see `running_backend`."""
    dense_kernel: str = "paged"
    """Kernel of the dense attention that strategies were compared with."""


class Calibration(Record):
    """Crossovers of the prompt strategies in one setting."""

    setting: Setting
    model: str
    """Name of the model, for display: one model may be served under several."""
    crossovers: dict[str, Crossover]
    """By name of the strategy."""


def machine() -> Machine:
    """This machine."""
    return Machine(processor=processor(), threads=num_threads(), version=keysift_version())


def setting(config: EngineConfig, model: LoadedModel) -> Setting:
    """Setting of this machine, model and configuration."""
    gpu = model.device.type == "cuda"
    return Setting(
        machine=machine(),
        device=torch.cuda.get_device_name(model.device) if gpu else model.device.type,
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        page_size=config.page_size,
        prefill_chunk=config.prefill_chunk,
        queries_per_row=config.queries_per_row,
        backend=running_backend(config.backend, model.device),
        dense_kernel=config.dense_kernel,
    )


def processor() -> str:
    """Name of the CPU."""
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def running_backend(backend: Backend, device: torch.device) -> str:
    """Backend that runs where `backend` is configured, native with its instruction set."""
    name = backend if backend != "auto" else "triton" if device.type == "cuda" else "native"
    if name == "native":
        try:
            from keysift.kvcache.native.library import isa
        except ImportError:  # not built
            return "reference"
        return f"native {isa()}"
    return name if name == "reference" or importlib.util.find_spec("triton") else "reference"


def options(strategy: Strategy) -> str:
    """All options of a strategy but `dense_below`, which is measured: other options may cross over elsewhere."""
    return repr(dataclasses.replace(strategy, dense_below=0))


def crossovers(config: EngineConfig, model: LoadedModel) -> dict[str, Crossover]:
    """Crossover of each strategy that was calibrated for exactly this setting, by name."""
    known = stored()
    if not known:
        return {}
    here = setting(config, model)
    return {name: found for each in known if each.setting == here for name, found in each.crossovers.items()}


def applied(strategy: str, arguments: Iterable[str], measured: Mapping[str, Crossover]) -> Crossover | None:
    """Crossover that applies to the prompt part of `strategy`.

    None: none was measured with these options, or the arguments state a `dense_below` themselves.
    """
    name, given = strategy.partition("+")[0], tuple(arguments)
    stated = {argument.partition("=")[0].strip() for argument in given}
    if (found := measured.get(name)) is None or stated & {"dense_below", f"{name}.dense_below"}:
        return None
    try:
        part = parse(strategy, given).part(Phase.PREFILL)
    except StrategyError:  # raised where the strategy is made
        return None
    return found if options(part) == found.options else None


def calibrated(strategy: str, arguments: Iterable[str], measured: Mapping[str, Crossover]) -> tuple[str, ...]:
    """The arguments, completed by the measured `dense_below` where one applies; see `applied`."""
    given = tuple(arguments)
    if (found := applied(strategy, given, measured)) is None:
        return given
    return (*given, f"{strategy.partition('+')[0]}.dense_below={found.dense_below}")


def announce(config: EngineConfig, measured: Mapping[str, Crossover], report: Callable[[str], None]) -> None:
    """Report the measured crossover that applies to the configured strategy, if any."""
    if (found := applied(config.strategy, config.strategy_args, measured)) is not None:
        name = config.strategy.partition("+")[0]
        wins = f"{found.summary} tokens"
        report(f"{name}.dense_below={found.dense_below}, as measured here on {found.measured} UTC: {wins}")


def store_file() -> Path:
    """File of all calibrations."""
    return cache_folder() / "calibration.json"


def stored() -> tuple[Calibration, ...]:
    """All stored calibrations that this version can read; empty if the file is missing or of another format."""
    with suppress(OSError):
        return tuple(known for known in map(_known, _read()) if known is not None)
    return ()


def keep(calibration: Calibration) -> Calibration:
    """Store a calibration. Returns what is stored for its setting afterwards.

    A stored crossover with the same options that was measured up to a longer context stays. Raises `KeysiftError` if
    the folder cannot be written to.
    """
    with _errors_with_file(), _locked(store_file().parent):
        records = [(record, _known(record)) for record in _read()]
        others = [record for record, known in records if known is None or known.setting != calibration.setting]
        for _, known in records:
            if known is not None and known.setting == calibration.setting:
                calibration = _merged(known, calibration)
        _write([*others, calibration.model_dump(mode="json")])
    return calibration


def _merged(old: Calibration, new: Calibration) -> Calibration:
    """The new calibration, with crossovers of the old one that are missing in it or reach a longer context."""
    crossovers = old.crossovers | {
        name: found
        for name, found in new.crossovers.items()
        if (before := old.crossovers.get(name)) is None
        or before.options != found.options
        or before.longest <= found.longest
    }
    return new.model_copy(update={"crossovers": crossovers})


def check_writable() -> None:
    """Raises `KeysiftError` where `keep` would, before anything is measured."""
    with _errors_with_file(), _locked(folder := store_file().parent), tempfile.TemporaryFile(dir=folder):
        _read()


def forget() -> bool:
    """Delete all calibrations. Returns False if there were none. Raises `KeysiftError` if that fails."""
    with _errors_with_file(), suppress(FileNotFoundError):
        store_file().unlink()
        return True
    return False


def _read() -> list[Any]:
    """Raw records of the file, of any version; empty for a file of another format."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads(store_file().read_bytes())
        records = found.get("calibrations") if isinstance(found, dict) else None
        return records if isinstance(records, list) else []
    return []


def _known(record: Any) -> Calibration | None:
    """The calibration of a raw record; None: one of another version, or none at all."""
    try:
        return Calibration.model_validate(record)
    except ValidationError:
        return None


def _write(records: list[Any]) -> None:
    """Replace the file atomically."""
    file = store_file()
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_text(json.dumps({"calibrations": records}, indent=1), encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create the folder and lock it against other processes, where the system supports that."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _errors_with_file() -> Iterator[None]:
    """Raise `OSError` as `KeysiftError` that names the file."""
    try:
        yield
    except OSError as error:
        raise KeysiftError(f"cannot store a calibration in {store_file()}: {error}") from None
