"""Keysift as a model of lm-evaluation-harness, to run its tasks under a strategy.

Importing this module raises `Unsupported` if the harness, an optional extra, is not installed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config import EngineConfig
from ..errors import InvalidRequest, KeysiftError, Unsupported
from ..llm import LLM, Completion
from ..request import FinishReason, SamplingParams
from ..version import keysift_version
from . import likelihood
from .evaluation.reader import Reader
from .likelihood import Likelihood

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows
    from tqdm import tqdm
except ImportError as error:
    raise Unsupported(f"lm-evaluation-harness is not installed ({error}): pip install 'keysift[lm-eval]'") from error

logger = logging.getLogger(__name__)

MAX_GEN_TOKS = 256
"""Default length of an answer in tokens, as in the harness's own models."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of that limit in tasks; the first one present counts."""
Tokens = list[int]
Pair = tuple[Tokens, Tokens]
"""Tokens of a context and of its continuation."""


class KeysiftLM(TemplateLM):  # type: ignore[misc]
    """A model under a strategy: contexts are prefilled, continuations decoded, whether given or generated.

    So both halves of a strategy count, in likelihoods as in answers. Whole texts, for perplexities, are prompts.
    """

    def __init__(self, llm: LLM, strategy: str | None = None) -> None:
        """`strategy`, a name for `attention.parse`, replaces the engine's own."""
        super().__init__()
        self._llm, self.engine = llm, llm.engine
        self._name = strategy
        self._strategy = self.engine.default if strategy is None else self.engine.strategy(strategy)
        self._reader = Reader(self.engine)
        self._tokenizer = self.engine.tokenizer
        self._warned = False

    @property
    def eot_token_id(self) -> int:
        ends = (self._tokenizer.eos_token_id, *sorted(self.engine.model.eos_token_ids))
        if (found := next((end for end in ends if end is not None), None)) is None:
            raise Unsupported(f"{self.engine.model.name}: has no token that ends a text")
        return found

    @property
    def prefix_token_id(self) -> int:
        """Token before a text that has no context."""
        begin = self._tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_length(self) -> int:
        return self.engine.model.max_model_len

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Part of the file names of the harness's request cache."""
        return self.engine.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> Tokens:
        """Tokens of a text, without special tokens if it begins with one already, as chat templates do."""
        if add_special_tokens is None:
            begin = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(begin)
        return self._tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.render(
            chat_history, add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """Metadata that the harness stores with its results."""
        model, config = self.engine.model, self.engine.config
        return {
            "model_name": model.name,
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "model_fingerprint": model.fingerprint,
            "max_length": self.max_length,
            "strategy": self._name or config.strategy,
            "strategy_args": [] if self._name else list(config.strategy_args),
            "keysift_version": keysift_version(),
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each continuation; shared contexts are prefilled once."""
        pairs = [self._shortened(context, follower) for _, context, follower in requests]
        shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (context, _) in enumerate(pairs):
            shared[tuple(context)].append(number)
        found: dict[int, tuple[float, bool]] = {}
        with _bar(len(pairs), "likelihoods", disable_tqdm) as bar:
            for prompt, numbers in shared.items():
                scores = self._score(prompt, [pairs[number][1] for number in numbers])
                for number, each in zip(numbers, scores, strict=True):
                    found[number] = (each.total, each.greedy)
                    self._cache_result("loglikelihood", requests[number][0], found[number])
                bar.update(len(numbers))
        return [found[number] for number in range(len(pairs))]

    def _score(self, context: Sequence[int], followers: list[Tokens]) -> list[Likelihood]:
        """Likelihood of each continuation; an empty one has probability 1."""
        some = [tokens for tokens in followers if tokens]
        scores = iter(likelihood.continuations(self._reader, self._strategy, context, some) if some else ())
        return [next(scores) if tokens else Likelihood() for tokens in followers]

    def _shortened(self, context: Tokens, follower: Tokens) -> Pair:
        """Context and continuation, cut at the left to what fits; the last token is never fed to the model."""
        most = self.max_length + 1
        if len(follower) > self.max_length:
            raise InvalidRequest("continuation", f"at most {self.max_length} tokens, got {len(follower)}")
        self._warn_if_cut(len(context) + len(follower), most)
        return context[-(most - len(follower)) :], follower

    def _warn_if_cut(self, length: int, most: int) -> None:
        if length > most and not self._warned:
            self._warned = True
            logger.warning("requests are cut at the left: one has %d tokens, %d fit (max_model_len)", length, most)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the harness, each prefilled as a prompt."""
        found = []
        for request in _bar_over(requests, "texts", disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            total = sum((self._window(*window) for window in windows), Likelihood()).total
            self._cache_result("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    def _window(self, read: Tokens, predicted: Tokens) -> Likelihood:
        """Likelihood of the predicted tokens, the last of which is not read."""
        tokens = [*read, predicted[-1]]
        return likelihood.prompt(self._reader, self._strategy, tokens, len(tokens) - len(predicted))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated answers; requests with equal options run in one batch."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        found: dict[int, str] = {}
        with _bar(len(requests), "answers", disable_tqdm) as bar:
            for numbers in alike.values():
                params = sampling(requests[numbers[0]].args[1])
                prompts = [self._prompt(requests[number].args[0], params.max_new_tokens) for number in numbers]
                completions = self._llm.generate(prompts, params, strategy=self._name, progress=False)
                for number, completion in zip(numbers, completions, strict=True):
                    found[number] = _text(completion)
                    self._cache_result("generate_until", requests[number].args, found[number])
                    bar.update()
        return [found[number] for number in range(len(requests))]

    def _prompt(self, context: str, room: int) -> Tokens:
        if (most := self.max_length - room) < 1:
            raise InvalidRequest(LIMITS[0], f"less than max_model_len ({self.max_length}), got {room}")
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self._warn_if_cut(len(tokens), most)
        return tokens[-most:]

    def _cache_result(self, method: str, arguments: Any, result: Any) -> None:
        """Add a result to the harness's cache, if there is one, from which an interrupted run resumes."""
        if arguments is not None:
            self.cache_hook.add_partial(method, arguments, result)


def sampling(options: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from a task's options. Raises `InvalidRequest` naming an unsupported one."""
    rest = dict(options)
    until = rest.pop("until", None) or ()
    limits = [rest.pop(name, None) for name in LIMITS]
    sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if sample is False or temperature is None:
        temperature = 1.0 if sample else 0.0
    return SamplingParams(
        stop_strings=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        max_new_tokens=int(next((limit for limit in limits if limit is not None), MAX_GEN_TOKS)),
        temperature=float(temperature),
        **rest,
    )


def _text(completion: Completion) -> str:
    finish = completion.finish
    if finish is not None and finish.reason is FinishReason.ERROR:
        raise KeysiftError(f"a request failed: {finish.error}")
    return completion.text


def _bar(total: int, what: str, disable: bool) -> Any:
    return tqdm(total=total, desc=what, disable=disable)


def _bar_over(requests: Sequence[Any], what: str, disable: bool) -> Iterable[Any]:
    return tqdm(requests, desc=what, disable=disable)  # type: ignore[no-any-return]


def check_tasks(names: Sequence[str]) -> None:
    """Raise `InvalidRequest` for names that are no task, group or tag of the harness."""
    manager = TaskManager()
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise InvalidRequest("lm_eval", f"tasks of lm-evaluation-harness, got {', '.join(unknown)}")


def evaluate(
    model: EngineConfig | KeysiftLM,
    tasks: Sequence[str],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of the harness and return its report; `options` are those of its `simple_evaluate`.

    Args:
        limit: samples of a task; if it has several lengths, those of the first length come first.
        metadata: parameters of tasks, such as ``{"max_seq_lengths": [4096]}`` for RULER; a tokenizer is added.

    Raises:
        KeysiftError: a task's data is not available.
    """
    lm = KeysiftLM(LLM(**model.model_dump())) if isinstance(model, EngineConfig) else model
    with TemporaryDirectory(prefix="keysift-tokenizer-") as folder:
        lm.engine.tokenizer.save(Path(folder))
        asked = {"limit": limit, "num_fewshot": num_fewshot, "metadata": {"tokenizer": folder, **(metadata or {})}}
        try:
            found: dict[str, Any] = simple_evaluate(model=lm, tasks=list(tasks), **asked, **options)
        except OSError as error:  # most of its tasks are downloaded
            raise KeysiftError(f"lm-evaluation-harness: {error}") from error
    for stated in found.get("configs", {}).values():
        if (given := stated.get("metadata") or {}).get("tokenizer") == folder:
            given["tokenizer"] = lm.engine.model.name  # the folder is gone, and no two runs have the same
    return found
