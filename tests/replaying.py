"""Stand-in for CUDA graphs on any device: runs the recorded ops of some work again over the same tensors.

It detects values that a recording takes from the host, and reads of memory that a replay has not written: before each
replay the recording's own memory is filled with NaN or -1, and foreign memory must still be alive. It keeps all memory
of the recording and has no streams, so it tests neither how graphs share memory nor kernels that are not ops of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from keysift.attention import StrategyFailure
from keysift.engine.execution.recorder import WaitsForDevice
from keysift.kvcache.native.checks import checked

T = TypeVar("T")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
"""Ops that wait for the device: their result would be the same in every replay."""
WAITING = {"item", "tolist", "cpu", "numpy", "__array__", "__int__", "__float__", "__bool__", "__index__"}
"""Methods that wait for the device, not all of which are ops on a CPU."""


class NoWaits(TorchFunctionMode):
    """Mode in which methods that read a tensor's values on the host raise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITING:
            raise waits(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(name: str) -> WaitsForDevice:
    return WaitsForDevice(f"{name}: a step that is recorded may not wait for the device")


class Taken:
    """A tensor over foreign memory, which it does not keep alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._memory = StorageWeakRef(tensor.untyped_storage())
        self._dtype, self._place = tensor.dtype, (tensor.storage_offset(), tensor.size(), tensor.stride())

    def again(self) -> Tensor:
        memory = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        assert memory is not None, "a replay would read memory that was freed"
        return torch.empty(0, dtype=self._dtype).set_(memory, *self._place)  # type: ignore[call-overload,no-any-return]


class Replayer(TorchDispatchMode):
    """Records every op with its input and output memory. Only ops of torch: no native code, no Triton."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any]] = []
        """Ops, their arguments and results; each tensor is the recording's own or `Taken`."""
        self._made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or (name == "index" and _masks(args[1])):
            raise waits(name)
        given = func(*args, **(kwargs or {}))
        self._note_made((args, kwargs), given)
        if "empty" not in name:  # a graph's memory is there already
            self._calls.append((func, *tree_map(self._noted, ((args, kwargs or {}), given))))
        return given

    def _noted(self, each: Any) -> Any:
        foreign = isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in {0, *self._made}
        return Taken(each) if foreign else each

    def _note_made(self, taken: Any, given: Any) -> None:
        """Record memory of an op's results that is not memory of its arguments."""
        before = {each.untyped_storage().data_ptr() for each in tree_leaves(taken) if isinstance(each, Tensor)}
        for each in tree_leaves(given):
            if isinstance(each, Tensor) and (storage := each.untyped_storage()).data_ptr() not in {0, *before}:
                self._made[storage.data_ptr()] = storage

    def replay(self) -> None:
        for storage in self._made.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)  # type: ignore[call-overload]  # NaN, -1, true
        for func, taken, given in self._calls:
            args, kwargs = tree_map(lambda each: each.again() if isinstance(each, Taken) else each, taken)
            for old, new in zip(tree_leaves(given), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _masks(indices: Any) -> bool:
    """The number of indexed elements depends on values on the device."""
    return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in indices)


@contextmanager
def _unwrapping() -> Iterator[None]:
    """Raise a wait itself: real ones are no exceptions, which a strategy's failure would wrap."""
    try:
        yield
    except StrategyFailure as error:
        if isinstance(error.__cause__, WaitsForDevice):
            raise error.__cause__ from None
        raise


class Recorder:
    """Recorder of work that counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        replayer = Replayer()
        work()  # as for a real one, whose kernels are compiled in a first run
        capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
        with capturing, checked(False), replayer, NoWaits(), _unwrapping():
            result = work()  # models test for a recording
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            replayer.replay()

        return result, replay
