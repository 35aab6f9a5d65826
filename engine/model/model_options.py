"""Options of a strategy that the model was trained with, as its configuration states them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields

from keysift.attention import find

from ..errors import Unsupported
from .loaded import LoadedModel


def with_model_options(strategy: str, arguments: Iterable[str], model: LoadedModel) -> tuple[str, ...]:
    """The arguments, with those options of each part that the model's configuration states and they do not.

    Raises `Unsupported` naming options of the configuration that the part does not know, and `StrategyError` for a
    strategy that there is not.
    """
    given = tuple(arguments)
    names = {argument.partition("=")[0].strip() for argument in given}
    stated = [
        f"{part}.{key}={json.dumps(value)}"
        for part in dict.fromkeys(strategy.split("+"))
        for key, value in _options(part, model).items()
        if not names & {key, f"{part}.{key}"}
    ]
    return (*given, *stated)


def _options(part: str, model: LoadedModel) -> Mapping[str, object]:
    """What the model's configuration states for one strategy."""
    kind, text = find(part), model.module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    options = getattr(text, kind.config_key, None) if kind.config_key else None
    if not options:
        return {}
    if unknown := sorted(set(options) - {field.name for field in fields(kind)}):
        raise Unsupported(f"{model.name}: its {kind.config_key} has {', '.join(unknown)}, unknown to {part}")
    return options  # type: ignore[no-any-return]
