"""Trace of a few steps for Perfetto, with the parts of a step layer by layer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from keysift.attention import Part, Stretch

from ...engine import Engine
from ...request import PrefillProgress, Request
from .drive import clear, stepping

Trace = dict[str, Any]
DECODE_STEPS = 4
"""Steps of a trace after the prompt's last chunk."""
LABELS = {"linear": "model", "transfer": "fetch"}
"""Labels of parts in a trace, where the model's range contains its attention."""


@contextmanager
def ranges(name: Part | Stretch, layer: int | None = None) -> Iterator[None]:
    """`Spans` as ranges of the torch profiler: `prefill` and `decode` for steps, `layer 3 selection` within."""
    label = LABELS.get(name, name)
    with record_function(label if layer is None else f"layer {layer} {label}"):
        yield


def record(engine: Engine, request: Request, title: str) -> Trace:
    """Trace the prompt's last chunk and the first tokens after it, within a range called `title`."""
    try:
        engine.add(request)
        _skip_to_last_chunk(engine, len(request.prompt))
        recording = profile(activities=_activities(engine.model.device))
        with engine.watched(ranges), recording as profiler, record_function(title):
            for _ in islice(stepping(engine), 1 + DECODE_STEPS):
                pass
        return _trace(profiler)
    finally:
        clear(engine, [request])


def write(traces: Sequence[Trace], path: Path) -> None:
    """Write all traces into one file, replaced as a whole."""
    whole = {**traces[0], "traceEvents": [event for trace in traces for event in trace["traceEvents"]]}
    unfinished = path.with_name(f".{path.name}")
    with gzip.open(unfinished, "wt", encoding="utf-8", compresslevel=6) as file:
        json.dump(whole, file)
    unfinished.replace(path)


def _skip_to_last_chunk(engine: Engine, length: int) -> None:
    chunk, processed = engine.config.prefill_chunk, 0
    while length - processed > chunk:
        reported = (o.processed for o in engine.step() if isinstance(o, PrefillProgress))
        processed = max(reported, default=length)  # no report: the request has failed


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _trace(profiler: profile) -> Trace:
    with TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(file := Path(folder) / "trace.json"))
        trace: Trace = json.loads(file.read_bytes())
    return trace
