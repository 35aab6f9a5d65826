"""Random lives of requests on a real engine: whatever happens beside a request, it says what it says alone.

Priorities, salts, aborts, sampling, stops, several strategies and indexes at once, both tiers, stores that fail, and so
little memory that requests are preempted and prefixes evicted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import pytest

from keysift.attention.strategies import retrieval
from keysift.engine import (
    Engine,
    EngineConfig,
    Finish,
    FinishReason,
    Output,
    Request,
    ResourceExhausted,
    SamplingParams,
    TokenOutput,
    engine,
)
from keysift.engine.model.load import load
from keysift.engine.scheduling import failures
from keysift.kvcache import OffloadTier, Step
from keysift.kvcache.index import Graph, Ivf
from tests.attack.audit import audit, audit_end
from tests.engine.driver import drain, tokens
from tests.engine.faults import KINDS, Act, FaultyHome, install
from tests.strategies import rows

LIVES = int(os.environ.get("KEYSIFT_ATTACK_LIVES", "16"))
SHARD = 4
"""Lives of one test."""
PAGE, LONGEST = 16, 256
ROUNDING = 2e-3
"""Log probabilities of other batch sizes and cuts of a prompt differ by less."""
STRATEGIES = [
    (row.name, (*row.arguments(dense_below=below), *more))
    for row in rows(PAGE)
    if not row.spec
    for below in (0, 110)
    for more in ([()] if "index=graph" not in row.arguments() else [("beam=8", "top_k=8"), ("beam=4", "top_k=4")])
]
PAIRS = [("sift+retrieval", ("sift.dense_below=0", "retrieval.dense_below=0", "retrieval.budget=32"))]
HOMES: dict[str, dict[str, object]] = {
    "resident": {"kv_memory": 2**22},
    "cramped": {"pages": 16},
    "reproducible": {"pages": 16, "reproducible": True},
    "one by one": {"pages": 20, "reproducible": True, "max_num_seqs": 1},
    "host": {"kv_offload": "pinned", "pool": 46, "store": 16},
    "file": {"kv_offload": "folder", "pool": 60, "store": 16},
    "small pool": {"kv_offload": "pinned", "pool": 24, "store": 18},
    "prefetching": {"kv_offload": "pinned", "pool": 50, "store": 16, "kv_prefetch": 2},
}


@dataclass(frozen=True)
class Life:
    """One request, and what its client does."""

    request: Request
    start: int
    """Step before which it arrives."""
    abort: int
    """Steps after which the client aborts; 0: never."""


@dataclass(frozen=True)
class Said:
    """All that a caller sees of an answer."""

    token_ids: list[int]
    text: str
    logprobs: list[float]
    """Of the tokens, where they were asked for."""
    finish: Finish

    @property
    def end(self) -> tuple[FinishReason, str | int | None]:
        return self.finish.reason, self.finish.matched_stop

    @classmethod
    def of(cls, outputs: list[Output], name: str) -> Said:
        mine = [output for output in outputs if output.request_id == name]
        said = [output for output in mine if isinstance(output, TokenOutput)]
        (finish,) = (output for output in mine if isinstance(output, Finish))
        assert mine[-1] is finish
        return cls(
            [token for output in said for token in output.token_ids],
            "".join(output.text for output in said),
            [of_token[0].logprob for output in said for of_token in output.logprobs],
            finish,
        )


@pytest.fixture(scope="module", autouse=True)
def _small(tiny_llama: Path) -> Iterator[None]:
    """One model for all engines, segments and graphs that short prompts fill several of, and no log of failures."""
    loaded = load(EngineConfig(model=str(tiny_llama), dtype="float32"), lambda line: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load", lambda *_: loaded)
        patch.setattr(retrieval, "Ivf", partial(Ivf, segment=64, tokens_per_list=8))
        patch.setattr(retrieval, "Graph", partial(Graph, degree=6, queries=24, lag=32))
        patch.setattr(failures.logger, "disabled", True)
        yield


@pytest.fixture
def build(tiny_llama: Path, tmp_path: Path) -> Callable[[str, Random], Callable[[], Engine]]:
    """Makes a maker of equal engines in one of the homes."""

    def maker(home: str, dice: Random) -> Callable[[], Engine]:
        fields = dict(HOMES[home])
        sizes = {"max_num_seqs": dice.randint(2, 4), "prefill_chunk": 64, "queries_per_row": dice.choice([16, 32])}
        config = {"model": str(tiny_llama), "dtype": "float32", "max_model_len": LONGEST, "strategy": "dense"} | sizes
        config["index_memory"] = 2**24  # what is not indexed for lack of room is scanned, which finds other pages
        spec = Engine(EngineConfig(**config)).cache.spec
        if "pages" in fields:
            fields["kv_memory"] = fields.pop("pages") * spec.page_bytes  # type: ignore[operator]
        if "pool" in fields:
            fields["kv_memory"] = fields.pop("pool") * spec.kv_bytes  # type: ignore[operator]
            fields["kv_offload_memory"] = fields.pop("store") * spec.kv_bytes  # type: ignore[operator]
        if fields.get("kv_offload") == "folder":
            fields["kv_offload"] = str(tmp_path)
        return lambda: Engine(EngineConfig(**config | fields))

    return maker


@pytest.mark.parametrize("shard", range(-(-LIVES // SHARD)))
def test_random_lives(build: Callable[[str, Random], Callable[[], Engine]], shard: int) -> None:
    for number in range(shard * SHARD, (shard + 1) * SHARD):
        try:
            play(build, number)
        except BaseException as error:
            error.add_note(f"life {number}")
            raise


def play(build: Callable[[str, Random], Callable[[], Engine]], number: int) -> None:
    dice = Random(number)
    home = list(HOMES)[number % len(HOMES)]
    make = build(home, dice)
    lives = lives_of(dice, make())
    faulty = dice.random() < 0.3
    together = live(make(), lives, Random(number) if faulty else None)
    for each in lives:
        check(together[each.request.request_id], alone(make(), each.request), each, home, faulty)


def lives_of(dice: Random, trial: Engine) -> list[Life]:
    """Requests that fit the engine, most of them under few strategies, so that they share prefixes."""
    chosen = dice.sample(STRATEGIES, dice.choice([1, 1, 2, 3])) + dice.sample(PAIRS, dice.randrange(2))
    lives: list[Life] = []
    for number in range(dice.randint(4, 8)):
        request = request_of(dice, str(number), dice.choice(chosen))
        try:
            trial.check(request)
        except ResourceExhausted:  # the strategy looks at more keys at once than the pool holds
            request = replace(request, strategy="dense+streaming", strategy_args=("window=48", "sink=16"))
        lives.append(Life(request, dice.choice([0, 0, dice.randint(0, 40)]), dice.choice([0] * 15 + [1, 5, 15])))
    return lives


def request_of(dice: Random, name: str, strategy: tuple[str, tuple[str, ...]]) -> Request:
    base, shared = tokens(128, dice.choice([0, 0, 0, 1])), dice.choice([0, 64, 64, 100, 128])
    prompt = (*base[:shared], *tokens(dice.randint(1, 30), dice.randrange(3)))
    params = SamplingParams(
        max_new_tokens=dice.choice([1, 8, 20, 32]),
        ignore_eos=dice.random() < 0.5,
        temperature=dice.choice([0.0, 0.0, 1.0]),
        top_k=dice.choice([0, 0, 20]),
        seed=dice.choice([None, 7]),
        frequency_penalty=dice.choice([0.0, 0.0, 0.5]),
        logprobs=dice.choice([None, 2]),
        stop_strings=dice.choice([(), (), tuple("bdfhjlnprtvxz"), ("ab", "\x00", "<|end|>")]),
    )
    if dice.random() < 0.2:
        params = params.model_copy(update={"min_new_tokens": params.max_new_tokens // 2})
    return Request(
        name,
        prompt,
        params,
        strategy=strategy[0],
        strategy_args=strategy[1],
        cache_salt=dice.choice(["", "", "", "tenant"]),
        bypass_prefix_cache=dice.random() < 0.1,
        priority=dice.choice([0, 0, 1, 2]),
    )


def live(engine: Engine, lives: list[Life], faults: Random | None) -> dict[str, Said]:
    """All of them together; `faults` decides which operations of the tier fail."""
    if faults is not None:
        break_now_and_then(engine, faults)
    outputs: list[Output] = []
    pending, aborts, step = sorted(lives, key=lambda each: -each.start), dict[int, list[str]](), 0
    while pending or engine.has_work:
        while pending and pending[-1].start <= step:
            each = pending.pop()
            engine.add(each.request)
            if each.abort:
                aborts.setdefault(step + each.abort, []).append(each.request.request_id)
        for name in aborts.pop(step, ()):
            engine.abort(name)
        outputs += engine.step()
        audit(engine)
        step += 1
    audit_end(engine)
    return {each.request.request_id: Said.of(outputs, each.request.request_id) for each in lives}


def break_now_and_then(engine: Engine, dice: Random) -> None:
    """Have the tier fail in some of its operations, in the ways that real ones fail, and by a bug."""
    tier = engine.cache.tier
    if isinstance(tier, OffloadTier):
        tier.pages.store = FaultyHome(tier.pages.store, 0.01, dice.randrange(1000))
        return

    def fault(act: Act, layer: int, step: Step) -> None:
        if dice.random() < 0.005:
            dice.choice([*KINDS.values(), bug])()

    install(engine, fault)


def bug() -> None:
    raise ValueError("a bug")


def alone(engine: Engine, request: Request) -> Said:
    engine.add(request)
    return Said.of(drain(engine), request.request_id)


def check(said: Said, wanted: Said, life: Life, home: str, faulty: bool) -> None:
    """It said the same, or, where it was cut short, the beginning of that."""
    count = len(said.token_ids)
    if said.finish.reason in (FinishReason.CANCELLED, FinishReason.ERROR):
        assert life.abort if said.finish.reason is FinishReason.CANCELLED else faulty, said.finish.error
        assert said.token_ids == wanted.token_ids[:count]
        assert wanted.text.startswith(said.text)
    else:
        assert (said.token_ids, said.text, said.end) == (wanted.token_ids, wanted.text, wanted.end)
    rounding = 0.0 if home == "one by one" else ROUNDING
    assert said.logprobs == pytest.approx(wanted.logprobs[: len(said.logprobs)], abs=rounding, rel=0)
