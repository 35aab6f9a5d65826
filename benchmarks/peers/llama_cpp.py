"""llama.cpp's side of `benchmarks.peers`, run in a virtual environment of its own.

Settings: batch (prompt tokens at once), flash (its flash attention). With `quantize` and `type` instead it writes a
GGUF of that type, made from the model, whose weights are widened first: the weights stay those of the model.
"""

from __future__ import annotations

import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found]

from .side import Answer, answer, options, serve


def main() -> None:
    question = options()
    if "quantize" in question:
        quantize(question["model"], question["quantize"], question["type"])
        return
    model = load(question)
    system = llama_cpp.llama_print_system_info().decode().strip()
    serve(lambda: run(model, question["prompt"], question["new"]), system)


def load(question: dict[str, Any]) -> Any:
    return llama_cpp.Llama(
        model_path=question["model"],
        n_ctx=len(question["prompt"]) + question["new"],
        n_batch=question["batch"],
        n_ubatch=question["batch"],
        n_threads=question["threads"],
        n_threads_batch=question["threads"],
        flash_attn=question["flash"],
        verbose=False,
    )


def run(model: Any, prompt: list[int], new: int) -> Answer:
    """One greedy request: the prompt, then token by token, past the model's own end."""
    times: list[float] = []
    tokens: list[int] = []
    start = time.perf_counter()
    model.reset()
    model.eval(prompt)
    while True:
        tokens.append(int(model.sample(temp=0.0)))
        times.append(time.perf_counter() - start)
        if len(tokens) == new:
            return times, tokens
        model.eval(tokens[-1:])


def quantize(source: str, target: str, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"llama.cpp could not make {target}")
    answer(made=target)


if __name__ == "__main__":
    main()
