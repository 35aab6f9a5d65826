"""Strategy options that a model's configuration states, because the model was trained with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields

from keysift.attention import find
from keysift.attention.registry import trained_options

from ..errors import Unsupported
from .loaded import LoadedModel


def with_model_options(strategy: str, arguments: Iterable[str], model: LoadedModel) -> tuple[str, ...]:
    """The arguments, completed by the options of each part that the model's configuration states.

    Raises `Unsupported` naming options of the configuration that the strategy does not have, and `StrategyError` for an
    unknown strategy.
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
    """Options that the model's configuration states for one strategy."""
    kind, text = find(part), model.module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    stated = getattr(text, kind.config_key, None) if kind.config_key else None
    if not stated:
        return {}
    options = trained_options(part, stated)
    if unknown := sorted(set(options) - {field.name for field in fields(kind)}):
        raise Unsupported(f"{model.name}: its {kind.config_key} has {', '.join(unknown)}, unknown to {part}")
    return options
