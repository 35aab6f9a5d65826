"""llama.cpp's side of `peers.py`, run by the Python of a virtual environment of its own.

Reads one JSON object: model (a GGUF), prompt (token ids), new, runs, threads, batch, flash. Prints one JSON object for
each run: seconds from the start to each token, and the tokens. With `quantize` in it, it makes a GGUF of another type
from the model instead: of the same weights, which are widened first.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]


def main() -> None:
    options: dict[str, Any] = json.loads(sys.stdin.read())
    if "quantize" in options:
        quantize(options["model"], options["quantize"], options["type"])
        return
    model = llama_cpp.Llama(
        model_path=options["model"],
        n_ctx=len(options["prompt"]) + options["new"] + 8,
        n_batch=options["batch"],
        n_ubatch=options["batch"],
        n_threads=options["threads"],
        n_threads_batch=options["threads"],
        flash_attn=options["flash"],
        verbose=False,
    )
    for _ in range(options["runs"]):
        print(json.dumps(run(model, options["prompt"], options["new"])), flush=True)


def run(model: Any, prompt: list[int], new: int) -> dict[str, Any]:
    """One greedy request: the prompt, then token by token, the model's own end among them."""
    model.reset()
    times, tokens = [], []
    cpu, start = time.process_time(), time.perf_counter()
    model.eval(prompt)
    for _ in range(new):
        token = int(model.sample(temp=0.0))
        times.append(time.perf_counter() - start)
        tokens.append(token)
        if len(tokens) < new:
            model.eval([token])
    return {"times": times, "tokens": tokens, "cpu": time.process_time() - cpu, "peak_kb": peak()}


def peak() -> int:
    """This program's own, as Linux counts it from its start: that of `resource` includes its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def quantize(source: str, target: str, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"llama.cpp could not make {target}")


if __name__ == "__main__":
    main()
