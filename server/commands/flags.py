"""Command line flags from the fields of configuration models, and the file of ``--config``."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel, ByteSize, SecretStr
from pydantic.fields import FieldInfo

from keysift.engine.errors import InvalidRequest

from .aliases import FORMER_FIELDS

Command = Callable[..., None]
PREFIX = "KEYSIFT_"
PLAIN = (int, float, str, Path)
WITH_SPACES = ("stop_strings",)
"""Lists whose environment variable is one value; the others are split at spaces."""


def from_fields(*, skip: Collection[str] = (), **models: type[BaseModel]) -> Callable[[Command], Command]:
    """Decorator: one flag of a command for each field of `models`; the command gets the models under these names.

    `skip` leaves out fields, spelled ``name.field``. A value comes from the command line, else from
    ``KEYSIFT_<FIELD>``, else from ``--config``, else from the field's default.
    """
    names = {name: [key for key in models[name].model_fields if f"{name}.{key}" not in skip] for name in models}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            fields = {name: {key: values.pop(key) for key in keys} for name, keys in names.items()}
            for name, model in models.items():
                _refuse_empty_secrets(model, fields[name])
            command(**{name: model(**fields[name]) for name, model in models.items()}, **values)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in models]
        made = [_parameter(name, models[name].model_fields[key], key) for name, keys in names.items() for key in keys]
        _set_signature(run, [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*made, *own)])
        run.__doc__ = _flowing(command)
        return run

    return decorate


def _refuse_empty_secrets(model: type[BaseModel], values: Mapping[str, Any]) -> None:
    """Refuse an empty variable of a secret, which would count as not set and leave the server open."""
    for name, value in values.items():
        secret = SecretStr in get_args(model.model_fields[name].annotation)
        if secret and value is None and os.environ.get(PREFIX + name.upper()) == "":
            raise InvalidRequest(name, f"{PREFIX}{name.upper()} is set but empty; unset it or give it a value")


def _set_signature(command: Command, parameters: list[inspect.Parameter]) -> None:
    """Set the parameters that typer sees instead of those of the code, in the two attributes that it reads."""
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _flowing(command: Command) -> str:
    """Docstring with one line for each paragraph; the help would keep other line ends at every width."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")


def _parameter(panel: str, field: FieldInfo, name: str) -> inspect.Parameter:
    # `read_config` reads variables of lists: typer would split every list at its spaces.
    names = (name, FORMER_FIELDS[name]) if name in FORMER_FIELDS else (name,)
    variables = None if _repeats(field) else [PREFIX + each.upper() for each in names]
    common: dict[str, Any] = {"help": field.description or "", "envvar": variables, "show_envvar": False}
    if name == "model":
        default = typer.Argument(_default(field), metavar="MODEL", **common)
    else:
        default = typer.Option(_default(field), *_flags(name, field), rich_help_panel=panel.capitalize(), **common)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_type(field))


def flag(name: str) -> str:
    """Flag of a field."""
    return "--" + name.replace("_", "-")


def _flags(name: str, field: FieldInfo) -> list[str]:
    if field.annotation is bool:
        return [f"{flag(name)}/{flag('no-' + name)}"]
    return list(dict.fromkeys([flag(_singular(name)), flag(name)])) if _repeats(field) else [flag(name)]


def _singular(name: str) -> str:
    return f"{name.removesuffix('ies')}y" if name.endswith("ies") else name.removesuffix("s")


def _type(field: FieldInfo) -> Any:
    """Type that the command line checks; the model checks the rest."""
    inner = next(a for a in (*get_args(field.annotation), field.annotation) if a is not type(None))
    if field.annotation is bool or get_origin(field.annotation) is Literal:
        return field.annotation
    if _repeats(field):
        return list[str]
    plain = inner if inner in PLAIN else str
    return plain | None if field.default is None else plain


def _repeats(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _default(field: FieldInfo) -> Any:
    if isinstance(field.default, ByteSize):
        return field.default.human_readable()
    if isinstance(field.default, SecretStr):
        return field.default.get_secret_value()
    return list(field.default) if isinstance(field.default, tuple) else field.default


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``: the file's values become the defaults of the other flags.

    Raises `typer.BadParameter` for a file that cannot be read and for a key that no command has.
    """
    parameters = context.command.params
    names = {spelling: parameter.name for parameter in parameters for spelling in _spellings(parameter)}
    lists = {parameter.name for parameter in parameters if getattr(parameter, "multiple", False)}
    found: dict[str, Any] = {}
    for key, value in (_read(path, context) if path else {}).items():
        if (name := names.get(key)) and value is not None:
            found[name] = [value] if name in lists and not isinstance(value, list) else value
    found |= {name: values for key, name in names.items() if name in lists and (values := _from_environment(key, name))}
    context.default_map = {**(context.default_map or {}), **found}
    return path


def given(context: typer.Context, names: Collection[str]) -> list[str]:
    """Those of the parameters `names` that are on the command line, sorted."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return sorted(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def _spellings(parameter: Any) -> list[str]:
    """Keys of a parameter in a file: its name, its flags, which are singular for a list, and its former name."""
    flags = {flag[2:].replace("-", "_") for flag in parameter.opts if flag.startswith("--")}
    former = {FORMER_FIELDS[name] for name in flags & set(FORMER_FIELDS)}
    return sorted(flags | former | {str(parameter.name)})


def _from_environment(key: str, name: str) -> list[str]:
    value = os.environ.get(PREFIX + key.upper(), "")
    return [value] if value and name in WITH_SPACES else value.split()


def _read(path: Path, context: typer.Context) -> dict[str, Any]:
    values = {str(key).replace("-", "_"): value for key, value in _load(path).items()}
    commands = getattr(context.find_root().command, "commands", {}).values()
    known = {s for command in (*commands, context.command) for p in command.params for s in _spellings(p)}
    for key in values:
        if key not in known:
            raise typer.BadParameter(f"unknown key {key!r} in {path} (known: {', '.join(sorted(known))})")
    return values


def _load(path: Path) -> Mapping[Any, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from None
    if not isinstance(values, Mapping | None):
        raise typer.BadParameter(f"{path}: keys and values expected, got {type(values).__name__}")
    return values or {}


Config = Annotated[
    Path | None,
    typer.Option(help="YAML file: flag names and values", envvar="KEYSIFT_CONFIG", is_eager=True, callback=read_config),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
