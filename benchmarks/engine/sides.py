"""The sides of `benchmarks.engine`: the engine and transformers' `generate`, each in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from keysift.engine import Engine, EngineConfig, Finish, Output, Request, SamplingParams, TokenOutput
from keysift.engine.model.embedded import embedded
from keysift.engine.model.tokenizer import Tokenizer

from ..lib.document import tokens
from ..lib.process import printed
from ..lib.runs import Run, summed, undisturbed
from ..peers.side import peak_kb


def run_apart(side: str, length: int, options: Namespace) -> dict[str, Any]:
    """One side in a fresh process, so that its peak memory is its own."""
    print(f"{side}, {length} tokens ...", file=sys.stderr, flush=True)
    words = ("--side", side, "--lengths", length, "--new", options.new, "--runs", options.runs)
    return {"side": side, "prompt_tokens": length, **printed("benchmarks.engine", *words, capture_errors=True)}


def run_side(side: str, length: int, new: int, runs: int) -> dict[str, object]:
    """Medians of one side in this process; where there are several runs, one more comes first and is not counted."""
    name, _, kind = side.partition(" ")
    with folder(length + new) as model:
        once = SIDE[name](model, kind, length, new)
        if runs > 1:
            once()
        attempts = [undisturbed(once) for _ in range(runs)]
    return {
        **summed(attempts),
        "density": attempts[0][0].density,
        "peak_memory_mb": peak_kb() / 1024,
    }


@contextmanager
def folder(length: int) -> Iterator[Path]:
    """The embedded model, with its rotary embedding stretched (YaRN) for lengths beyond its training."""
    model = embedded(lambda message: None)
    config = json.loads((model / "config.json").read_text())
    if length <= (native := config["max_position_embeddings"]):
        yield model
        return
    theta = config.get("rope_parameters", config)["rope_theta"]
    stretch = {"rope_type": "yarn", "factor": length / native, "original_max_position_embeddings": native}
    config |= {"max_position_embeddings": length, "rope_parameters": {**stretch, "rope_theta": theta}}
    with TemporaryDirectory() as name:
        for file in model.iterdir():
            (Path(name) / file.name).symlink_to(file)
        (Path(name) / "config.json").unlink()
        (Path(name) / "config.json").write_text(json.dumps(config))
        yield Path(name)


def transformers(path: Path, dtype: str, length: int, new: int) -> Callable[[], Run]:
    """Transformers' `generate` with SDPA."""
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(path))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    prompt = torch.tensor([tokens(tokenizer, length)])

    def once() -> Run:
        clock = Clock()
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock)
        return Run(clock.times, 1.0, clock.tokens)

    return once


class Clock(BaseStreamer):
    """Arrival time of each token; the first call brings the prompt."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter() - self.start)
            self.tokens += value.tolist()
        self._prompt_seen = True

    def end(self) -> None:
        pass


def keysift(path: Path, strategy: str, length: int, new: int) -> Callable[[], Run]:
    """The engine in bfloat16, with ``STRATEGY`` or ``STRATEGY QUANTIZATION``."""
    name, _, quantization = strategy.partition(" ")
    config = {"model": str(path), "strategy": name, "quantization": quantization or "none"}
    engine = Engine(EngineConfig(dtype="bfloat16", **config))
    prompt = tuple(tokens(engine.tokenizer, length))
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)

    def once() -> Run:
        start, outputs = time.perf_counter(), list[Output]()
        times: list[float] = []
        engine.add(Request("benchmark", prompt, params, bypass_prefix_cache=True))
        while engine.has_work:
            outputs += engine.step()
            times += [time.perf_counter() - start] * (sum(isinstance(o, TokenOutput) for o in outputs) - len(times))
        finish = outputs[-1]
        assert isinstance(finish, Finish)
        generated = [token for output in outputs if isinstance(output, TokenOutput) for token in output.token_ids]
        return Run(times, finish.sparsity.prefill_density, generated)

    return once


SIDE = {"keysift": keysift, "transformers": transformers}
