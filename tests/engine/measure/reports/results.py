"""Results as `keysift eval` and `keysift profile` write them, rich enough to fill every section of a page."""

from __future__ import annotations

import itertools
import random
from typing import Any

Json = dict[str, Any]
STRATEGIES = (
    "dense",
    "sift+retrieval",
    "flexprefill+retrieval",
    "sampleattention+topk",
    "streaming",
    "minference+quest",
    "xattention(threshold=0.95, stride=8)+retrieval(top_k=100, probes=4)",
    "infllmv2",
)
TASKS = ("niah_single_1", "niah_multikey_3", "niah_multivalue", "vt", "cwe", "passkey", "copy", "key_value")
LENGTHS = (1024, 2048, 4096)
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def _common(schema: str) -> Json:
    return {
        "schema": schema,
        "created": "2026-11-23T08:00:00+00:00",
        "finished": True,
        "environment": {
            "keysift": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.2",
            "processor": "AMD EPYC 9V74 80-Core Processor",
            "cores": 2,
            "threads": 2,
            "commit": "650df88",
            "device": "cpu",
        },
        "model": {
            "name": "smollm2-135m",
            "dtype": "bfloat16",
            "fingerprint": "9a1c0ffee" * 7,
            "max_model_len": 8192,
            "layers": 30,
            "query_heads": 9,
            "kv_heads": 3,
        },
    }


def evaluation(
    strategies: tuple[str, ...] = STRATEGIES, lengths: tuple[int, ...] = LENGTHS, samples: int = 3, layers: int = 30
) -> Json:
    dice = random.Random(7)
    rows = [_score(dice, *key) for key in itertools.product(TASKS, lengths, strategies)]
    return {
        **_common("keysift.eval/1"),
        "settings": {
            "strategies": list(strategies),
            "strategy_args": [],
            "tasks": list(TASKS),
            "lengths": list(lengths),
            "samples": samples,
            "seed": 0,
            "chat": False,
            "texts": ["cpython"],
        },
        "seconds": 2211.5,
        "scores": rows,
        "summary": [_summary(rows, name, length) for name in strategies for length in (*lengths, None)],
        "agreement": _agreement(dice, strategies, lengths),
        "heads": [_heads(dice, *key, layers) for key in itertools.product(strategies, ("prefill", "decode"), lengths)],
        "samples": [
            _sample(dice, *key, number)
            for number, key in enumerate(itertools.product(TASKS, lengths, range(samples), strategies))
        ],
    }


def _damage(strategy: str) -> float:
    return 0.0 if strategy == "dense" else (1 + len(strategy) % 7) / 20


def _density(strategy: str, length: int) -> float:
    return 1.0 if strategy == "dense" else min(0.03 * (1 + len(strategy) % 5) * 4096 / length, 1.0)


def _score(dice: random.Random, task: str, length: int, strategy: str) -> Json:
    base = 0.12 if task == "vt" else 0.95 - length / 40960
    score = max(base - _damage(strategy) * dice.random(), 0.0)
    loss = 0.0 if strategy == "dense" else _damage(strategy) * dice.random()
    return {
        "task": task,
        "length": length,
        "strategy": strategy,
        "samples": 3,
        "score": score,
        "low": max(score - 0.08, 0.0),
        "high": min(score + 0.07, 1.0),
        "answer_nll": 0.3 + loss,
        "answer_nll_loss": loss,
        "answer_nll_loss_se": loss / 4,
        "answer_rank": 1 + 10 * loss,
        "answer_greedy": score,
        "prefill_density": _density(strategy, length),
        "decode_density": _density(strategy, length) / 2 if strategy != "dense" else 1.0,
        "coverage": 1 - loss / 2,
        "coverage_min": 1 - min(loss * 2, 1.0),
    }


def _summary(rows: list[Json], name: str, length: int | None) -> Json:
    def mean(of: str, key: str) -> float:
        found = [row[key] for row in rows if row["strategy"] == of and length in (None, row["length"])]
        return sum(found) / len(found)

    score = mean(name, "score")
    return {
        "strategy": name,
        "length": length,
        "score": score,
        "low": score - 0.03,
        "high": score + 0.02,
        "loss": mean("dense", "score") - score,
        "prefill_density": mean(name, "prefill_density"),
        "decode_density": mean(name, "decode_density"),
        "seconds": 100.0 / (1 + _damage(name)),
    }


def _agreement(dice: random.Random, strategies: tuple[str, ...], lengths: tuple[int, ...]) -> list[Json]:
    rows = []
    names = [("text", "all"), ("text", "manual"), ("tasks", "all")]
    for (source, name), length, phase, strategy in itertools.product(
        names, lengths, ("prefill", "decode"), strategies[1:]
    ):
        kl = _damage(strategy) / 10 * (0.5 + dice.random()) / (1 if phase == "prefill" else 8)
        rows.append(
            {
                "source": source,
                "name": name,
                "length": length,
                "phase": phase,
                "strategy": strategy,
                "positions": 512,
                "kl_mean": kl,
                "kl_median": kl / 9,
                "kl_p99": kl * 14,
                "top1": 1 - kl,
                "perplexity_change": kl / 2 - 0.001,
                "perplexity_change_se": kl / 9,
                "density": _density(strategy, length),
                "coverage": 1 - kl,
                "coverage_min": 1 - 3 * kl,
            }
        )
    return rows


