"""Cases of the compile check: every Triton kernel with its constants, as launches choose them on each target."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Target:
    """A kind of GPU, and the least shared memory that one of its tier in `config` grants a block, in bytes."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 101_376),
    Target("sm_89", "cuda", 89, 32, 101_376),
    Target("sm_90", "cuda", 90, 32, 232_448),
    Target("sm_100", "cuda", 100, 32, 232_448),
    Target("gfx942", "hip", "gfx942", 64, 65_536),
)


@dataclass(frozen=True)
class Case:
    """One kernel with its constants on one target."""

    label: str
    kernel: str
    dtype: str
    target: Target
    constants: dict[str, int | float | None]
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})
    wants_tensor_cores: bool = False


ALIKE = {"sm_89", "sm_100"}
"""Targets that launch the same as sm_80 and sm_90: one dtype suffices to check their compilers."""


def cases(every: bool = False) -> Iterator[Case]:
    """Every kernel, tile and dtype that a launch can choose on each target; where `ALIKE` and not `every`, in bf16."""
    return (case for case in _cases() if every or case.target.name not in ALIKE or case.dtype == "bf16")


def _cases() -> Iterator[Case]:
    for target in TARGETS:
        for dtype in DTYPES:
            for dim in (16, 32, 64, 128, 256):
                yield attend_case(target, dtype, dim, queries_per_row=64)
                yield attend_case(target, dtype, dim, queries_per_row=1)
            for dim, queries in itertools.product((128, 256), (1, 64)):
                if dtype != "fp16":  # the tiles and the numbers of bf16
                    yield from score_cases(target, dtype, dim, queries)
            for dim, page_size in itertools.product((64, 128, 256), (16, 128)):
                if dtype != "fp16" and (dim, page_size) != (64, 128):
                    yield from page_cases(target, dtype, dim, page_size)
            yield from small_cases(target, dtype)
        band = {"Hkv": 8, "G": 4, "S": 16, "BLOCK_T": 16, "BLOCK_F": 64}
        yield Case("bands", "band_kernel", "fp32", target, band)
        for piece in (2048, 8192):
            yield fetch_case(target, piece)
        yield from admit_cases(target)
        yield Case("join", "join_kernel", "fp32", target, {"BLOCK": 64, "BLOCK_P": 16})
        for max_pages in (2**n for n in range(7, 14)):
            yield from (case for zones in (True, False) for case in heaviest_cases(target, max_pages, zones))
            yield from steady_cases(target, max_pages)
        yield from (case for zones in (True, False) for case in piece_cases(target, zones))


def small_cases(target: Target, dtype: str) -> Iterator[Case]:
    """Copies and summaries of single tokens and pages, and the merge of pieces."""
    from keysift.kvcache.ops.store import triton as storing
    from keysift.kvcache.ops.summarize import triton as summarizing

    store = {"H": 8, "S": 16, "D": 128} | storing.config(8, 128).constants
    summarize = {"S": 16, "D": 128} | summarizing.config(128, 16).constants
    merge = {"D": 128, "BLOCK_P": 16, "BLOCK_D": 128}
    for name, constants in (("merge", merge), ("store", store), ("summarize", summarize)):
        yield Case(name, f"{name}_kernel", dtype, target, dict(constants))


