"""Losses of weights in 8 bits: next-token distributions along texts, against the embedded model's own weights.

Dense attention, a text as a prompt and its last tokens decoded, in float32; and bfloat16 for scale.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from keysift.engine import Engine, EngineConfig
from keysift.engine.measure.evaluation.along import DECODED
from keysift.engine.measure.evaluation.divergence import Divergence, logs
from keysift.engine.measure.evaluation.reader import Reader

from ..lib import cli
from ..lib.texts import KINDS, text
from ..lib.timing import Row, machine, show

KINDS_OF_WEIGHTS = {
    "float32": {"dtype": "float32"},
    "float32, int8": {"dtype": "float32", "quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, int8": {"dtype": "bfloat16", "quantization": "int8"},
}


def main() -> None:
    parser = cli.parser("benchmarks.engine.quantization", __doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each text")
    parser.add_argument("--texts", nargs="+", default=list(KINDS), help="of manual, scripture, article, play")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    show(machine(), rows(options.texts, options.tokens), as_json=options.json)


def rows(kinds: list[str], length: int) -> Iterator[Row]:
    exact: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, config in KINDS_OF_WEIGHTS.items():
        engine = Engine(EngineConfig(device="cpu", strategy="dense", **config))
        found = {kind: distributions(engine, kind, length) for kind in kinds}
        exact = exact or found
        for phase in (0, 1):
            parts = [compared(engine, kind, length, exact[kind][phase], found[kind][phase], phase) for kind in kinds]
            kl = [value for part in parts for value in part.kl]
            yield {
                "weights": name,
                "phase": ("prompt", "tokens")[phase],
                "KL": statistics.fmean(kl),
                "worst text": max(statistics.fmean(part.kl) for part in parts),
                "KL p99": statistics.quantiles(kl, n=100)[98] if any(kl) else 0.0,
                "top-1": statistics.fmean(agrees for part in parts for agrees in part.agrees),
                "nats lost": statistics.fmean(loss for part in parts for loss in part.loss),
            }


def distributions(engine: Engine, kind: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logs [positions, V] along the prompt, and along the tokens that are decoded after its first part."""
    tokens, reader, rows = encoded(engine, kind, length), Reader(engine), list[torch.Tensor]()
    with reader.open([tokens], engine.strategy("dense"), 0) as (reading,):
        reader.read(reading, positions(length), lambda position, logits: rows.append(logits))
    with reader.open([tokens[:-DECODED]], engine.strategy("dense"), DECODED) as (reading,):
        reader.read(reading)
        return logs(torch.stack(rows)), logs(reader.follow(reading, tokens[-DECODED:]))


def compared(
    engine: Engine, kind: str, length: int, exact: torch.Tensor, found: torch.Tensor, phase: int
) -> Divergence:
    tokens = encoded(engine, kind, length)
    followers = tokens[-DECODED:] if phase else [tokens[position + 1] for position in positions(length)]
    return Divergence.of(exact, found, torch.tensor(followers))


def encoded(engine: Engine, kind: str, length: int) -> list[int]:
    return engine.tokenizer.encode(text(kind)[: 8 * length])[:length]


def positions(length: int) -> list[int]:
    """Every fourth of the last three quarters."""
    return list(range(length // 4, length - 1, 4))


if __name__ == "__main__":
    main()
