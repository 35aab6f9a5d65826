"""A request as the engine sees it, and everything that it can send back."""

from __future__ import annotations

import time
from collections.abc import Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from pydantic import Field, model_validator

from .checked import Checked
from .errors import InvalidRequest

MIN_TEMPERATURE = 0.01
TokenId = Annotated[int, Field(ge=0)]


class SamplingParams(Checked):
    """How to choose tokens and when to stop. The defaults are greedy and deterministic.

    Field names follow ``vllm.Inference``; out-of-range values raise `InvalidRequest`.
    """

    temperature: float = Field(0.0, ge=0, le=100)
    """0: always the most likely token; else at least 0.01, below which scores overflow."""
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)

    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[TokenId, float] = Field(default_factory=dict)
    allowed_token_ids: tuple[TokenId, ...] = ()

    max_new_tokens: int = Field(256, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    stop_token_ids: tuple[TokenId, ...] = ()
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), max_length=64)
    include_stop_strings: bool = False
    ignore_eos: bool = False

    logprobs: int | None = Field(None, ge=0, le=20)
    """How many candidates' log probabilities come with each token; 0: the chosen token's only."""
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
    """Overrides the engine's strategy for this request, as `attention.make` spells it."""
    strategy_args: tuple[str, ...] = ()
    """``name.field=value`` pairs for `strategy`."""
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    priority: int = 0
    """Smaller runs earlier; equal priorities run in order of arrival."""
    arrival: float = field(default_factory=time.monotonic)


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Usage:
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
    """What the strategy read. Densities have the causal denominator and cover full-attention layers."""

    strategy: str
    prefill_density: float
    decode_density: float
    coverage: float | None
    """Share of the attention that was kept: mean over tokens, layers, heads and probes; None where nothing measured it.

    Of the phases in which the strategy chose; 1 where it did in none.
    """
    dense_fallback: bool
    kv_bytes_read: int
    kv_bytes_moved: int
    coverage_min: float | None
    """The same of the probe and head that lost most."""
    widened: float
    """Share of the probes whose rows read more because too little was covered."""
    estimated: float = 0.0
    """Share of the attention that came from pages' means; what is neither kept nor estimated was dropped."""
    dropped_bound: float | None = 0.0
    """The most of the attention that dropped pages can hold, mean over tokens, layers and heads; None: nobody told."""
    kv_bytes_written: int = 0
    """Bytes of keys and values written to their home; `kv_bytes_moved` are those fetched from it."""
    decode_bytes_moved: int = 0
    """Of `kv_bytes_moved`, what generated tokens fetched."""
    kv_hits: int = 0
    """Pages of one layer and KV head that generated tokens found in the pool."""
    kv_misses: int = 0
    """The same that they had to fetch."""
    kv_overlap: float | None = None
    """Share of the pages of a generated token that the token before had read too, mean over tokens, layers and heads;
    None: nothing compared them."""
    bound_exceeded: float = 0.0
    """Share of the choices under a locality bound that let in more pages than it allows, so as not to miss too much."""


@dataclass(frozen=True, slots=True)
class Logprob:
    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """First output of a request, when it starts to run."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    strategy: str
    queue_ms: float


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    request_id: str
    total: int
    cached: int
    processed: int
    """Prompt tokens that are in the cache now, the cached ones included."""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """New tokens and the text that became final with them (empty while a character is incomplete)."""

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
    """The stop string or the token id that ended the text."""
    error: str = ""
    """What went wrong, where the reason is `ERROR`."""
    exhausted: bool = False
    """It was want of memory or of room for pages: the same request may succeed where there is more of it."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Where the engine stands between two steps."""

    running: int
    waiting: int
    pages_free: int
    pages_total: int
    page_size: int
    page_bytes: int


Output = PromptInfo | PrefillProgress | TokenOutput | Finish
