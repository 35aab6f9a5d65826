"""Requests and outputs of the engine."""

from __future__ import annotations

import time
from collections.abc import Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from pydantic import FailFast, Field, model_validator

from .checked import Checked
from .errors import InvalidRequest

MIN_TEMPERATURE = 0.01
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
"""Strict, as True is no number of anything."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TokenIds = Annotated[tuple[Count, ...], FailFast()]


class SamplingParams(Checked):
    """Parameters of token choice and of stopping. The defaults are greedy and deterministic.

    Field names follow ``vllm.Inference``; out-of-range values raise `InvalidRequest`.
    """

    temperature: Number = Field(0.0, ge=0, le=100)
    """0: the most likely token; else at least 0.01, below which scores overflow."""
    top_k: Count = 0
    top_p: Number = Field(1.0, gt=0, le=1)
    min_p: Number = Field(0.0, ge=0, le=1)
    seed: Count | None = None

    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    repetition_penalty: Number = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[Count, float] = Field(default_factory=dict)
    allowed_token_ids: TokenIds = ()

    max_new_tokens: Annotated[int, Field(strict=True, ge=1, lt=2**63)] = 256
    min_new_tokens: Count = 0
    stop_token_ids: TokenIds = ()
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), max_length=64)
    """Texts that end the answer, sought in all that the model says, special tokens that are not shown included."""
    include_stop_strings: bool = False
    """The text ends with the stop string that ended it, in full; else it ends before it."""
    ignore_eos: bool = False

    logprobs: Count | None = Field(None, le=20)
    """Most likely candidates whose log probabilities are returned with each token; 0: the chosen token's only."""
    skip_special_tokens: bool = True

    def endings(self, eos_token_ids: Set[int]) -> frozenset[int]:
        """Tokens that end the text."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise InvalidRequest("temperature", f"0 or at least {MIN_TEMPERATURE}, got {self.temperature}")
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequest(
                "min_new_tokens",
                f"at most max_new_tokens ({self.max_new_tokens}), got {self.min_new_tokens}",
            )
        return self


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    strategy: str | None = None
    """Strategy of this request, as `attention.parse` spells it; None: the engine's."""
    strategy_args: tuple[str, ...] = ()
    """``name.field=value`` pairs for `strategy`."""
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    priority: int = 0
    """Smaller runs first; equal priorities run in order of arrival."""
    arrival: float = field(default_factory=time.monotonic)


class FinishReason(Enum):
    """Reason that a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request. `cached_tokens` are those of the prompt that the prefix cache held."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds. TTFT = arrival to first token; TPOT = decode time / (completion tokens - 1)."""

    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Statistics of what a request's attention read.

    A density is the share of causal pairs of query and key that were read, over layers without a window.
    """

    strategy: str
    prefill_density: float
    decode_density: float
    coverage: float | None
    """Share of the attention that was kept: mean over tokens, layers, heads and probes; None: not measured.

    Over the phases in which the strategy chose pages; 1 where it chose in none.
    """
    dense_fallback: bool
    kv_bytes_read: int
    kv_bytes_moved: int
    coverage_min: float | None
    """`coverage` of the probe and head that lost most."""
    widened: float
    """Share of the probed rows that read more because too little was covered."""
    estimated: float = 0.0
    """Share of the attention that was estimated by pages' means; the rest, neither kept nor estimated, was dropped."""
    dropped_bound: float | None = 0.0
    """Upper bound of the share that was dropped, mean over tokens, layers and heads; None: the strategy has none."""
    kv_bytes_written: int = 0
    """Bytes of keys and values written to the backing store; `kv_bytes_moved` are those read from it."""
    decode_bytes_moved: int = 0
    """Part of `kv_bytes_moved` that decode steps fetched."""
    kv_hits: int = 0
    """Pages of one layer and KV head that decode steps found in the pool."""
    kv_misses: int = 0
    """Pages of one layer and KV head that decode steps had to fetch."""
    kv_overlap: float | None = None
    """Share of a generated token's pages that the token before read too, mean over tokens, layers and heads;
    None: not compared."""
    bound_exceeded: float = 0.0
    """Share of the choices that exceeded their locality bound, because too much attention was missing otherwise."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one token, and its rank: 1 is the most likely."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """First output of a request, when its first step has run."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    strategy: str
    queue_ms: float


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Prompt tokens computed so far."""

    request_id: str
    total: int
    cached: int
    processed: int
    """Prompt tokens whose keys and values are in the cache, the `cached` ones included."""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """New tokens and the text that became final with them, empty while a character is incomplete."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[Logprob, ...], ...] = ()
    """Per token: the chosen one first, then the candidates in descending order."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Last output of a request."""

    request_id: str
    reason: FinishReason
    usage: Usage
    timings: Timings
    sparsity: Sparsity
    matched_stop: str | int | None = None
    """Stop string or token id that ended the text."""
    error: str = ""
    """Message of an `ERROR`."""
    exhausted: bool = False
    """The error was a lack of memory or of room for pages: the same request may succeed with more."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Counts of requests and pages between two steps."""

    running: int
    waiting: int
    pages_free: int
    pages_total: int
    page_size: int
    page_bytes: int


Output = PromptInfo | PrefillProgress | TokenOutput | Finish
