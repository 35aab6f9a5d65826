"""Strategies by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from keysift.kvcache import Phase

from . import plugins
from .failure import describe
from .strategy import LARGEST, Dense, Split, Strategy, validators

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
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum")
"""Keywords of JSON Schema."""
LONGEST = 64
"""Characters of a caller's text that are looked at, or repeated in an error."""


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
    """Every strategy by name: the built-in ones, and plug-ins under the entry points ``keysift.strategies``.

    Without plug-ins that cannot be used: see `broken`.
    """
    loaded = {name: plugins.load(entry, options) for name, entry in _plugins().items()}
    own = {name: _load(target) for name, target in BUILT_IN.items()}
    return own | {name: plugin for name, plugin in loaded.items() if not isinstance(plugin, str)}


def broken() -> dict[str, str]:
    """Plug-ins that cannot be used, each with the reason."""
    usable, found = _plugins(), {}
    for entry in plugins.entries():
        if usable.get(entry.name) is not entry:
            found[f"{entry.name} ({entry.value})"] = "its name is taken, or has a character of +.= or none at all"
        elif isinstance(problem := plugins.load(entry, options), str):
            found[entry.name] = problem
    return found


def _plugins() -> dict[str, EntryPoint]:
    """The plug-ins that can be named. Of equal names the first counts, and a built-in one before all."""
    entries = [entry for entry in plugins.entries() if entry.name and not set("+.=") & set(entry.name)]
    return {entry.name: entry for entry in reversed(entries) if entry.name not in BUILT_IN}


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
    _check_places(prompt, token, *parts)
    return Split(prompt=parts[0], token=parts[1])


def parse(name: str, arguments: Iterable[str] = ()) -> Strategy:
    """`make` with options as a command line spells them: ``["streaming.window=512"]``."""
    fields = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise StrategyError("strategy_args", f"NAME.FIELD=VALUE expected, got {_short(argument)}")
        fields[key.strip()] = value.strip()
    return make(name, **fields)


def options(strategy: type[Strategy]) -> list[Option]:
    """All options of a strategy, those of its bases first."""
    return [_option(strategy, field) for field in dataclasses.fields(strategy) if field.init]


def has_option(name: str, field: str) -> bool:
    """True if a strategy, or a part of a pair, has this option. Raises `StrategyError` for an unknown name."""
    prompt, plus, token = name.partition("+")
    return any(field in _fields(find(part)) for part in (prompt, token)[: 1 + bool(plus)])


def trained_options(name: str, stated: Mapping[str, object]) -> dict[str, object]:
    """Options of a strategy from what a model's configuration holds under its `config_key`.

    Raises `StrategyError` naming an entry that is not supported.
    """
    try:
        return find(name).from_config(stated)
    except StrategyError:
        raise
    except Exception as error:
        raise StrategyError(f"strategy {name}", _words(error)) from None


def _option(strategy: type[Strategy], field: dataclasses.Field[Any]) -> Option:
    schema = _schema(validators(strategy)[field.name])
    bounds = {key: bound for key in BOUNDS if (bound := schema.get(key)) not in (None, math.inf, -math.inf)}
    kind = schema.get("type") or str(field.type)
    return Option(field.name, kind, _default(field), bounds, _description(strategy, field.name))


def _schema(check: TypeAdapter[object]) -> dict[str, Any]:
    try:
        return check.json_schema()
    except Exception:  # a plug-in's type that JSON Schema has no word for
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
    prompt, _, token = name.partition("+")
    for key in fields:
        prefix, dot, _ = key.rpartition(".")
        if dot and prefix not in (prompt, token):
            raise StrategyError(key[:LONGEST], f"belongs to {_short(prefix)}, but the strategy is {_short(name)}")


def _check_places(first: str, second: str, prompt: Strategy, token: Strategy) -> None:
    """Raises `StrategyError` for a part that chooses in the other phase alone: it would read everything, in silence."""
    if _idle(prompt, Phase.PREFILL):
        right = "dense" if _idle(token, Phase.PREFILL) else second
        raise StrategyError("strategy", f"{first} chooses for generated tokens only; write {right}+{first}")
    if _idle(token, Phase.DECODE):
        right = "dense" if _idle(prompt, Phase.DECODE) else first
        raise StrategyError("strategy", f"{second} chooses for prompts only; write {second}+{right}")


def _idle(strategy: Strategy, phase: Phase) -> bool:
    """True for a strategy that leaves a phase to `Dense`, without being it."""
    return isinstance(strategy.part(phase), Dense) and not isinstance(strategy, Dense)


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
    except (Exception, SystemExit) as error:
        raise StrategyError(f"strategy {name}", _words(error)) from None
    if problem := plugins.fault_of(made):
        raise StrategyError(f"strategy {name}", problem)
    return made


def _words(error: BaseException) -> str:
    """Text of an error; with its class, if it is not of those that name an option."""
    return str(error) if isinstance(error, TypeError | ValueError) else describe(error)


def _fields(strategy: type[Strategy]) -> set[str]:
    return {field.name for field in dataclasses.fields(strategy)}


def _names(strategy: type[Strategy]) -> set[str]:
    return _fields(strategy) | set(strategy.removed)


def find(name: str) -> type[Strategy]:
    """The class of one strategy, not of a pair. Raises `StrategyError` listing the known ones."""
    if name in BUILT_IN:
        return _load(BUILT_IN[name])
    if (entry := (found := _plugins()).get(name)) is not None:
        if isinstance(plugin := plugins.load(entry, options), str):
            raise StrategyError("strategy", f"{name!r} is broken: {plugin}")
        return plugin
    names = sorted({*BUILT_IN, *found})
    near = difflib.get_close_matches(name[:LONGEST], names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise StrategyError("strategy", f"unknown {_short(name)}{hint} (known: {', '.join(names)}, or PROMPT+TOKEN)")


def _short(text: str) -> str:
    return repr(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")


def _coerce(name: str, key: str, value: object) -> object:
    strategy = find(name)
    if (instead := strategy.removed.get(key)) is not None:
        raise StrategyError(f"{name}.{key}", f"removed: {instead}")
    if key not in (checks := validators(strategy)):
        raise StrategyError(f"{name}.{key[:LONGEST]}", f"no such option (known: {', '.join(sorted(checks))})")
    try:
        coerced: object = checks[key].validate_python(value)
    except ValidationError as error:
        raise StrategyError(f"{name}.{key}", f"{error.errors()[0]['msg']}, got {str(value)[:40]!r}") from None
    if isinstance(coerced, int) and abs(coerced) > LARGEST:  # a plug-in's option that states no bounds
        raise StrategyError(f"{name}.{key}", f"at most {LARGEST}, got {str(value)[:40]}")
    if coerced != coerced:
        raise StrategyError(f"{name}.{key}", f"a number, got {coerced}")
    return coerced


def _load(target: str) -> type[Strategy]:
    module, _, attribute = target.partition(":")
    strategy: type[Strategy] = getattr(importlib.import_module(module), attribute)
    return strategy
