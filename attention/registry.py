"""Strategies by name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from .strategy import LARGEST, Split, Strategy, validators

BUILT_IN = {
    "ashape": "keysift.attention.strategies.ashape:AShape",
    "dense": "keysift.attention.strategy:Dense",
    "flexprefill": "keysift.attention.strategies.flexprefill:FlexPrefill",
    "infllmv2": "keysift.attention.strategies.infllmv2:InfLLMv2",
    "minference": "keysift.attention.strategies.minference:MInference",
    "nosa": "keysift.attention.strategies.nosa:Nosa",
    "nosa-trained": "keysift.attention.strategies.nosa_trained:NosaTrained",
    "oracle": "keysift.attention.strategies.oracle:Oracle",
    "quest": "keysift.attention.strategies.quest:Quest",
    "retrieval": "keysift.attention.strategies.retrieval:Retrieval",
    "sampleattention": "keysift.attention.strategies.sampleattention:SampleAttention",
    "sift": "keysift.attention.strategies.sift:Sift",
    "streaming": "keysift.attention.strategies.streaming:Streaming",
    "topk": "keysift.attention.strategies.topk:TopK",
    "xattention": "keysift.attention.strategies.xattention:XAttention",
}
DEFAULT = "sift+retrieval"
"""The strategy of an engine by default: of all, it loses least for what it reads (benchmarks/README.md)."""
GROUP = "keysift.strategies"
"""Entry points of plug-ins."""
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum")
"""Keywords of JSON Schema."""


class StrategyError(ValueError):
    """Unknown strategy or option, or a value out of its bounds."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Option(NamedTuple):
    """One option of a strategy."""

    name: str
    type: str
    """In JSON Schema's words: integer, number, boolean, string."""
    default: object
    """None: the option is required."""
    bounds: dict[str, Any]
    """By JSON Schema's keywords: minimum, maximum, enum."""
    description: str


def known() -> dict[str, type[Strategy]]:
    """Every strategy by name: the built-in ones, and plug-ins under the entry points ``keysift.strategies``."""
    plugins = {entry.name: entry.load() for entry in entry_points(group=GROUP)}
    return {name: _load(target) for name, target in BUILT_IN.items()} | plugins


def make(name: str, **fields: object) -> Strategy:
    """The strategy `name` with these options; ``"A+B"`` takes A for the prompt and B for the tokens.

    Options of a pair, or options that come from text, may be spelt ``A.field``: ``make("a+b", **{"b.window": "512"})``.
    An option of a pair without such a prefix is that of every part that has one of this name.

    Raises:
        StrategyError: names the unknown strategy or option and lists the known ones.
    """
    prompt, plus, token = name.partition("+")
    _check_prefixes(name, fields)
    if not plus:
        return _make_one(name, fields)
    parts = [_make_one(part, _of_part(part, (prompt, token), fields)) for part in (prompt, token)]
    return Split(prompt=parts[0], token=parts[1])


def parse(name: str, arguments: Iterable[str] = ()) -> Strategy:
    """`make` with options as a command line spells them: ``["streaming.window=512"]``."""
    fields = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise StrategyError("strategy_args", f"NAME.FIELD=VALUE expected, got {argument!r}")
        fields[key.strip()] = value.strip()
    return make(name, **fields)


def options(strategy: type[Strategy]) -> list[Option]:
    """All options of a strategy, those of its bases first."""
    return [_option(strategy, field) for field in dataclasses.fields(strategy) if field.init]


def has_option(name: str, field: str) -> bool:
    """True if a strategy, or a part of a pair, has this option. Raises `StrategyError` for an unknown name."""
    return any(field in _fields(find(part)) for part in name.split("+"))


def trained_options(name: str, stated: Mapping[str, object]) -> dict[str, object]:
    """Options of a strategy from what a model's configuration holds under its `config_key`.

    Raises `StrategyError` naming an entry that is not supported.
    """
    try:
        return find(name).from_config(stated)
    except ValueError as error:
        raise StrategyError(f"strategy {name}", str(error)) from None


