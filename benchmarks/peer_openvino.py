"""OpenVINO GenAI's side of `peers.py`, run by the Python of a virtual environment of its own.

Reads one JSON object, as `peer_llama_cpp.py` does, and prints one for every run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]


def main() -> None:
    options: dict[str, Any] = json.loads(sys.stdin.read())
    settings = {"INFERENCE_NUM_THREADS": options["threads"], **options.get("settings", {})}
    if options["paged"]:
        settings["scheduler_config"] = scheduler(options)
    pipeline = genai.LLMPipeline(options["model"], "CPU", **settings)
    for _ in range(options["runs"]):
        run(pipeline, options["prompt"][-1:], 1)  # what it kept of the prompt before goes
        print(json.dumps(run(pipeline, options["prompt"], options["new"])), flush=True)


def scheduler(options: dict[str, Any]) -> genai.SchedulerConfig:
    config = genai.SchedulerConfig()
    config.cache_size = 2
    config.enable_prefix_caching = False
    config.max_num_batched_tokens = options["batch"]
    config.use_sparse_attention = bool(options.get("sparse"))
    return config


def run(pipeline: genai.LLMPipeline, prompt: list[int], new: int) -> dict[str, Any]:
    ids = np.array([prompt], dtype=np.int64)
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
    clock = Clock()
    cpu = time.process_time()
    clock.start = time.perf_counter()
    result = pipeline.generate(inputs, config, clock)
    lines = Path("/proc/self/status").read_text().splitlines()  # `resource` includes what the parent had
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    tokens = [int(token) for token in result.tokens[0]]
    return {"times": clock.times, "tokens": tokens, "cpu": time.process_time() - cpu, "peak_kb": peak}


class Clock(genai.StreamerBase):  # type: ignore[misc]
    """Notes when each token arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.start = 0.0
        self.times: list[float] = []

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        count = len(token) if isinstance(token, list) else 1
        self.times += [time.perf_counter() - self.start] * count
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


if __name__ == "__main__":
    main()
