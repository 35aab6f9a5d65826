"""From which length on choosing pays: measured once for a machine and a model, kept in the user's cache folder."""

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
    """What a measurement holds for, apart from the model and how it is run."""

    processor: str
    threads: int
    """Those that really compute."""
    version: str
    """Of Keysift."""


class Setting(Record):
    """What a measurement holds for; anything else needs one of its own."""

    machine: Machine
    device: str
    fingerprint: str
    """Of the model's configuration and weights in their precision; see `LoadedModel`."""
    dtype: str
    page_size: int
    prefill_chunk: int
    queries_per_row: int
    backend: str
    """The one that really runs; see `running`."""
    dense_kernel: str = "paged"
    """What the strategies were up against."""


class Calibration(Record):
    """The crossover of each prompt strategy, by name."""

    setting: Setting
    model: str
    """For people: it may be served under several names."""
    crossovers: dict[str, Crossover]


def machine() -> Machine:
    return Machine(processor=processor(), threads=num_threads(), version=keysift_version())


def setting(config: EngineConfig, model: LoadedModel) -> Setting:
    """What holds here and now."""
    gpu = model.device.type == "cuda"
    return Setting(
        machine=machine(),
        device=torch.cuda.get_device_name(model.device) if gpu else model.device.type,
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        page_size=config.page_size,
        prefill_chunk=config.prefill_chunk,
        queries_per_row=config.queries_per_row,
        backend=running(config.backend, model.device),
        dense_kernel=config.dense_kernel,
    )


def processor() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def running(asked: Backend, device: torch.device) -> str:
    """The twins that run where `asked` is configured, the native ones with their instruction set."""
    name = asked if asked != "auto" else "triton" if device.type == "cuda" else "native"
    if name == "native":
        try:
            from keysift.kvcache.native.library import isa
        except ImportError:  # not built
            return "reference"
        return f"native {isa()}"
    return name if name == "reference" or importlib.util.find_spec("triton") else "reference"


def options(strategy: Strategy) -> str:
    """All options of a strategy but the one that is measured: with others it may win elsewhere."""
    return repr(dataclasses.replace(strategy, dense_below=0))


def crossovers(config: EngineConfig, model: LoadedModel) -> dict[str, Crossover]:
    """The crossover of each strategy that was calibrated for exactly this setting."""
    known = stored()
    if not known:
        return {}
    here = setting(config, model)
    return {name: found for each in known if each.setting == here for name, found in each.crossovers.items()}


def applied(strategy: str, arguments: Iterable[str], measured: Mapping[str, Crossover]) -> Crossover | None:
    """The crossover that counts for the part of `strategy` that chooses for prompts.

    None: there is none, or not with these options, or the arguments state a `dense_below` themselves.
    """
    name, given = strategy.partition("+")[0], tuple(arguments)
    stated = {argument.partition("=")[0].strip() for argument in given}
    if (found := measured.get(name)) is None or stated & {"dense_below", f"{name}.dense_below"}:
        return None
    try:
        part = parse(strategy, given).part(Phase.PREFILL)
    except StrategyError:  # whoever makes the strategy says so
        return None
    return found if options(part) == found.options else None


def calibrated(strategy: str, arguments: Iterable[str], measured: Mapping[str, Crossover]) -> tuple[str, ...]:
    """The arguments, with the measured `dense_below` where one counts; see `applied`."""
    given = tuple(arguments)
    if (found := applied(strategy, given, measured)) is None:
        return given
    return (*given, f"{strategy.partition('+')[0]}.dense_below={found.dense_below}")


def tell(config: EngineConfig, measured: Mapping[str, Crossover], report: Callable[[str], None]) -> None:
    """One line, if a measured crossover counts for the configured strategy."""
    if (found := applied(config.strategy, config.strategy_args, measured)) is not None:
        name = config.strategy.partition("+")[0]
        report(f"{name}.dense_below={found.dense_below}, as measured here on {found.measured} UTC: {found.told} tokens")


def store_file() -> Path:
    return cache_folder() / "calibration.json"


def stored() -> tuple[Calibration, ...]:
    """Every calibration that was kept and that this version can read; none where the file is missing or not ours."""
    with suppress(OSError):
        return tuple(known for known in map(_known, _read()) if known is not None)
    return ()


def keep(calibration: Calibration) -> Calibration:
    """Store it, and return what is stored for its setting from now on.

    A crossover of the same setting and options that was measured up to a longer context stays. Raises `KeysiftError`
    where the folder cannot be written to.
    """
    with _naming_the_file(), _alone(store_file().parent):
        records = [(record, _known(record)) for record in _read()]
        others = [record for record, known in records if known is None or known.setting != calibration.setting]
        for _, known in records:
            if known is not None and known.setting == calibration.setting:
                calibration = _merged(known, calibration)
        _write([*others, calibration.model_dump(mode="json")])
    return calibration


def _merged(old: Calibration, new: Calibration) -> Calibration:
    """The new one, with what the old one knows up to a longer context, or alone."""
    crossovers = old.crossovers | {
        name: found
        for name, found in new.crossovers.items()
        if (before := old.crossovers.get(name)) is None
        or before.options != found.options
        or before.longest <= found.longest
    }
    return new.model_copy(update={"crossovers": crossovers})


def check_writable() -> None:
    """Raises `KeysiftError` where `keep` would, before anything was measured for nothing."""
    with _naming_the_file(), _alone(folder := store_file().parent), tempfile.TemporaryFile(dir=folder):
        _read()


def forget() -> bool:
    """Delete every calibration; whether there was a file. Raises `KeysiftError` where it cannot be deleted."""
    with _naming_the_file(), suppress(FileNotFoundError):
        store_file().unlink()
        return True
    return False


def _read() -> list[Any]:
    """The records as they were written, by whatever version; none in a file that is not ours."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads(store_file().read_bytes())
        records = found.get("calibrations") if isinstance(found, dict) else None
        return records if isinstance(records, list) else []
    return []


def _known(record: Any) -> Calibration | None:
    """None: of another version, or no calibration."""
    try:
        return Calibration.model_validate(record)
    except ValidationError:
        return None


def _write(records: list[Any]) -> None:
    """Whole or not at all."""
    file = store_file()
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_text(json.dumps({"calibrations": records}, indent=1), encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder; nobody else changes what is in it meanwhile, where the system can lock one."""
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
def _naming_the_file() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KeysiftError(f"cannot store a calibration in {store_file()}: {error}") from None
