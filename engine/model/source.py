"""Sources of a model: a folder, a GGUF file, a hub name, or the embedded package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..errors import ModelNotFound
from . import embedded


@dataclass(frozen=True, slots=True)
class Source:
    """A model that transformers can load with ``from_pretrained(path, gguf_file=gguf_file)``."""

    name: str
    path: str
    gguf_file: str | None = None

    def read_config(self, trust_remote_code: bool) -> Any:
        """The model's configuration. Raises `OSError` or `ValueError` where transformers cannot read it."""
        return AutoConfig.from_pretrained(self.path, gguf_file=self.gguf_file, trust_remote_code=trust_remote_code)


def locate(model: str | None, report: Callable[[str], None]) -> Source:
    """Source that `model` names; None: the embedded model, which is converted at first use.

    Raises `ModelNotFound` for a path that does not exist. A hub name is not checked.
    """
    if model is None or model == embedded.NAME:
        return Source(embedded.NAME, str(embedded.embedded(report)))
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path.resolve().name, str(path))
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, str(path.parent), path.name)
    if path.is_file():
        raise ModelNotFound(f"{model}: a folder of safetensors or a .gguf file is needed")
    if path.is_absolute() or path.suffix == ".gguf" or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelNotFound(f"{model}: no such folder or file")
    return Source(model, model)
