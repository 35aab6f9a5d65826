"""Call structures of the native library: ctypes mirrors of abi.h.

Each declares the memory that its pointers point to, which checked mode compares with the tensors of a call.
"""

from __future__ import annotations

import ctypes

from .call import Call, layout
from .checks import DTYPES as DTYPES
from .checks import Each, Numbers, Operand, named

QUERIES = Operand("type", "rows heads dim", strides=2)
KEYS = Operand("type", "N kv_heads page_size dim", strides=3)
POSITIONS = Numbers("int32", "rows", "pages * page_size", least=-1)
TABLE = Numbers("int32", "rows kv_heads pages", "N", strides=3)
MASSES = Operand("float32", "rows heads pages")
GROUPED = ("page_size > 0", "kv_heads > 0", "heads % kv_heads == 0", "0 < dim <= 256")


class AttentionCall(Call):
    operands = named(
        q=Operand("type", "tokens heads dim", strides=2),
        k=KEYS,
        v=KEYS,
        frames=Numbers("int32", "rows kv_heads F", "N", strides=3),
        pages=Numbers("int32", "rows lists pages_per_list", "F", least=-1, ordered=True, strides=3),
        starts=Numbers("int32", "rows", "F * page_size", least=-1),
        out=Operand("type", "tokens heads dim"),
        lse=Operand("float32", "tokens heads"),
    )
    rules = (*GROUPED, "lists % kv_heads == 0", "lists > 0 and heads % lists == 0", "dim % 8 == 0")
    _fields_ = layout(
        operands, "tokens heads kv_heads lists dim page_size rows pages_per_list queries_per_row window type", "scale"
    )


class Matrix(Call):
    """Weights of one linear layer; not a call, but a part of some."""

    operands = named(
        weight=Operand("any", "outputs inputs"),
        scales=Operand("float32", "outputs inputs//64", optional=True),
        bias=Operand("any", "outputs", optional=True),
    )
    rules = ("inputs % 32 == 0",)
    _fields_ = layout(operands, "outputs inputs")


class LinearCall(Call):
    operands = named(
        x=Operand("type", "batch matrix.inputs", strides=1),
        out=Operand("type", "batch matrix.outputs"),
    )
    _fields_ = layout(operands, "batch type", parts={"matrix": Matrix})


class LayerInCall(Call):
    operands = named(
        x=Operand("type", "batch to_q.inputs", optional=True),
        norm=Operand("type", "to_q.inputs"),
        cos=Operand("type", "batch dim", optional=True),
        sin=Operand("type", "batch dim", optional=True),
        q=Operand("type", "batch to_q.outputs", optional=True),
        k=Operand("type", "batch to_k.outputs", optional=True),
        v=Operand("type", "batch to_v.outputs", optional=True),
    )
    rules = (
        *("to_q.inputs == to_k.inputs == to_v.inputs", "dim > 0 and dim % 2 == 0"),
        *("to_q.outputs % dim == 0", "to_k.outputs % dim == 0"),
    )
    _fields_ = layout(operands, "batch dim type", "eps", parts=dict.fromkeys(("to_q", "to_k", "to_v"), Matrix))


class LayerOutCall(Call):
    operands = named(
        x=Operand("type", "batch to_out.outputs", optional=True),
        attended=Operand("type", "batch to_out.inputs", optional=True),
        norm=Operand("type", "to_out.outputs"),
        out=Operand("type", "batch to_out.outputs", optional=True),
    )
    rules = (
        *("to_out.outputs == gate.inputs == up.inputs == down.outputs", "gate.outputs == up.outputs == down.inputs"),
    )
    _fields_ = layout(operands, "batch type", "eps", parts=dict.fromkeys(("to_out", "gate", "up", "down"), Matrix))


class ScoresCall(Call):
    operands = named(
        q=Operand("type", "probes*queries_per_probe heads dim", strides=2),
        k=KEYS,
        frames=Numbers("int32", "probes kv_heads pages", "N", strides=3),
        positions=Numbers("int32", "probes*queries_per_probe", "pages * page_size", least=-1),
        mass=Operand("float32", "probes heads pages"),
        peak=Operand("float32", "probes heads pages"),
        bands=Operand("float32", "probes heads pages", optional=True),
    )
    rules = (*GROUPED, "dim % 8 == 0")
    _fields_ = layout(operands, "probes queries_per_probe heads kv_heads dim page_size pages type", "scale")


