"""Preparation of requests: all that one costs before its first step, on any thread."""

from __future__ import annotations

from collections.abc import Mapping

from keysift.attention import Strategy, StrategyError, StrategyFailure, parse
from keysift.attention.failure import describe
from keysift.kvcache import PagedCache, PageKeys, Phase

from .calibration import calibration
from .calibration.fit import Crossover
from .config import EngineConfig
from .errors import InvalidRequest, ResourceExhausted, Unsupported
from .execution.sampler import SamplerState, check, derive_seed
from .job import Job
from .model.loaded import LoadedModel
from .model.model_options import with_model_options
from .model.tokenizer import Detokenizer
from .request import Request
from .scheduling.sequence import Sequence
from .text.transcript import Transcript


class Preparation:
    """Makes jobs of requests. Thread-safe: it reads the model, the configuration and the cache's shape, and no state.

    Raises `InvalidRequest` or `Unsupported` for the engine's default strategy.
    """

    def __init__(
        self, config: EngineConfig, model: LoadedModel, cache: PagedCache, crossovers: Mapping[str, Crossover]
    ) -> None:
        self._config = config
        self._model = model
        self._cache = cache
        self._crossovers = crossovers
        self.default = self.strategy(config.strategy, config.strategy_args)

    def job(self, request: Request) -> Job:
        """The job of a request. See `Engine.prepare` for what it raises."""
        sequence = self._checked(request)
        sequence.page_keys()  # hashes the prompt here, as the scheduler reads the keys on the engine's thread
        eos = self._model.eos_token_ids
        sampler = SamplerState(
            params=request.params,
            prompt=request.prompt,
            generated=[],
            eos_token_ids=eos,
            seed=derive_seed(self._config.seed, request.request_id),
        )
        detokenizer = Detokenizer(self._model.tokenizer, request.params.skip_special_tokens, request.prompt)
        return Job(sequence, sampler, Transcript(detokenizer, request.params, eos))

    def check(self, request: Request) -> None:
        """Raise what `job` raises, without the costly parts of a job."""
        self._checked(request)

    def strategy(self, name: str, arguments: tuple[str, ...] = ()) -> Strategy:
        """Strategy of a name, see `Engine.strategy`."""
        try:
            stated = with_model_options(name, arguments, self._model)
        except StrategyError as error:
            raise InvalidRequest(error.field, error.problem) from None
        strategy = parsed(name, calibration.calibrated(name, stated, self._crossovers))
        self._check_strategy(strategy)
        return strategy

    def _checked(self, request: Request) -> Sequence:
        """The scheduler's form of a request that the engine can run."""
        try:
            self._check_size(sequence := self._sequence(request))
        except StrategyFailure as error:
            raise Unsupported(str(error)) from error
        return sequence

    def _sequence(self, request: Request) -> Sequence:
        """The scheduler's form of a request. Raises `InvalidRequest` or `Unsupported`."""
        limit, length = self._model.max_model_len, len(request.prompt)
        if not 0 < length < limit:
            raise InvalidRequest("prompt", f"1 to {limit - 1} tokens (max_model_len is {limit}), got {length}")
        wrong = min(request.prompt) if min(request.prompt) < 0 else max(request.prompt)
        if not 0 <= wrong < self._model.vocab_size:
            raise InvalidRequest("prompt", f"token ids from 0 to {self._model.vocab_size - 1}, got {wrong}")
        check(request.params, self._model.vocab_size, self._model.eos_token_ids)
        strategy = self.default
        if request.strategy is not None or request.strategy_args:
            strategy = self.strategy(request.strategy or self._config.strategy, request.strategy_args)
        longest = min(request.params.max_new_tokens, limit - length)
        sequence = Sequence(request, strategy, longest, reproducible=self._config.reproducible)
        sequence.keys = self._page_keys(sequence)
        return sequence

    def _check_strategy(self, strategy: Strategy) -> None:
        """Raises `Unsupported` where the cache does not suit the strategy, or cannot hold its index."""
        spec = strategy.index_spec()
        try:
            strategy.check(self._cache.spec)
            if spec is not None:
                self._cache.indexes.check(spec)
        except ValueError as error:
            raise Unsupported(f"strategy {strategy.name}: {error}") from None
        except Exception as error:  # of a plug-in
            raise Unsupported(f"strategy {strategy.name}: check failed: {describe(error)}") from error

    def _page_keys(self, sequence: Sequence) -> PageKeys | None:
        """Prefix-cache keys of the sequence's pages; None where it does not use that cache.

        A page's content depends on the model, on the prompt's strategy with all its options, on the tokens
        before; under a sparse strategy on all tokens of its chunk, too.
        """
        request = sequence.request
        if not self._config.prefix_cache or request.bypass_prefix_cache:
            return None
        root = f"{self._model.fingerprint}|{sequence.prompt_strategy!r}|{request.cache_salt}"
        page = self._config.page_size
        return PageKeys(root, page, 1 if sequence.any_cut else self._config.prefill_chunk // page)

    def _check_size(self, sequence: Sequence) -> None:
        tokens, cache = sequence.prompt_len + sequence.max_new_tokens, self._cache
        spec, total, elsewhere = cache.spec, cache.allocator.total, self._config.kv_offload is not None
        field, page = ("kv_offload_memory", spec.kv_bytes) if elsewhere else ("kv_memory", spec.page_bytes)
        if (needed := spec.pages_for(tokens)) > total:
            raise ResourceExhausted(
                f"{field}: {tokens} tokens (prompt + max_new_tokens) need {needed} pages = {needed * page} bytes, "
                f"the cache has {total} pages = {total * page} bytes"
                + ("" if elsewhere else "; with kv_offload they need not all be in memory")
            )
        self._check_scans(sequence, Phase.PREFILL, sequence.prompt_len)
        self._check_scans(sequence, Phase.DECODE, tokens)

    def _check_scans(self, sequence: Sequence, phase: Phase, tokens: int) -> None:
        """Raises `ResourceExhausted` where the strategy reads all keys of a layer and the pool cannot hold them."""
        strategy, cache = sequence.runs(phase, tokens), self._cache
        pages, page = cache.spec.pages_for(tokens), cache.spec.num_kv_heads * cache.spec.read_bytes
        if strategy.scans and not cache.tier.holds(pages):
            raise ResourceExhausted(
                f"kv_memory: strategy {strategy.name} looks at all keys of a layer at once, which takes {pages * page} "
                f"bytes for {tokens} tokens, more than the pool spares for one layer (half of it at most)"
            )


def parsed(name: str, arguments: tuple[str, ...]) -> Strategy:
    """`attention.parse`, whose errors are those of a request's field."""
    try:
        return parse(name, arguments)
    except StrategyError as error:
        raise InvalidRequest(error.field, error.problem) from None
