"""Strategies to compare, each with its options."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InvalidRequest

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Variant:
    """A strategy and its options, parsed from a label such as ``sift+retrieval,sift.threshold=0.002``."""

    label: str
    name: str
    args: tuple[str, ...]


def variants(labels: Iterable[str], common: Iterable[str] = (), *, always_sparse: bool = False) -> tuple[Variant, ...]:
    """Distinct variants of the labels, `dense` first: it is always included, as the others are compared with it.

    Options follow a strategy's name after commas.

    Args:
        common: ``NAME.FIELD=VALUE`` for strategies with the part NAME, ``FIELD=VALUE`` for those that have the field.
        always_sparse: let strategies choose at every length, unless their options set `dense_below`.

    Raises:
        InvalidRequest: an option fits none of the strategies.
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
    """True if the strategy has this option."""
    prefix, dot, field = option.partition("=")[0].strip().rpartition(".")
    if dot:
        return prefix in name.split("+")
    from keysift.attention.registry import StrategyError, has_option

    try:
        return has_option(name, field)
    except StrategyError as error:
        raise InvalidRequest(error.field, error.problem) from None