class PagesCall(Call):
    operands = named(
        q=QUERIES,
        k=Operand("type", "K kv_heads page_size dim", strides=3),
        own=Numbers("int32", "rows kv_heads", "K", strides=2),
        summaries=Operand("type", "N kv_heads 4 dim", optional=True),
        levels=Operand("int32", "N kv_heads words page_size", optional=True),
        bounds=Operand("int8", "N kv_heads 2 dim", optional=True),
        scales=Operand("float32", "N kv_heads 2", optional=True),
        frames=TABLE,
        positions=POSITIONS,
        masses=MASSES,
    )
    rules = (*GROUPED, "dim % 16 == 0", "words in (0, dim // 16, dim // 8)")
    _fields_ = layout(
        operands,
        "rows heads kv_heads dim page_size pages words candidates type",
        "scale slack",
        strides=("q", "k", "frames", "own"),
    )


class TopCall(Call):
    operands = named(
        masses=MASSES,
        firsts=Numbers("int32", "rows", "pages"),
        lasts=Numbers("int32", "rows", "pages"),
        out=Operand("int32", "rows lists width"),
        kept=Operand("float32", "rows heads"),
    )
    rules = ("lists > 0", "heads % lists == 0", "budget <= pages")
    _fields_ = layout(operands, "rows heads lists pages width sinks budget", "epsilon")


class SteadyCall(Call):
    operands = named(
        known=Operand("bool", "top.rows"),
        read=Operand("bool", "top.rows top.lists top.pages"),
        averages=Operand("float32", "top.rows top.lists top.pages"),
        refused=Operand("int32", "top.rows top.lists queried"),
        now_read=Operand("bool", "top.rows top.lists top.pages"),
        now_averages=Operand("float32", "top.rows top.lists top.pages"),
        overlap=Operand("float32", "top.rows top.lists"),
        bound_exceeded=Operand("bool", "top.rows top.lists"),
    )
    rules = ("queried <= top.budget",)
    signed = ("most",)
    _fields_ = (("top", TopCall), *layout(operands, "queried most refusable", "factor keep"))


class ClusterCall(Call):
    operands = named(
        k=KEYS,
        frames=Numbers("int32", "segments kv_heads pages", "N", strides=3),
        centroids=Operand("type", "segments kv_heads lists dim"),
        ends=Operand("int32", "segments kv_heads lists"),
        tokens=Operand("int16", "segments kv_heads pages*page_size"),
    )
    rules = ("0 < pages * page_size <= 2**15", "lists > 0", "iterations > 0", "dim % 32 == 0", "0 < dim <= 256")
    _fields_ = layout(operands, "segments kv_heads dim page_size pages lists iterations type")


class ProbeCall(Call):
    operands = named(
        q=QUERIES,
        k=KEYS,
        frames=TABLE,
        positions=POSITIONS,
        places=Numbers("int32", "rows width", "L", strides=1),
        centroids=Each(Operand("type", "kv_heads lists dim"), "L"),
        ends=Each(Numbers("int32", "kv_heads lists", "segment + 1", ordered=True), "L"),
        tokens=Each(Numbers("int16", "kv_heads segment", "segment"), "L"),
        masses=MASSES,
    )
    rules = (*GROUPED, "heads <= 32 * kv_heads", "dim % 32 == 0", "segment > 0", "lists % 4 == 0", "0 < probes < 2**31")
    _fields_ = layout(operands, "rows heads kv_heads dim page_size pages width segment lists probes type", "scale")


