"""Metadata stored with every result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from keysift.kvcache.native.cores import num_threads, usable

from ..calibration.calibration import processor
from ..config import EngineConfig
from ..model.loaded import LoadedModel
from ..version import keysift_version


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit, processor and device."""
    return {
        "keysift": keysift_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": len(usable()),
        "threads": num_threads(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def about(model: LoadedModel) -> dict[str, Any]:
    """Properties of the model that a result depends on."""
    return {
        "name": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": model.fingerprint,
        "max_model_len": model.max_model_len,
        "layers": model.num_layers,
        "query_heads": model.num_query_heads * model.ranks,
        "kv_heads": model.num_kv_heads * model.ranks,
    }


def chosen(config: EngineConfig) -> dict[str, Any]:
    """Settings of the engine that a result depends on, without strategies."""
    return config.model_dump(mode="json", exclude={"strategy", "strategy_args", "served_model_name", "max_queue"})


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """Commit of the running source, with a + after local changes; None outside a checkout of this repository."""
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != package.resolve().parent:  # installed inside another repository's checkout
        return None
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{_git(package, 'rev-parse', 'HEAD')}{'+' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
