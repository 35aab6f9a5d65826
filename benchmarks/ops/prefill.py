"""One layer's attention of a prompt under each strategy: choosing, attending, and both against dense and torch's SDPA.

Queries, keys and values are structured like those of trained heads (`lib/structured.py`), in bf16, in chunks as the
engine runs them; torch gets the whole prompt at once. Density has the causal denominator. Coverage is the attention
mass that the chosen pages hold, of four queries of every row but a chunk's last one, which some strategies choose by.
Writing keys and page means into the cache, which dense does too, is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from keysift.attention import make
from keysift.kvcache.native.library import isa

from ..lib import cli
from ..lib.prompt import Prompt
from ..lib.shapes import SHAPES
from ..lib.timing import Row, Timing, machine, measure, show

STRATEGIES: dict[str, dict[str, object]] = {
    "dense": {},
    "flexprefill 0.95": {"gamma": 0.95},
    "flexprefill 0.9": {"gamma": 0.9},
    "sampleattention 0.95": {"alpha": 0.95},
    "minference": {},
    "xattention 0.9": {"threshold": 0.9},
    "sift": {},
}


def rows(shape: str, tokens: int, chunk: int, names: list[str], runs: int, with_torch: bool) -> Iterator[Row]:
    prompt = Prompt.make(SHAPES[shape], tokens, chunk)
    peer = torch_seconds(prompt, runs) if with_torch else None
    dense: Timing | None = None
    for name in names:
        strategy = make(name.split()[0], **STRATEGIES[name])
        selections = prompt.choose(strategy)
        chosen = measure(lambda strategy=strategy: prompt.choose(strategy), runs=runs)  # type: ignore[misc]
        attended = measure(lambda selections=selections: prompt.attend(selections), runs=runs)  # type: ignore[misc]
        dense = dense or attended
        density, (least, mean) = prompt.density(selections), prompt.coverage(selections)
        total = attended.seconds + (0.0 if name == "dense" else chosen.seconds)
        yield {
            "shape": shape, "tokens": tokens, "strategy": name, "density": density, "coverage": mean, "least": least,
            "choose_ms": 1e3 * (total - attended.seconds), "attend_ms": 1e3 * attended.seconds,
            "choose/dense": (total - attended.seconds) / dense.seconds,
            "attend/(density dense)": attended.seconds / dense.seconds / density,
            "dense/total": dense.seconds / total, "torch/total": peer.seconds / total if peer else None,
            "quiet": attended.quiet and dense.quiet and (peer is None or peer.quiet),
        }  # fmt: skip


def torch_seconds(prompt: Prompt, runs: int) -> Timing:
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (prompt.q, prompt.k, prompt.v))
    return measure(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), runs=runs)


def main() -> None:
    parser = cli.parser("benchmarks.ops.prefill", __doc__)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument(
        "--chunk", type=int, default=1024, help="prompt tokens of one step, as the engine's prefill_chunk"
    )
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--runs", type=int, default=3, help="undisturbed runs to take the median of")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's SDPA out: it takes minutes at 32k")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    names = list(dict.fromkeys(["dense", *options.strategies]))
    results = (
        row
        for shape in options.shape
        for tokens in options.tokens
        for row in rows(shape, tokens, options.chunk, names, options.runs, not options.no_torch)
    )
    show({**machine(), "isa": isa(), "chunk": options.chunk}, results, as_json=options.json)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
