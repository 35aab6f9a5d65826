"""From which length on choosing pays: measured once for a machine and a model, kept in the user's cache folder."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keysift.attention.strategy import LARGEST

from .config import EngineConfig
from .embedded import cache_folder
from .errors import KeysiftError
from .model import LoadedModel
from .version import keysift_version


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setting(_Record):
    """What a measurement holds for; anything else needs one of its own."""

    processor: str
    cores: int
    device: str
    fingerprint: str
    """Of the model's configuration and weights in their precision; see `LoadedModel`."""
    dtype: str
    page_size: int
    prefill_chunk: int
    queries_per_row: int
    backend: str
    version: str
    """Of Keysift."""

    @property
    def place(self) -> tuple[str, int, str]:
        """The machine and the version, without a model."""
        return self.processor, self.cores, self.version


class Chunk(_Record):
    """One chunk of a prompt: its queries, its keys so far, and milliseconds of attention summed over some layers."""

    queries: int
    context: int
    dense_ms: float
    strategy_ms: float

    @property
    def work(self) -> int:
        return self.queries * self.context

    @property
    def wins(self) -> bool:
        return self.strategy_ms < self.dense_ms


class Crossover(_Record):
    """Where a strategy begins to win, and what was measured."""

    dense_below: int = Field(ge=0, le=LARGEST)
    """The strategy's option, in tokens; see `Strategy.at`."""
    wins_from: int | None
    """Tokens of context of the first chunk from which on it always won; None: it did not by the end."""
    chunks: tuple[Chunk, ...]


class Calibration(_Record):
    """The crossover of each prompt strategy, by name."""

    setting: Setting
    model: str
    """For people: it may be served under several names."""
    measured: str
    """UTC."""
    crossovers: dict[str, Crossover]


class _Store(_Record):
    calibrations: tuple[Calibration, ...] = ()


def fit(chunks: Sequence[Chunk]) -> Crossover:
    """The least `dense_below` from which on every measured chunk wins; chunks in order of their work, at least one.

    A prompt then takes whichever is faster chunk by chunk. If the last chunk does not win, every measured length is
    dense, and longer ones, of which nothing is known, are the strategy's.
    """
    losing = [index for index, chunk in enumerate(chunks) if not chunk.wins]
    first = losing[-1] + 1 if losing else 0
    if first == len(chunks):
        return Crossover(dense_below=math.isqrt(chunks[-1].work - 1) + 1, wins_from=None, chunks=tuple(chunks))
    winner = chunks[first]
    return Crossover(dense_below=math.isqrt(winner.work - 1), wins_from=winner.context, chunks=tuple(chunks))


def setting(config: EngineConfig, model: LoadedModel) -> Setting:
    """What holds here and now."""
    gpu = model.device.type == "cuda"
    return Setting(
        processor=processor(),
        cores=usable_cores(),
        device=torch.cuda.get_device_name(model.device) if gpu else model.device.type,
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        page_size=config.page_size,
        prefill_chunk=config.prefill_chunk,
        queries_per_row=config.queries_per_row,
        backend=config.backend,
        version=keysift_version(),
    )


def processor() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def crossovers(config: EngineConfig, model: LoadedModel) -> dict[str, int]:
    """`dense_below` of each strategy that was calibrated for exactly this setting."""
    known = stored()
    if not known:
        return {}
    here = setting(config, model)
    return {
        name: crossover.dense_below
        for calibration in known
        if calibration.setting == here
        for name, crossover in calibration.crossovers.items()
    }


def calibrated(strategy: str, arguments: Iterable[str], measured: Mapping[str, int]) -> tuple[str, ...]:
    """The arguments, with the measured `dense_below` for the part of `strategy` that chooses for prompts.

    Unless it has none, or they state one themselves.
    """
    prompt, given = strategy.partition("+")[0], tuple(arguments)
    stated = {argument.partition("=")[0].strip() for argument in given}
    if prompt not in measured or stated & {"dense_below", f"{prompt}.dense_below"}:
        return given
    return (*given, f"{prompt}.dense_below={measured[prompt]}")


def store_file() -> Path:
    return cache_folder() / "calibration.json"


def stored() -> tuple[Calibration, ...]:
    """Every calibration that was kept; none where the file is missing, or not one that this version writes."""
    try:
        return _Store.model_validate_json(store_file().read_bytes()).calibrations
    except (OSError, ValidationError):
        return ()


def keep(calibration: Calibration) -> Path:
    """Store it in place of an older one of the same setting, whole or not at all.

    Raises `KeysiftError` where the folder cannot be written to.
    """
    others = [other for other in stored() if other.setting != calibration.setting]
    file = store_file()
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(_Store(calibrations=(*others, calibration)).model_dump_json(indent=1), encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        raise KeysiftError(f"cannot store the calibration in {file}: {error}") from None
    return file
