"""Several strategies side by side, each with options of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Variant:
    """A strategy as it is asked for: ``sift+retrieval`` or ``sift+retrieval,sift.threshold=0.002``."""

    label: str
    name: str
    args: tuple[str, ...]


def variants(labels: Iterable[str], common: Iterable[str] = (), *, always_sparse: bool = False) -> tuple[Variant, ...]:
    """Each of them once, `dense` first whether it is asked for or not: it is what the others are compared with.

    An option goes with the name it belongs to, behind a comma; `common` ones, ``NAME.FIELD=VALUE``, go to every
    strategy that NAME is a part of. With `always_sparse` none of them reads everything where choosing would not pay,
    unless its options say so.
    """
    return tuple(_variant(label, tuple(common), always_sparse) for label in dict.fromkeys((DENSE, *labels)))


def _variant(label: str, common: tuple[str, ...], always_sparse: bool) -> Variant:
    name, *own = (part.strip() for part in label.split(","))
    parts = {name, *name.split("+")}
    options = [option for option in common if option.partition(".")[0] in parts] + own
    if always_sparse and not any("dense_below" in option for option in options):
        options.append("dense_below=0")
    return Variant(label, name, tuple(options))
