"""The generation engine: continuous batching over a paged cache, with a model's attention swapped for a strategy."""

import importlib
from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .errors import (
    DuplicateRequest,
    InvalidRequest,
    KeysiftError,
    ModelNotFound,
    ResourceExhausted,
    Unsupported,
)
from .request import (
    EngineStatus,
    Finish,
    FinishReason,
    Logprob,
    Output,
    PrefillProgress,
    PromptInfo,
    Request,
    SamplingParams,
    Sparsity,
    Timings,
    TokenOutput,
    Usage,
)

if TYPE_CHECKING:
    from .engine import Engine
    from .llm import LLM, Completion

__all__ = [
    "LLM",
    "Completion",
    "DuplicateRequest",
    "Engine",
    "EngineConfig",
    "EngineStatus",
    "Finish",
    "FinishReason",
    "InvalidRequest",
    "KeysiftError",
    "Logprob",
    "ModelNotFound",
    "Output",
    "PrefillProgress",
    "PromptInfo",
    "Request",
    "ResourceExhausted",
    "SamplingParams",
    "Sparsity",
    "Timings",
    "TokenOutput",
    "Unsupported",
    "Usage",
]

_LAZY = {"Engine": "engine", "LLM": "llm", "Completion": "llm"}
"""Names that need the model's code: imported at first use, so that a client or ``--help`` starts sooner."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
