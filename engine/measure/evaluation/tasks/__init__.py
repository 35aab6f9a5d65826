"""Long-context tasks, generated to an exact length with the model's own tokenizer; no downloads."""

from __future__ import annotations

from .make import make
from .own import load_jsonl
from .registry import TASKS, Task, find

__all__ = ["TASKS", "Task", "find", "load_jsonl", "make"]
