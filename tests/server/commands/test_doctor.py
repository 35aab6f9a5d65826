"""`keysift doctor`: its checks and its exit status."""

from __future__ import annotations

import json
import re

import pytest
import torch

from keysift.kvcache.ops.dispatch import Backend
from keysift.server.commands import diagnosis

from ..conftest import Run


def test_doctor(run: Run) -> None:
    status, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert (status, report["usable"]) == (0, True)
    assert {"versions", "native library", "memory", "embedded model"} <= {check["name"] for check in report["checks"]}
    assert run("doctor")[0] == 0


@pytest.mark.parametrize("broken", ["native", "reference"])
def test_doctor_reports_a_backend_that_crashes(run: Run, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    attention = diagnosis._attention

    def crash(backend: Backend) -> torch.Tensor:
        if backend == broken:
            raise RuntimeError("illegal instruction")
        return attention(backend)

    monkeypatch.setattr(diagnosis, "_attention", crash)
    status, out, _ = run("doctor", "--json")
    (found,) = [check for check in json.loads(out)["checks"] if check["name"] == f"self-test {broken}"]
    assert (status, found["ok"]) == (1, False)
    assert "illegal instruction" in found["detail"]


@pytest.mark.parametrize("flag", ["--page-size", "--max-model-len", "--model", "--config"])
def test_doctor_takes_no_flags_of_an_engine(run: Run, flag: str) -> None:
    status, out, err = run("doctor", flag, "32")
    assert (status, out) == (2, "")
    assert re.search(rf"No such option:? .?{flag}\b", err)  # some versions of typer quote it
