"""What holds for every test: the same bits each run, poisoned memory, checked native calls, and a GPU or Triton's
interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("KEYSIFT_CHECKED", "1")  # in subprocesses too; read by the first import of the native package
GPU = torch.cuda.is_available()
if GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it
elif importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined: before any module with kernels is imported
    from .interpreter import repair

    repair()

settings.register_profile("keysift", deadline=None, derandomize=True)
settings.load_profile("keysift")


@pytest.fixture(scope="session", autouse=True)
def _torch() -> None:
    """Two threads, and `torch.empty` full of NaN, which is what deterministic mode does beside its name."""
    torch.set_num_threads(2)
    torch.set_deterministic_debug_mode("error")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Native calls and selections as outside of checked mode, which reads values and so waits for a device."""
    from keysift.kvcache.native.checks import checked

    with checked(False):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
