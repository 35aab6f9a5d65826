"""Base of everything that people configure: frozen, complete, and clear about what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InvalidRequest


def split(values: Any) -> Any:
    """``("a,b", "c", "a")`` is ``("a", "b", "c")``: a list as a command line spells it, in which each counts once."""
    if isinstance(values, str | int):
        values = (values,)
    words = (part.strip() for value in values for part in str(value).split(",") if part.strip())
    return tuple(dict.fromkeys(words))


def ready(folder: Path) -> None:
    """Have the output folder there. Raises `InvalidRequest` where it cannot be, or cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise InvalidRequest("output_dir", f"a folder that can be written to, got {str(folder)!r} ({error})") from None


class Checked(BaseModel):
    """Settings that are validated once. Raises `InvalidRequest` naming the field, the limit and the value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(cause := first.get("ctx", {}).get("error"), InvalidRequest):
                raise cause from None
            raise InvalidRequest(".".join(map(str, first["loc"])), f"{first['msg']}, got {first['input']!r}") from None