def _heads(dice: random.Random, strategy: str, phase: str, length: int, layers: int) -> Json:
    low = 1 - 2 * _damage(strategy)
    coverage: list[list[float] | None] = [[low + (1 - low) * dice.random() for _ in range(9)] for _ in range(layers)]
    density: list[list[float] | None] = [[0.2 * dice.random() for _ in range(9)] for _ in range(layers)]
    if layers > 2:
        coverage[2] = density[2] = None  # a layer of windows
    return {"strategy": strategy, "phase": phase, "length": length, "coverage": coverage, "density": density}


def _sample(dice: random.Random, task: str, length: int, index: int, strategy: str, number: int) -> Json:
    evil = number == 1
    return {
        "task": task,
        "length": length,
        "index": index,
        "strategy": strategy,
        "score": 0.0 if evil else dice.choice([0.0, 0.5, 1.0, 1.0, 1.0]),
        "text": EVIL if evil else f" The special magic number is {number}.\nThe grass is green.\x00",
        "answers": [EVIL if evil else str(number)],
        "prompt_tokens": length - 32,
        "prompt_tail": f"{EVIL} & the rest: " + "what is the special magic number for long-haired? " * 3,
        "answer_nll": 9.0 if evil else 0.1 + dice.random(),
        "answer_rank": 1 + number % 5,
        "prefill_density": _density(strategy, length),
        "decode_density": 0.1,
        "seconds": 1.5,
    }


def profile(
    strategies: tuple[str, ...] = STRATEGIES[:4],
    lengths: tuple[int, ...] = (*LENGTHS, 8192),
    batches: tuple[int, ...] = (1, 4),
) -> Json:
    dice = random.Random(11)
    cells = [_cell(dice, *key) for key in itertools.product(strategies, lengths, batches)]
    cells[3 % len(cells)]["disturbed"] = True
    return {
        **_common("keysift.profile/1"),
        "settings": {
            "strategies": list(strategies),
            "input_lens": list(lengths),
            "output_len": 32,
            "batch_sizes": list(batches),
            "runs": 3,
            "warmup": 1,
            "seed": 0,
            "text": "cpython",
        },
        "cells": cells,
    }


def _cell(dice: random.Random, strategy: str, length: int, batch: int) -> Json:
    share = _density(strategy, length)
    ttft = 1e-3 * length * batch * (0.25 + 0.1 * share * length / 1024) * (0.97 + 0.06 * dice.random())
    itls = [[0.02 * (1 + share * length / 4096) * (0.9 + 0.3 * dice.random()) for _ in range(31)] for _ in range(batch)]
    tpot = sum(map(sum, itls)) / 31 / batch
    parts = ("linear", "selection", "attention", "index", "transfer", "sampling", "other")
    return {
        "strategy": strategy,
        "input_len": length,
        "output_len": 32,
        "batch_size": batch,
        "runs": 3,
        "disturbed": False,
        "cpu_share": 0.97,
        "others_share": 0.01,
        "ttft_ms": {"median": 1e3 * ttft, "min": 970 * ttft, "max": 1080 * ttft},
        "tpot_ms": {"median": 1e3 * tpot, "min": 990 * tpot, "max": 1020 * tpot},
        "prefill_latency": ttft,
        "decode_latency": tpot,
        **_percentiles(1e3 * ttft, 1e3 * tpot),
        "request_throughput": batch / (ttft + 32 * tpot),
        "output_throughput": batch * 32 / (ttft + 32 * tpot),
        "total_token_throughput": batch * (32 + length) / (ttft + 32 * tpot),
        "ttfts": [ttft] * batch,
        "itls": itls,
        "input_lens": [length] * batch,
        "output_lens": [32] * batch,
        "peak_memory_bytes": int(7e8 + 23040 * length * batch),
        "kv_bytes": 23040 * length * batch,
        "prefill_density": share,
        "decode_density": share / 2 if strategy != "dense" else 1.0,
        "coverage": 0.98 if strategy != "dense" else None,
        "kv_bytes_read": int(23040 * length * share * 32),
        "kv_bytes_moved": 0,
        "shares": {
            "prefill": {part: ttft * weight / 100 for part, weight in zip(parts, (45, 9, 30, 6, 1, 1, 8), strict=True)},
            "decode": {part: 0.31 * tpot * weight for part, weight in zip(parts, (70, 5, 12, 3, 0, 4, 6), strict=True)},
        },
    }


def _percentiles(ttft: float, tpot: float) -> Json:
    centres = {"ttft": ttft, "tpot": tpot, "itl": tpot, "e2el": ttft + 31 * tpot}
    scales = {"mean": 1.01, "median": 1.0, "std": 0.05, "p99": 1.4}
    return {f"{name}_{of}_ms": centre * scale for of, centre in centres.items() for name, scale in scales.items()}


def load(strategy: str = "sift+retrieval") -> Json:
    dice = random.Random(13)
    ttfts = [dice.lognormvariate(-1, 0.6) for _ in range(64)]
    return {
        **_common("keysift.profile/1"),
        "settings": {"address": "127.0.0.1:50051", "seed": 0},
        "load": {
            "strategy": strategy,
            "duration": 61.5,
            "completed": 63,
            "failed": 1,
            "errors": [EVIL],
            "request_rate": 2.0,
            "request_throughput": 1.02,
            "request_goodput": 0.9,
            "output_throughput": 33.1,
            "total_token_throughput": 2100.5,
            "max_concurrent_requests": 9,
            "ttfts": ttfts,
            "itls": [[dice.lognormvariate(-3.5, 0.4) for _ in range(31)] for _ in range(64)],
            "input_lens": [2048] * 64,
            "output_lens": [32] * 64,
            **_percentiles(400.0, 30.0),
        },
    }
