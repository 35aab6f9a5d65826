"""Base class of settings: frozen, validated once, with errors that name the field, the limit and the value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InvalidRequest, shortened


def split(values: Any) -> Any:
    """Distinct items of a command line's list: ``("a,b", "c", "a")`` becomes ``("a", "b", "c")``."""
    if isinstance(values, str | int):
        values = (values,)
    words = (part.strip() for value in values for part in str(value).split(",") if part.strip())
    return tuple(dict.fromkeys(words))


def ready(folder: Path) -> None:
    """Create the output folder. Raises `InvalidRequest` where it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise InvalidRequest("output_dir", f"a folder that can be written to, got {str(folder)!r} ({error})") from None


class Checked(BaseModel):
    """Frozen settings. Construction raises `InvalidRequest` naming the field, the limit and the value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(cause := first.get("ctx", {}).get("error"), InvalidRequest):
                raise cause from None
            raise InvalidRequest(
                ".".join(map(str, first["loc"])), f"{first['msg']}, got {shortened(first['input'])}"
            ) from None
