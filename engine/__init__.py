"""The generation engine: continuous batching over a paged cache, with a model's attention swapped for a strategy."""

from .config import EngineConfig
from .engine import Engine
from .errors import (
    DuplicateRequest,
    InvalidRequest,
    KeysiftError,
    ModelNotFound,
    ResourceExhausted,
    Unsupported,
)
from .llm import LLM, Completion
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
