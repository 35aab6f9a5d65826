"""An attack on one server for so many minutes, and what it did to it: `python -m tests.attack --minutes 30`."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from .assaults import ASSAULTS, Attacker
from .target import Holdings, Probe, Target, percentile

GOLDEN_EVERY_S, SAMPLE_EVERY_S, RECONNECT_EVERY = 5.0, 2.0, 50
SETTLED_S = 300.0
"""Time after which memory has to stay at its level."""


@dataclass
class Report:
    """Outcome of an attack."""

    statuses: Counter[str] = field(default_factory=Counter)
    by_assault: Counter[tuple[str, str]] = field(default_factory=Counter)
    internal: dict[tuple[str, str], str] = field(default_factory=dict)
    """Details of the calls that ended with INTERNAL or UNKNOWN, each kind once."""
    health_ms: list[float] = field(default_factory=list)
    serving: bool = False
    golden: list[bool] = field(default_factory=list)
    holdings: list[Holdings] = field(default_factory=list)
    before: Holdings | None = None
    after: Holdings | None = None
    free_pages: tuple[int, int] = (0, 0)

    @property
    def growth(self) -> float:
        """Growth of memory after it settled, as a share of its level then."""
        late = [each.rss for each in self.holdings if each.seconds >= SETTLED_S]
        count = max(len(late) // 10, 1)
        return sum(late[-count:]) / sum(late[:count]) - 1 if late else 0.0

    def faults(self, health_ms: float) -> list[str]:
        """What must not be, in words; empty: the server held."""
        assert self.before is not None
        assert self.after is not None
        worst = max(self.health_ms, default=float("inf"))
        checks = {
            f"INTERNAL: {[*self.internal.values()][:3]}": bool(self.internal),
            f"health took {worst:.0f} ms, more than {health_ms:g}": worst > health_ms,
            "health was not SERVING throughout": not self.serving,
            f"the golden answer changed {self.golden.count(False)} times": not all(self.golden),
            f"pages are lost: {self.free_pages[0]} of {self.free_pages[1]} are free": len(set(self.free_pages)) > 1,
            f"file descriptors {self.before.fds} -> {self.after.fds}": self.after.fds > self.before.fds + 4,
            f"threads {self.before.threads} -> {self.after.threads}": self.after.threads > self.before.threads + 8,
            f"memory grew by {self.growth:.1%} after {SETTLED_S:.0f} s": self.growth > 0.05,
        }
        return [text for text, wrong in checks.items() if wrong]

    def __str__(self) -> str:
        assert self.before is not None
        assert self.after is not None
        rss = [each.rss / 2**20 for each in self.holdings]
        lines = [
            f"{sum(self.statuses.values())} calls: {dict(self.statuses.most_common())}",
            f"health ms: median {percentile(self.health_ms, 0.5):.1f}, p99 {percentile(self.health_ms, 0.99):.1f}, "
            f"worst {max(self.health_ms, default=0):.1f} of {len(self.health_ms)}; SERVING throughout: {self.serving}",
            f"golden answers: {self.golden.count(True)} the same, {self.golden.count(False)} not",
            f"pages free {self.free_pages[0]} of {self.free_pages[1]}; fds {self.before.fds} -> {self.after.fds}; "
            f"threads {self.before.threads} -> {self.after.threads}",
            f"RSS MiB: {', '.join(f'{value:.0f}' for value in rss[:: max(len(rss) // 10, 1)])}; "
            f"growth after {SETTLED_S:.0f} s: {self.growth:.1%}",
        ]
        return "\n".join([*lines, *self.internal.values()])


class Attack:
    """Several attackers against one target, each with a connection and dice of its own."""

    def __init__(self, target: Target, seconds: float, *, attackers: int = 4, seed: int = 0) -> None:
        self.target, self.report = target, Report()
        self._until, self._count, self._seed = time.monotonic() + seconds, attackers, seed
        self._lock = threading.Lock()

    def run(self, tick: Callable[[Report], None] = lambda report: None) -> Report:
        """Attack until the time is over, then let the server come to rest. `tick` gets the report every few seconds."""
        report, target = self.report, self.target
        report.before = target.holdings()
        probe = Probe(target.address)
        threads = [threading.Thread(target=self._attack, args=(self._seed + i,)) for i in range(self._count)]
        for thread in threads:
            thread.start()
        self._watch(tick)
        for thread in threads:
            thread.join(60)
        report.health_ms, report.serving = probe.stop()
        report.free_pages = target.free_pages()
        report.golden.append(target.say_golden() == target.golden)
        time.sleep(2)  # connections that were reset are closed within a second
        report.after = target.holdings()
        return report

    def _watch(self, tick: Callable[[Report], None]) -> None:
        golden_at = 0.0
        while (now := time.monotonic()) < self._until:
            self.report.holdings.append(self.target.holdings())
            if now >= golden_at:
                self.report.golden.append(self.target.say_golden() == self.target.golden)
                golden_at = now + GOLDEN_EVERY_S
            tick(self.report)
            time.sleep(min(SAMPLE_EVERY_S, max(self._until - now, 0)))

    def _attack(self, seed: int) -> None:
        os.setpriority(
            os.PRIO_PROCESS, threading.get_native_id(), 10
        )  # an attacker's own work is no latency of the server
        dice, number = Random(seed), 0
        while time.monotonic() < self._until:
            attacker = Attacker(self.target.address, dice.randrange(2**31))
            for _ in range(RECONNECT_EVERY):
                if time.monotonic() >= self._until:
                    break
                name = dice.choice(sorted(ASSAULTS))
                ASSAULTS[name](attacker)
                self._note(name, attacker)
                number += 1
            attacker.close()

    def _note(self, name: str, attacker: Attacker) -> None:
        received, attacker.received = attacker.received, []
        with self._lock:
            for status, details in received:
                self.report.statuses[status] += 1
                self.report.by_assault[name, status] += 1
                if status in ("INTERNAL", "UNKNOWN"):
                    self.report.internal.setdefault((name, details[:60]), f"{name}: {status} {details[:300]}")
