"""As much of a CUDA graph as any device can do: the ops that some work ran, run again over the same tensors.

It shows what a recording takes from the host. It keeps every tensor alive and knows no streams, so it shows nothing of
a graph's memory, nor of kernels that are no ops of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
"""Ops that wait for the device: what they found would be the same in every replay."""


class Replayer(TorchDispatchMode):
    """Notes every op with the very tensors that it took and gave. Only ops of torch: no native code, no Triton."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"{name}: a step that is recorded may not wait for the device")
        given = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, given))
        return given

    def replay(self) -> None:
        for func, args, kwargs, given in self._calls:
            for old, new in zip(tree_leaves(given), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder:
    """Counts what it has recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        replayer = Replayer()
        work()  # as for a real one, whose kernels are compiled in a first run
        with replayer, mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):  # as models ask
            result = work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            replayer.replay()

        return result, replay
