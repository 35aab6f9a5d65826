"""What a number needs beside it to mean something."""

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
    """Versions, and the machine that computes."""
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
    """The facts about a model that a result depends on."""
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
    """The engine's settings that a result depends on, strategies apart."""
    return config.model_dump(mode="json", exclude={"strategy", "strategy_args", "served_model_name", "max_queue"})


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the source that runs, with a + where it was changed since; None where it is no checkout of ours."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != folder.resolve().parent:  # a package inside of somebody else's checkout
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{_git(folder, 'rev-parse', 'HEAD')}{'+' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
