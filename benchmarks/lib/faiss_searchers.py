"""Indexes of faiss as searchers of `benchmarks.ops.index`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .searchers import BEST_KEYS, PAGE, Family, Found, Problem


@dataclass(slots=True)
class Faiss:
    """An index of faiss for each KV head, by inner product; a setting is a number that its search takes."""

    problem: Problem
    heads: list[Any]
    build_seconds: dict[str, float]
    bytes_per_key: dict[str, float]

    @classmethod
    def make(cls, problem: Problem, create: Callable[[int, int], Any], settings: list[str]) -> Faiss:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        tokens, _, dim = problem.keys.shape
        heads, began = [], time.perf_counter()
        for keys in problem.keys.unbind(1):
            heads.append(create(tokens, dim))
            heads[-1].train(_rows(keys))
            heads[-1].add(_rows(keys))
        seconds = time.perf_counter() - began
        size = sum(len(faiss.serialize_index(head)) for head in heads) / tokens / len(heads)
        return cls(problem, heads, dict.fromkeys(settings, seconds), dict.fromkeys(settings, size))

    def search(self, q: Tensor, setting: str) -> Found:
        tokens, num_kv_heads, dim = self.problem.keys.shape
        keys, scores, scanned, seconds = [], [], 0, 0.0
        for head, queries in zip(self.heads, torch.unflatten(q, 1, (num_kv_heads, -1)).unbind(1), strict=True):
            _tune(head, int(setting))
            rows = _rows(queries.reshape(-1, dim))
            began = time.perf_counter()
            values, found = head.search(rows, BEST_KEYS)
            seconds += time.perf_counter() - began
            scanned += _products(head, len(rows))
            keys.append(torch.from_numpy(found).view(*queries.shape[:2], -1))
            scores.append(torch.from_numpy(values).view(*queries.shape[:2], -1))
        count = q.shape[:2].numel()
        every, exact = torch.cat(keys, 1).int(), torch.cat(scores, 1) * self.problem.scale
        masses = _masses(every, exact, tokens // PAGE)
        return Found(every, masses, scanned / count / tokens, seconds / count)


def _masses(keys: Tensor, scores: Tensor, num_pages: int) -> Tensor:
    """[n, H, F] fp32, log mass of each page by its keys among keys [n, H, K] of these scores; -1 pads the keys."""
    scores = scores.masked_fill(keys < 0, -torch.inf)
    best = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    sums = torch.zeros(*keys.shape[:2], num_pages)
    return sums.scatter_add_(2, keys.clamp(min=0).long() // PAGE, (scores - best).exp()).log() + best


def _rows(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.numpy(), dtype=np.float32)


def _tune(head: Any, number: int) -> None:
    """Set the search effort and reset the counters."""
    if hasattr(head, "hnsw"):
        head.hnsw.efSearch = number
    else:
        head.nprobe = number
    _counter(head).reset()


def _products(head: Any, queries: int) -> int:
    """Keys and centroids that the queries since `_tune` were multiplied with."""
    return int(_counter(head).ndis) + queries * int(getattr(head, "nlist", 0))


def _counter(head: Any) -> Any:
    import faiss

    counters: Any = faiss.cvar
    return counters.hnsw_stats if hasattr(head, "hnsw") else counters.indexIVF_stats


def faiss_families() -> dict[str, tuple[Family, list[str]]]:
    """Indexes of faiss by name. Raises `ImportError` if it is not installed."""
    import faiss

    product = faiss.METRIC_INNER_PRODUCT

    def hnsw(tokens: int, dim: int) -> Any:
        index = faiss.IndexHNSWFlat(dim, 32, product)
        index.hnsw.efConstruction = 200
        return index

    def flat(tokens: int, dim: int) -> Any:
        return _quiet(faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, _lists(tokens), product))

    def scalars(tokens: int, dim: int) -> Any:
        kind = faiss.ScalarQuantizer.QT_4bit
        return _quiet(faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, _lists(tokens), kind, product))

    def products(tokens: int, dim: int) -> Any:
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, _lists(tokens), dim // 4, 8, product)
        index.pq.cp.min_points_per_centroid = 1
        return _quiet(index)

    probes, efforts = [str(2**n) for n in range(2, 9)], [str(100 * 2**n) for n in range(5)]
    creators = {
        "faiss HNSW32": (hnsw, efforts), "faiss IVF": (flat, probes),
        "faiss IVF SQ4": (scalars, probes), "faiss IVF PQ, 2 bits": (products, probes),
    }  # fmt: skip
    return {name: (_faiss(create, settings), settings) for name, (create, settings) in creators.items()}


def _faiss(create: Callable[[int, int], Any], settings: list[str]) -> Family:
    return lambda problem: Faiss.make(problem, create, settings)


def _lists(tokens: int) -> int:
    """As faiss recommends: a few times the root of the number of keys."""
    return round(4 * math.sqrt(tokens))


def _quiet(index: Any) -> Any:
    """Without a warning that so many lists would like more keys to learn from than there are."""
    index.cp.min_points_per_centroid = 1
    return index
