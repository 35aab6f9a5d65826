"""The command line as a process of its own: how it begins, and how it ends before it has begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from keysift.engine.version import keysift_version
from keysift.server.__main__ import SPINS

MODULE = ("-m", "keysift.server")


def test_it_runs_as_a_module() -> None:
    """Under the name that the help tells."""
    said = subprocess.run([sys.executable, *MODULE, "--help"], capture_output=True, text=True, check=True)
    assert "Usage: keysift " in said.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP elsewhere")
def test_the_spins_are_set_before_openmp_looks() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    command = [sys.executable, *MODULE, "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert said.stdout == f"{keysift_version()}\n"
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in said.stderr


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("module", ["torch._C", "transformers.utils"])
def test_ctrl_c_during_the_imports_is_quiet(module: str) -> None:
    command = [sys.executable, "-X", "importtime", *MODULE, "generate", "--prompt", "x"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        next(line for line in process.stderr if line.split("|")[-1].strip() == module)
        process.send_signal(signal.SIGINT)
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, said) == (130, [])
