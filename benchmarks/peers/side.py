"""Protocol between `benchmarks.peers` and its peers. Standard library only, for the peers' own environments.

The first line that a side reads is one JSON object: model (a file), prompt (token ids), new (tokens to generate),
threads, and settings of its own. It answers with one JSON line when the model is loaded, and with one more for each
further line that it reads: a run, with the seconds from its start to each token, the tokens, and the peak memory in KB.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = tuple[list[float], list[int]]


def options() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sys.stdin.readline())
    return found


def serve(run: Callable[[], Answer], about: str = "") -> None:
    """Answer one run per line of input; `about` describes the library's build on this machine."""
    answer(about=about)
    for _ in sys.stdin:
        times, tokens = run()
        answer(times=times, tokens=tokens, peak_kb=peak_kb())


def answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


def peak_kb() -> int:
    """Not `ru_maxrss` where there is a choice: on Linux a process inherits that from the one that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
