"""Combinations of options, devices and models that are not supported: one table, one check, one listing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .checked import Checked
from .errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    import torch

Value = str | int | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Properties of the machine, the process and the model. None: not known yet, so it rules nothing out."""

    runs_on: torch.device | None = None
    """Device that the model computes on."""
    gpus: int | None = None
    """CUDA devices of this machine."""
    torch_distributed: bool | None = None
    """torch was built with torch.distributed."""
    splits_weights: bool | None = None
    """transformers can load a rank's part of the weights."""
    torchrun: bool | None = None
    """torchrun started this process, as one of several."""
    process_group: bool | None = None
    """This process is in a torch process group."""
    one_process: bool | None = None
    """The caller drives the model itself, layer by layer: evaluation and calibration."""
    key_bias: bool | None = None
    """The checkpoint adds a learned bias to every key."""
    devices: int | None = None
    """Devices that the layers are on."""


FACTS = frozenset(field.name for field in fields(Facts))


@dataclass(frozen=True, slots=True)
class Condition:
    """A value of an option or of a fact that limits other options."""

    name: str
    """Field of `EngineConfig` or of `Facts`."""
    holds: Callable[[Any], bool]
    text: str
    """For the listing."""
    error: str = ""
    """For an error, with {} for the value; empty: `text`."""

    def met(self, config: Checked, facts: Facts) -> bool:
        value = self._value(config, facts)
        known = value is not None or self.name not in FACTS
        return known and self.holds(value)

    def describe(self, config: Checked, facts: Facts) -> str:
        return (self.error or self.text).format(self._value(config, facts))

    def _value(self, config: Checked, facts: Facts) -> Any:
        return getattr(facts if self.name in FACTS else config, self.name)


OFFLOAD = Condition("kv_offload", lambda folder: folder is not None, "with kv_offload")
NO_OFFLOAD = Condition("kv_offload", lambda folder: folder is None, "without kv_offload")
DEVICE_MAP = Condition("device_map", lambda value: value == "auto", "with device_map auto")
RANKS = Condition(
    "tensor_parallel_size",
    lambda size: size > 1,
    "with tensor_parallel_size above 1",
    "with tensor_parallel_size {}",
)
NO_CUDA = Condition("runs_on", lambda device: device.type != "cuda", "on a device other than CUDA", "on {}")
NO_CPU = Condition("runs_on", lambda device: device.type != "cpu", "on a device other than the CPU", "on {}")
ONE_DEVICE = Condition(
    "runs_on", lambda device: device.type != "cuda" or device.index is not None, "on the CPU or one GPU", "on {}"
)
GPUS = Condition("gpus", lambda count: count > 0, "where there are GPUs")
NO_DISTRIBUTED = Condition("torch_distributed", lambda built: not built, "with a torch without torch.distributed")
NO_SPLIT = Condition("splits_weights", lambda able: not able, "with a transformers that has no DistributedConfig")
TORCHRUN = Condition("torchrun", bool, "under torchrun")
PROCESS_GROUP = Condition("process_group", bool, "in a process that is in a process group")
ONE_PROCESS = Condition("one_process", bool, "for evaluation and calibration")
KEY_BIAS = Condition("key_bias", bool, "with a checkpoint that has a bias of its keys")
SEVERAL_DEVICES = Condition("devices", lambda count: count > 1, "on several devices")


@dataclass(frozen=True, slots=True)
class Limit:
    """The only values that an option may have while all conditions are met."""

    option: str
    allowed: tuple[Value, ...]
    conditions: tuple[Condition, ...]
    reason: str
    """A clause that follows "as"."""

    def refusal(self, config: Checked, facts: Facts) -> InvalidRequest | Unsupported | None:
        """The error for a configuration beyond the limit; None: it is within. `Unsupported` where the model decides."""
        value = getattr(config, self.option)
        if value in self.allowed or not all(condition.met(config, facts) for condition in self.conditions):
            return None
        where = " ".join(condition.describe(config, facts) for condition in self.conditions)
        problem = f"{self.values} {where}, as {self.reason}, got {_spell(value, quoted=True)}"
        of_model = KEY_BIAS in self.conditions
        return Unsupported(f"{self.option}: {problem}") if of_model else InvalidRequest(self.option, problem)

    @property
    def values(self) -> str:
        *first, last = map(_spell, self.allowed)
        return f"{', '.join(first)} or {last}" if first else last

    @property
    def where(self) -> str:
        return " ".join(condition.text for condition in self.conditions)


UNSUPPORTED = (
    Limit("kv_offload_memory", (None, 0), (NO_OFFLOAD,), "it is the size of that store"),
    Limit("kv_prefetch", (0,), (NO_OFFLOAD,), "it fetches pages from that store"),
    Limit("cuda_graphs", (False,), (OFFLOAD,), "its pages move between steps"),
    Limit("cuda_graphs", (False,), (DEVICE_MAP,), "a graph records the work of one device"),
    Limit("kv_offload", (None,), (DEVICE_MAP,), "the pages of one device alone can be offloaded"),
    Limit("tensor_parallel_size", (1,), (DEVICE_MAP,), "either layers or heads are spread"),
    Limit("quantization", ("none",), (RANKS,), "a rank's part of a layer stays as transformers loads it"),
    Limit("cuda_graphs", (False,), (RANKS,), "ranks do not record their steps"),
    Limit("kv_offload", (None,), (RANKS,), "ranks do not agree on the pages that a store has room for"),
    Limit("device", ("auto", "cpu", "cuda"), (RANKS,), "each rank has a device of its own"),
    Limit("cuda_graphs", (False,), (NO_CUDA,), "CUDA devices alone have graphs"),
    Limit("quantization", ("none",), (NO_CPU,), "no kernel there reads 8-bit weights"),
    Limit("kv_offload", (None, "pinned"), (NO_CPU,), "files are read by the CPU's kernels alone"),
    Limit("device_map", ("none",), (ONE_DEVICE,), "it spreads layers over all CUDA devices"),
    Limit("device", ("auto", "cuda"), (RANKS, GPUS), "ranks compute there unless CUDA_VISIBLE_DEVICES= hides them"),
    Limit("tensor_parallel_size", (1,), (NO_DISTRIBUTED,), "ranks exchange sums through it"),
    Limit("tensor_parallel_size", (1,), (NO_SPLIT,), "later ones can load a part of the weights"),
    Limit("tensor_parallel_size", (1,), (TORCHRUN,), "the engine starts its processes itself"),
    Limit("tensor_parallel_size", (1,), (PROCESS_GROUP,), "that may be of another engine"),
    Limit("tensor_parallel_size", (1,), (ONE_PROCESS,), "one process looks at all heads there"),
    Limit("tensor_parallel_size", (1,), (KEY_BIAS,), "the bias mixes all KV heads"),
    Limit("device_map", ("none",), (KEY_BIAS, SEVERAL_DEVICES), "the bias is kept on one device"),
)
"""The whole table. A configuration is held against all of it, as far as the facts are known."""
NOTHING = Facts()


def check(config: Checked, facts: Facts = NOTHING) -> None:
    """Raises `InvalidRequest` or `Unsupported` naming the option, its limit and its value."""
    for limit in UNSUPPORTED:
        if (refusal := limit.refusal(config, facts)) is not None:
            raise refusal


def rows() -> Iterator[tuple[str, str, str, str]]:
    """The table as text: option, only values, condition, reason."""
    for limit in UNSUPPORTED:
        yield limit.option, limit.values, limit.where, limit.reason


def _spell(value: Value, *, quoted: bool = False) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value) if quoted else str(value)
