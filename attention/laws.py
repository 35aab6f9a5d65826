"""Laws of a selection: shapes, dtypes and page numbers, checked where nothing else vouches for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from keysift.kvcache import Context, Evidence, Phase, Selection, Step
from keysift.kvcache.native import checks
from keysift.kvcache.selection import UNMEASURED

from .strategy import Strategy

OWN = "keysift."
"""Begin of the names of modules whose strategies the tests, which run in checked mode, hold to the laws."""
LISTS = ("pages", "estimated", "prefetch")
"""Fields of a selection that list pages."""


def check(strategy: Strategy) -> Callable[[object, Tensor, Context], None]:
    """Check of what a strategy returns for queries q in a context: all laws in checked mode.

    Else of a plug-in what is cheap: shapes, dtypes, and the range of page numbers, as others would make an op read
    foreign memory. Checks of our own strategies, a few microseconds for every layer of every token, found nothing.
    """
    ours = type(strategy).__module__.startswith(OWN)

    def lawful(selection: object, q: Tensor, context: Context) -> None:
        if checks.mode.on:
            check_laws(selection, q, context)
        elif not ours:
            check_ranges(selection, q, context)

    return lawful


def check_laws(selection: object, q: Tensor, context: Context) -> None:
    """Raises `TypeError` or `ValueError` for a selection that breaks any law; waits for the device."""
    check_shapes(selection, q, context)
    assert isinstance(selection, Selection)
    check_pages(selection, context.step)


def check_ranges(selection: object, q: Tensor, context: Context) -> None:
    """Shapes as `check_shapes`, and page numbers out of range on a CPU; on a GPU the host would wait for the answer."""
    check_shapes(selection, q, context)
    if not q.is_cpu:
        return
    for name in LISTS:
        if (pages := getattr(selection, name)) is not None and pages.numel():
            least, most = map(int, pages.aminmax())
            if least < -1 or most >= context.step.max_pages:
                raise ValueError(
                    f"{name}: page numbers out of range: from -1 to {context.step.max_pages - 1} are expected, "
                    f"got {least} to {most}"
                )


def check_shapes(selection: object, q: Tensor, context: Context) -> None:
    """Raises `TypeError` or `ValueError` for anything but a `Selection` of tensors that ops and telemetry take."""
    if not isinstance(selection, Selection):
        raise TypeError(f"a Selection is expected, got {type(selection).__name__}")
    rows, heads, lists = context.step.num_rows, q.shape[1], context.spec.num_kv_heads
    _check_tensor("pages", selection.pages, q, torch.int32, (rows, (lists, heads), None))
    for name in LISTS[1:]:
        if (pages := getattr(selection, name)) is not None:
            _check_tensor(name, pages, q, torch.int32, (rows, (lists, heads), None))
    if selection.evidence is not UNMEASURED:
        probes = rows if context.step.phase is Phase.DECODE else None
        _check_evidence(selection.evidence, q, rows, probes, lists)


def _check_evidence(evidence: Evidence, q: Tensor, rows: int, probes: int | None, lists: int) -> None:
    for name, values, dtype, shape in (
        ("coverage", evidence.coverage, torch.float32, (probes, q.shape[1])),
        ("widened", evidence.widened, torch.bool, (probes, q.shape[1])),
        ("dropped_bound", evidence.dropped_bound, torch.float32, (rows, q.shape[1])),
        ("overlap", evidence.overlap, torch.float32, (rows, lists)),
        ("bound_exceeded", evidence.bound_exceeded, torch.bool, (rows, lists)),
    ):
        if values is not None:
            _check_tensor(name, values, q, dtype, shape)


def check_masses(masses: object, q: Tensor, context: Context) -> None:
    """Raises `TypeError` or `ValueError` for anything but masses [R, Hq, F] fp32 on the device of q [R, Hq, D]."""
    _check_tensor("masses", masses, q, torch.float32, (*q.shape[:2], context.step.max_pages))


Shape = tuple[int | tuple[int, int] | None, ...]
"""Size of each axis: one, one of two, or any."""


def _check_tensor(name: str, values: object, q: Tensor, dtype: torch.dtype, shape: Shape) -> None:
    """Check for a tensor of this dtype and shape on the device of q."""
    if not isinstance(values, Tensor) or values.dtype is not dtype or values.device != q.device:
        raise TypeError(f"{name}: {dtype} on {q.device} is expected, got {_kind(values)}")
    if len(values.shape) != len(shape) or not all(map(_allows, shape, values.shape)):
        raise ValueError(f"{name}: [{', '.join(map(_spell, shape))}] is expected, got {list(values.shape)}")


def _allows(allowed: int | tuple[int, int] | None, size: int) -> bool:
    return size == allowed or allowed is None or (isinstance(allowed, tuple) and size in allowed)


def _spell(allowed: int | tuple[int, int] | None) -> str:
    return "any" if allowed is None else str(allowed) if isinstance(allowed, int) else " or ".join(map(str, allowed))


def _kind(value: object) -> str:
    return f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def check_pages(selection: Selection, step: Step) -> None:
    """Raises `ValueError` for page numbers that break a law of `Selection`; waits for the device."""
    _check_list("pages", selection.pages, step.last_pages)
    first = step.starts // step.page_size
    own = ((selection.pages >= first[:, None, None]).sum(-1) == (step.last_pages - first + 1)[:, None]).all(1)
    _check("pages", own, "the row's own pages are missing", selection.pages)
    for name in LISTS[1:]:
        if (pages := getattr(selection, name)) is not None:
            _check_list(name, pages, step.last_pages - 1 if name == "estimated" else step.last_pages)
            both = Selection(pages).mask(step.max_pages) & selection.mask(step.max_pages)
            _check(name, ~both.flatten(1).any(1), "pages that are chosen, too", pages)


def _check_list(name: str, pages: Tensor, most: Tensor) -> None:
    """Check that the pages [R, H, P] are ascending, unique, from 0 to each row's `most` [R], and -1 at the end."""
    within = (pages >= -1) & (pages <= most[:, None, None])
    _check(name, within.flatten(1).all(1), "page numbers out of range", pages)
    before, after = pages[..., :-1], pages[..., 1:]
    ascending = (after == -1) | ((before >= 0) & (after > before))
    _check(name, ascending.flatten(1).all(1), "page numbers that do not ascend, or -1 before the end", pages)


def _check(name: str, lawful: Tensor, problem: str, pages: Tensor) -> None:
    """Raises `ValueError` naming the first row [R] that is not lawful."""
    if not bool(lawful.all()):
        row = int((~lawful).int().argmax())
        raise ValueError(f"{name}: {problem} in row {row}, got {pages[row, :, :16].tolist()}")