class GraphSearchCall(Call):
    operands = named(
        q=QUERIES,
        k=KEYS,
        frames=TABLE,
        positions=POSITIONS,
        ends=Numbers("int32", "rows", "pages * page_size + 1"),
        hubs=Operand("int32", "rows"),
        entries=Operand("int32", "rows"),
        links=Each(Numbers("int32", "kv_heads ends degree", "ends", least=-1), "rows", ("ends",)),
        points=Each(Numbers("int32", "kv_heads hubs+entries", "ends", least=-1), "rows", ("ends", "hubs", "entries")),
        keys=Operand("int32", "rows heads top_k"),
        scores=Operand("float32", "rows heads top_k"),
        scanned=Operand("int32", "rows heads"),
        masses=MASSES,
    )
    rules = (
        *(*GROUPED, "heads <= 64 * kv_heads", "dim % 16 == 0"),
        *("0 < beam < 2**31", "0 < top_k < 2**31", "sink <= pages * page_size"),
    )
    _fields_ = layout(operands, "rows heads kv_heads dim page_size pages degree beam top_k sink window type", "scale")


class GraphNearestCall(Call):
    operands = named(
        q=Operand("type", "kv_heads queries dim"),
        k=KEYS,
        frames=Numbers("int32", "F", "N"),
        nearest=Operand("int32", "kv_heads queries wanted"),
    )
    rules = ("page_size > 0", "end <= F * page_size", "wanted > 0", "dim % 16 == 0")
    _fields_ = layout(operands, "kv_heads queries dim page_size wanted first end type")


class GraphLinksCall(Call):
    operands = named(
        nearest=Numbers("int32", "kv_heads queries wanted", "tokens", least=-1),
        links=Operand("int32", "kv_heads tokens degree"),
    )
    _fields_ = layout(operands, "kv_heads queries wanted tokens degree")


class FillCall(Call):
    operands = named(
        k=KEYS,
        v=Operand("type", "N kv_heads page_size dim", optional=True, strides=3),
        summaries=Operand("type", "N kv_heads 4 dim", strides=3),
        levels=Operand("int32", "N kv_heads words page_size", optional=True, strides=3),
        bounds=Operand("int8", "N kv_heads 2 dim", optional=True, strides=3),
        scales=Operand("float32", "N kv_heads 2", optional=True, strides=2),
        frames=Numbers("int64", "filled", "N"),
    )
    rules = ("page_size > 0", "bits in (0, 2, 4)", "words * 32 >= dim * bits")
    _fields_ = layout(operands, "filled kv_heads dim page_size words bits type")


class AdmitCall(Call):
    operands = named(
        where=Operand("int32", "kv_heads count"),
        owner=Numbers("int32", "kv_heads capacity", "count", least=-1),
        used=Operand("int32", "kv_heads capacity"),
        frames=Numbers("int32", "rows kv_heads max_pages", "count", strides=3),
        pages=Numbers("int32", "rows lists pages_per_list", "max_pages", least=-1, strides=3),
        loads=Operand("int32", "kv_heads width"),
        slots=Operand("int32", "kv_heads width"),
        found=Operand("int64", "kv_heads 3"),
        table=Operand("int32", "rows kv_heads max_pages"),
    )
    rules = (
        "kv_heads > 0",
        "lists % kv_heads == 0",
        "width >= capacity or width >= rows * lists // kv_heads * pages_per_list",
    )
    signed = ("before",)
    _fields_ = layout(operands, "count capacity rows kv_heads lists pages_per_list width max_pages now before")


class ReadCall(Call):
    operands = named(
        pool=Operand("bytes", "C kv_heads piece_bytes"),
        loads=Operand("int32", "kv_heads width"),
        slots=Numbers("int32", "kv_heads width", "C", least=-1),
    )
    rules = ("extent > 0",)
    _fields_ = layout(operands, "kv_heads width file extent extent_bytes layer_offset piece_bytes error")


STRUCTURES: tuple[type[Call], ...] = (
    *(AttentionCall, Matrix, LinearCall, LayerInCall, LayerOutCall, ScoresCall, PagesCall, TopCall, SteadyCall),
    *(ClusterCall, ProbeCall, GraphSearchCall, GraphNearestCall, GraphLinksCall, FillCall, AdmitCall, ReadCall),
)
"""In the order of abi.h."""


def layouts() -> list[int]:
    """Size, and offset of the last field, of each structure, in the form of `keysift_layouts`."""
    return [
        number for kind in STRUCTURES for number in (ctypes.sizeof(kind), getattr(kind, kind._fields_[-1][0]).offset)
    ]
