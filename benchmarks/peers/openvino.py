"""OpenVINO GenAI's side of `benchmarks.peers`, run in a virtual environment of its own.

Settings: paged (its paged attention, or else the plain pipeline), batch (prompt tokens at once of the former), sparse
(its XAttention for the prompt), and names in capitals, which go to OpenVINO unchanged.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]

from .side import Answer, options, serve


def main() -> None:
    question = options()
    properties = {name: value for name, value in question.items() if name.isupper()}
    properties |= {"INFERENCE_NUM_THREADS": question["threads"]}
    if question["paged"]:
        properties["scheduler_config"] = scheduler(question)
    else:
        properties["ATTENTION_BACKEND"] = "SDPA"  # or else the pipeline chooses for itself
    pipeline = genai.LLMPipeline(question["model"], "CPU", **properties)
    serve(lambda: run(pipeline, question["prompt"], question["new"]), genai.get_version())


def scheduler(question: dict[str, Any]) -> Any:
    config = genai.SchedulerConfig()
    config.cache_size = 1  # GB, taken as it is needed
    config.enable_prefix_caching = False
    config.max_num_batched_tokens = question["batch"]
    config.use_sparse_attention = question["sparse"]
    if question["sparse"]:
        config.sparse_attention_config = genai.SparseAttentionConfig(mode=genai.SparseAttentionMode.XATTENTION)
    return config


def run(pipeline: Any, prompt: list[int], new: int) -> Answer:
    ids = np.array([prompt], dtype=np.int64)
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
    clock = Clock()
    result = pipeline.generate(inputs, config, clock)
    return clock.times, [int(token) for token in result.tokens[0]]


class Clock(genai.StreamerBase):  # type: ignore[misc]
    """Arrival time of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.start = time.perf_counter()

    def write(self, token: int | list[int]) -> Any:
        count = len(token) if isinstance(token, list) else 1
        self.times += [time.perf_counter() - self.start] * count
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


if __name__ == "__main__":
    main()
