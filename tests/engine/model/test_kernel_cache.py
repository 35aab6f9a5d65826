"""Memory of the kernels that torch compiles for each number of rows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from keysift.engine.model.cpu.kernel_cache import VARIABLES, bound_kernel_cache

PROGRAM = """
import psutil, sys, torch
from keysift.engine.model.cpu.kernel_cache import bound_kernel_cache

if sys.argv[1] == "bounded":
    bound_kernel_cache()
weight = torch.zeros(576, 576, dtype=torch.bfloat16)
grown, before = psutil.Process().memory_info, None
with torch.inference_mode():
    for rows in range(33, 183):
        torch.nn.functional.linear(torch.zeros(rows, 576, dtype=torch.bfloat16), weight)
        before = before or grown().rss
print((grown().rss - before) / 2**20)
"""


def grown(mode: str) -> float:
    """MiB that products with 150 numbers of rows leave behind."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", PROGRAM, mode]
    return float(
        subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment | {"OMP_NUM_THREADS": "2"}
        ).stdout
    )


@pytest.mark.skipif(sys.platform != "linux", reason="measures the memory of glibc")
def test_kernels_of_many_lengths_do_not_stay() -> None:
    assert grown("bounded") < 0.5 * grown("as it is") + 5


def test_a_bound_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[0], "7")
    monkeypatch.delenv(VARIABLES[1], raising=False)
    bound_kernel_cache()
    assert [os.environ[name] for name in VARIABLES] == ["7", "32"]
