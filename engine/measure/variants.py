"""Several strategies side by side, each with options of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InvalidRequest

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Variant:
    """A strategy as it is asked for: ``sift+retrieval`` or ``sift+retrieval,sift.threshold=0.002``."""

    label: str
    name: str
    args: tuple[str, ...]


def variants(labels: Iterable[str], common: Iterable[str] = (), *, always_sparse: bool = False) -> tuple[Variant, ...]:
    """Each of them once, `dense` first whether it is asked for or not: it is what the others are compared with.

    An option goes with the name it belongs to, behind a comma. `common` ones go to every strategy that NAME is a part
    of, ``NAME.FIELD=VALUE``, or that has the field, ``FIELD=VALUE``. With `always_sparse` none of them reads everything
    where choosing would not pay, unless its options say so. Raises `InvalidRequest` for an option that is nobody's.
    """
    names, options = tuple(dict.fromkeys((DENSE, *labels))), tuple(common)
    for option in options:
        if not any(_belongs(option, _words(label)[0]) for label in names):
            known = ", ".join(_words(label)[0] for label in names)
            raise InvalidRequest("strategy_args", f"an option of one of {known}, got {option!r}")
    return tuple(_variant(label, options, always_sparse) for label in names)


def _variant(label: str, common: tuple[str, ...], always_sparse: bool) -> Variant:
    name, *own = _words(label)
    options = [option for option in common if _belongs(option, name)] + own
    if always_sparse and not any("dense_below" in option for option in options):
        options.append("dense_below=0")
    return Variant(label, name, tuple(options))


def _words(label: str) -> list[str]:
    return [part.strip() for part in label.split(",")]


def _belongs(option: str, name: str) -> bool:
    """Whether an option is one of the strategy's."""
    prefix, dot, field = option.partition("=")[0].strip().rpartition(".")
    if dot:
        return prefix in name.split("+")
    from keysift.attention.registry import StrategyError, has_option

    try:
        return has_option(name, field)
    except StrategyError as error:
        raise InvalidRequest(error.field, error.problem) from None
