"""Random plans: requests that meet, wait, share, are preempted and aborted, and failures among them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from keysift.engine import Request, SamplingParams
from tests.attack.fake import FIRST, MAX_LEN

BASES = [[FIRST + (seed * position + position // 7) % 97 for position in range(MAX_LEN)] for seed in (3, 5)]
ZONES = ("sink=4", "window=8")
STRATEGIES = [
    ("dense", ()),
    ("streaming", ZONES),  # in the prompt too
    ("dense+streaming", ZONES),
    ("ashape", ("dense_below=0", "last_rows_dense=1")),
    ("ashape", ("dense_below=20", "last_rows_dense=2")),  # the third chunk of 16 is the first to be sparse
    ("dense+nosa", ("dense_below=0",)),  # which remembers
    ("ashape+nosa", ("dense_below=10", "last_rows_dense=0")),
    ("stumbling", ()),
]
FAULTS = ("together", "alone", "lost", "lost", "claim", "strategy")


@dataclass(frozen=True)
class Wish:
    """A request to be."""

    gap: int
    """Steps from the one before to this one."""
    base: int
    shared: int
    """Tokens of the prompt that others begin with, too."""
    own: int
    new: int
    strategy: int
    priority: int
    salt: str | None
    """None: bypass the prefix cache."""
    late: int
    """Requests before it that it was made before."""
    follows: int
    """Request before it whose prompt and answer this prompt begins with: 0: none."""
    abort: int
    """Steps after which the client aborts; 0: never."""


@dataclass(frozen=True)
class Fault:
    step: int
    kind: str
    place: int
    """Which one of a batch."""


@dataclass(frozen=True)
class Plan:
    wishes: list[Wish]
    faults: list[Fault]
    room: int
    """Pages besides those that the longest request needs."""
    max_num_seqs: int
    patience: int
    reproducible: bool
    prefix_cache: bool
    flood: bool
    """Others of the highest priority keep coming until all of these have ended."""


def plan_of(dice: Random) -> Plan:
    """A random plan, crowded enough that requests meet, wait and are preempted."""
    strategies = dice.sample(range(len(STRATEGIES)), dice.choice([1, 1, 2, 3]))
    faults = dice.choice([0, 0, 1, 4])
    return Plan(
        wishes=[wish_of(dice, strategies) for _ in range(dice.randint(1, 9))],
        faults=[Fault(dice.randint(1, 80), dice.choice(FAULTS), dice.randrange(4)) for _ in range(faults)],
        room=dice.choice([0, 1, 2, 4, 8]),
        max_num_seqs=dice.randint(1, 5),
        patience=dice.choice([0, 3, 20, 256]),
        reproducible=dice.random() < 0.3,
        prefix_cache=dice.random() < 0.9,
        flood=dice.random() < 0.2,
    )


def wish_of(dice: Random, strategies: list[int]) -> Wish:
    return Wish(
        gap=dice.choice([0, 0, 1, 3, 9]),
        base=dice.randrange(2),
        shared=dice.choice([0, 32, 48, dice.randint(1, 60)]),
        own=dice.randint(1, 20),
        new=dice.randint(1, 30),
        strategy=dice.choice(strategies),
        priority=dice.choice([0, 0, 0, 1, 2]),
        salt=dice.choice(["", "", "", "", "tenant", None]),
        late=dice.choice([0, 0, 0, 1, 2]),
        follows=dice.choice([0, 0, 1, 2, 3]),
        abort=dice.choice([0] * 15 + [1, 7, 20]),
    )


def request_of(number: int, wish: Wish, prompt: tuple[int, ...]) -> Request:
    name, options = STRATEGIES[wish.strategy]
    return Request(
        str(number),
        prompt,
        SamplingParams(max_new_tokens=wish.new),
        strategy=name,
        strategy_args=options,
        cache_salt=wish.salt or "",
        bypass_prefix_cache=wish.salt is None,
        priority=wish.priority,
        arrival=float(number - wish.late),
    )