def fetch_case(target: Target, piece: int) -> Case:
    """Heads of pages of `piece` bytes."""
    from keysift.kvcache.ops.fetch.triton import config

    constants = {"Hkv": 8, "E": 64, "W": 512, "WORDS": piece // 4} | config(piece // 4).constants
    return Case(f"fetch {piece} bytes", "fetch_kernel", "bf16", target, dict(constants))


def attend_case(target: Target, dtype: str, dim: int, queries_per_row: int) -> Case:
    """Attention of 32 query heads over 8, the four of a group packed, as a launch on `target` configures it."""
    from keysift.attention.ops.paged_attention.triton import config

    chosen = config(target.shared_memory, dim, DTYPES[dtype], queries_per_row * 4)
    heads = {"M": queries_per_row, "Hq": 32, "G": 4, "PACK": 4, "S": 16, "D": dim, "stride_fp": 1, "stride_pp": 1}
    return Case(
        f"{'prefill' if queries_per_row > 1 else 'decode'} d={dim}",
        "attend_kernel",
        dtype,
        target,
        heads | chosen.constants,
        chosen.options,
        wants_tensor_cores=dtype != "fp32",
    )


def score_cases(target: Target, dtype: str, dim: int, queries: int) -> Iterator[Case]:
    """Both passes over the keys for probes of `queries` queries, 32 heads over 8, as a launch configures them."""
    from keysift.attention.ops.column_scores.triton import config

    chosen = config(target.shared_memory, dim, DTYPES[dtype], queries, 4, 16)
    heads = {"Hq": 32, "G": 4, "S": 16, "D": dim, "stride_fp": 1}
    for name, constants in (("lse", {"PIECE": 1024}), ("mass", {"BANDS": True})):
        yield Case(
            f"{name}{queries} d={dim}",
            f"{name}_kernel",
            dtype,
            target,
            heads | constants | chosen.constants,
            chosen.options,
            wants_tensor_cores=dtype != "fp32",
        )


def page_cases(target: Target, dtype: str, dim: int, page_size: int) -> Iterator[Case]:
    """Codes of keys, and pages scored by single queries of 32 heads over 8, as launches configure them."""
    from keysift.kvcache.ops.encode import triton as encoding
    from keysift.kvcache.ops.page_masses import triton as twins

    sizes, amd = (dim, page_size, DTYPES[dtype]), target.backend == "hip"
    heads = {"Hkv": 8, "G": 4, "S": page_size, "D": dim, "stride_fp": 1}
    bounds, codes = twins.bounds_config(*sizes, amd), twins.codes_config(*sizes, amd)
    own_page: dict[str, int | float | None] = {"LOG_S": math.log(page_size)}
    kernels = {"masses": (twins.masses_config(*sizes), {}), "bounds": (bounds, own_page), "centres": (bounds, own_page)}
    for bits in (2, 4):
        words: dict[str, int | float | None] = {"W": dim * bits // 32, "BITS": bits}
        kernels |= {f"codes{bits}{end}": (codes, words | {"LISTED": n}) for n, end in enumerate(("", "-listed"))}
        encoded = encoding.config(dim, page_size)
        constants = {"S": page_size, "D": dim} | words | encoded.constants
        yield Case(f"encode{bits} d={dim}", "encode_kernel", dtype, target, constants, encoded.options)
    for label, (chosen, rest) in kernels.items():
        if label == "masses" or dtype != "fp32" or dim <= twins.WIDEST:
            kernel, constants = re.sub(r"\d.*", "", label) + "_kernel", heads | rest | chosen.constants
            yield Case(f"{label} d={dim}", kernel, dtype, target, constants, chosen.options, dtype != "fp32")


def admit_cases(target: Target) -> Iterator[Case]:
    """Slots for listed pages, among as many store frames as 64 and 1,024 programs take."""
    from keysift.kvcache.ops.admit.triton import BLOCK, config

    for name in ("mark", "find", "locate"):
        constants = {"BLOCK": BLOCK} if name == "find" else {"BLOCK": BLOCK, "stride_fp": 1}
        yield Case(f"admit: {name}", f"{name}_kernel", "fp32", target, constants)
    for blocks in (64, 1024):
        yield Case("admit: replace", "replace_kernel", "fp32", target, dict(config(blocks).constants))


def heaviest_cases(target: Target, max_pages: int, zones: bool) -> Iterator[Case]:
    """Choices among so many pages, or what pieces have found of more, for the four heads of a group."""
    from keysift.kvcache.ops.heaviest.triton import Pieces, config

    blocks, options = config(max_pages)
    constants = {"H": 8, "G": 4, "ZONES": zones} | blocks
    in_one = constants | Pieces()._asdict()
    yield Case(f"choose F={max_pages}", "heaviest_kernel", "fp32", target, in_one, options)
    yield Case(f"choose C={max_pages}", "heaviest_kernel", "fp32", target, dict(constants), options)
    if zones:
        yield Case(f"kept P={max_pages}", "kept_kernel", "fp32", target, {"G": 4} | blocks, options)


def piece_cases(target: Target, zones: bool) -> Iterator[Case]:
    """Kernels over the pieces of a list that is too long for one program."""
    from keysift.kvcache.ops.heaviest.triton import MAX_PAGES, config

    blocks, options = config(MAX_PAGES)
    constants = {"ZONES": zones} | blocks
    heads, groups, alone = {"HEADS": 32}, {"H": 8, "G": 4}, {"known": None, "read": None}
    for name, rest in (("tops", heads), ("sums", heads), ("piece", groups | alone), ("piece", groups)):
        yield Case(name, f"{name}_kernel", "fp32", target, constants | rest, options)


def steady_cases(target: Target, max_pages: int) -> Iterator[Case]:
    """A choice that changes little among so many pages, or what pieces have found, for the four heads of a group."""
    from keysift.attention.ops.steady_pages.triton import AVERAGES, config
    from keysift.kvcache.ops.heaviest.triton import MAX_PAGES, Pieces

    amd, groups = target.backend == "hip", {"H": 8, "G": 4}
    for label, fewest, absent in (("F", 1, Pieces()._asdict()), ("C", 4, {})):
        blocks, options = config(max_pages, amd, fewest)
        constants = groups | absent | blocks
        if label == "F" or max_pages < MAX_PAGES:
            yield Case(f"steady {label}={max_pages}", "steady_kernel", "fp32", target, constants, options)
    if max_pages == MAX_PAGES:
        constants, options = groups | AVERAGES.constants, {"num_warps": 4} | AVERAGES.options
        yield Case("averages", "average_kernel", "fp32", target, constants, options)