def _option(strategy: type[Strategy], field: dataclasses.Field[Any]) -> Option:
    schema = _schema(validators(strategy)[field.name])
    bounds = {key: bound for key in BOUNDS if (bound := schema.get(key)) not in (None, math.inf, -math.inf)}
    kind = schema.get("type") or str(field.type)
    return Option(field.name, kind, _default(field), bounds, _description(strategy, field.name))


def _schema(check: TypeAdapter[object]) -> dict[str, Any]:
    try:
        return check.json_schema()
    except PydanticUserError:  # a plug-in's type that JSON Schema has no word for
        return {}


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _description(strategy: type[Strategy], name: str) -> str:
    """The description of the nearest class that has one: a subclass may change nothing but the default."""
    stated = (getattr(base, "__dataclass_fields__", {}).get(name) for base in strategy.__mro__)
    return next((field.metadata["description"] for field in stated if field and field.metadata), "")


def _check_prefixes(name: str, fields: dict[str, object]) -> None:
    parts = name.split("+")
    for key in fields:
        prefix, dot, _ = key.rpartition(".")
        if dot and prefix not in parts:
            raise StrategyError(key, f"belongs to {prefix!r}, but the strategy is {name!r}")


def _of_part(name: str, parts: tuple[str, str], fields: dict[str, object]) -> dict[str, object]:
    """The options, except those without a prefix that only the other part of a pair has or had."""
    others = {field for part in parts for field in _names(find(part))} - _names(find(name))
    return {key: value for key, value in fields.items() if key not in others}


def _make_one(name: str, fields: dict[str, object]) -> Strategy:
    strategy = find(name)
    own = {key.rpartition(".")[2]: value for key, value in fields.items() if key.rpartition(".")[0] in ("", name)}
    values: dict[str, Any] = {key: _coerce(name, key, value) for key, value in own.items()}
    try:
        made = strategy(**values)
        hash(made)  # batches are grouped by it
        return made
    except (TypeError, ValueError) as error:
        raise StrategyError(f"strategy {name}", str(error)) from None


def _fields(strategy: type[Strategy]) -> set[str]:
    return {field.name for field in dataclasses.fields(strategy)}


def _names(strategy: type[Strategy]) -> set[str]:
    return _fields(strategy) | set(strategy.removed)


@functools.cache
def find(name: str) -> type[Strategy]:
    """The class of one strategy, not of a pair. Raises `StrategyError` listing the known ones."""
    if name in BUILT_IN:
        return _load(BUILT_IN[name])
    plugins = entry_points(group=GROUP)
    if name in plugins.names:
        plugin: type[Strategy] = plugins[name].load()
        return plugin
    names = sorted({*BUILT_IN, *plugins.names})
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise StrategyError("strategy", f"unknown {name!r}{hint} (known: {', '.join(names)}, or PROMPT+TOKEN)")


def _coerce(name: str, key: str, value: object) -> object:
    strategy = find(name)
    if (instead := strategy.removed.get(key)) is not None:
        raise StrategyError(f"{name}.{key}", f"removed: {instead}")
    if key not in (checks := validators(strategy)):
        raise StrategyError(f"{name}.{key}", f"no such option (known: {', '.join(sorted(checks))})")
    try:
        coerced: object = checks[key].validate_python(value)
    except ValidationError as error:
        raise StrategyError(f"{name}.{key}", f"{error.errors()[0]['msg']}, got {str(value)[:40]!r}") from None
    if isinstance(coerced, int) and abs(coerced) > LARGEST:  # a plug-in's option that states no bounds
        raise StrategyError(f"{name}.{key}", f"at most {LARGEST}, got {str(value)[:40]}")
    return coerced


def _load(target: str) -> type[Strategy]:
    module, _, attribute = target.partition(":")
    strategy: type[Strategy] = getattr(importlib.import_module(module), attribute)
    return strategy
