"""Entry point as a process: environment, imports and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from keysift.engine.version import keysift_version
from keysift.server.__main__ import SPINS

MODULE = ("-m", "keysift.server")


def test_the_module_runs() -> None:
    """The usage line has the name of the console script."""
    done = subprocess.run([sys.executable, *MODULE, "--help"], capture_output=True, text=True, check=True)
    assert "Usage: keysift " in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP elsewhere")
def test_the_spins_are_set_before_openmp_looks() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    command = [sys.executable, *MODULE, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{keysift_version()}\n"
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("module", ["torch._C", "transformers.utils"])
def test_ctrl_c_during_the_imports_is_quiet(module: str) -> None:
    command = [sys.executable, "-X", "importtime", *MODULE, "generate", "--prompt", "x"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        next(line for line in process.stderr if line.split("|")[-1].strip() == module)
        process.send_signal(signal.SIGINT)
        printed = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, printed) == (130, [])


def test_handshakes_that_fail_write_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    script = "import os, sys; from keysift.server.__main__ import main; sys.argv[1:] = ['--version']\n"
    script += "try: main()\nfinally: print(os.environ['GRPC_VERBOSITY'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "ERROR"
