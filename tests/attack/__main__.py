"""`python -m tests.attack --minutes 30`: attack servers of a tiny random model, and say whether they held."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .attack import Attack, Report
from .target import start

TIERS = ("resident", "offload")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="duration of the attack (default: 2)")
    parser.add_argument(
        "--tiers", nargs="+", choices=TIERS, default=TIERS, help="where pages are (default: each in turn)"
    )
    parser.add_argument("--attackers", type=int, default=4, help="connections at a time (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the attackers' dice (default: 0)")
    parser.add_argument("--health-ms", type=float, default=100.0, help="most that health may take (default: 100)")
    own = parser.parse_args()
    faults = [fault for tier in own.tiers for fault in _attack(tier, own, 60 * own.minutes / len(own.tiers))]
    print("\n".join(f"FAULT: {fault}" for fault in faults) or "the servers held")
    return bool(faults)


def _attack(tier: str, own: argparse.Namespace, seconds: float) -> list[str]:
    """Attack one server and print the report. Returns its faults."""
    with tempfile.TemporaryDirectory() as folder:
        target = start(Path(folder), offload=tier == "offload")
        report = Attack(target, seconds, attackers=own.attackers, seed=own.seed).run(_print_progress)
        status = target.stop()
        log = target.log.read_text()
    print(f"\n{tier}: {report}")
    faults = report.faults(own.health_ms) + ([f"exit status {status}"] if status else [])
    faults += [line for line in log.splitlines() if "Traceback" in line][:1]
    return [f"{tier}: {fault}" for fault in faults]


def _print_progress(report: Report) -> None:
    held = report.holdings[-1]
    calls = sum(report.statuses.values())
    print(f"{held.seconds:6.0f} s  {calls:7} calls  RSS {held.rss / 2**20:6.0f} MiB", end="\r", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
