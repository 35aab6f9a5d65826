"""The stand-in for CUDA graphs detects forbidden ops of a recording and memory that a replay may not rely on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from keysift.engine.execution.recorder import WaitsForDevice
from tests.replaying import Recorder

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "number": lambda x: int(x.sum()),
    "decision": lambda x: bool((x > 0).any()),
    "list": lambda x: x.tolist(),
    "copy": lambda x: x.cpu(),
    "places": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "bound": lambda x: range(x[0]),
}


@pytest.mark.parametrize("work", WAITS.values(), ids=WAITS.keys())
def test_waits_are_detected(work: Callable[[Tensor], object]) -> None:
    with pytest.raises(WaitsForDevice), torch.inference_mode():
        Recorder()(lambda: work(torch.arange(4)))


def test_a_replay_computes_from_current_values() -> None:
    x = torch.arange(4.0)
    with torch.inference_mode():
        doubled, replay = Recorder()(lambda: (x * 2).add_(1))
        x.add_(10)
        replay()
    assert doubled.tolist() == [21.0, 23.0, 25.0, 27.0]


def test_memory_that_a_replay_has_not_written_is_nan() -> None:
    """Memory that held a value by chance when the work was recorded."""
    x = torch.zeros(4)
    kept: list[Tensor] = []

    def work() -> Tensor:
        kept.append(room := torch.empty(4))
        room[:2] = x[:2]
        return room

    with torch.inference_mode():
        _, replay = Recorder()(work)
        kept[-1].fill_(5.0)  # outside of any recorded op
        replay()
        assert kept[-1][:2].tolist() == [0.0, 0.0]
        assert kept[-1][2:].isnan().all()


def test_freed_memory_is_not_read_by_a_replay() -> None:
    kept, lost = torch.ones(4), [torch.ones(4)]
    with torch.inference_mode():
        _, fine = Recorder()(lambda: kept + 1)
        _, broken = Recorder()(lambda: lost[0] + 1)
        lost.clear()
        fine()
        with pytest.raises(AssertionError, match="that was freed"):
            broken()
