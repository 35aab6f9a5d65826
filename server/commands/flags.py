"""Command line flags made from the fields of configuration models, and the file behind ``--config``."""

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

Command = Callable[..., None]
PREFIX = "KEYSIFT_"
PLAIN = (int, float, str, Path)
WITH_SPACES = ("stop_strings",)
"""Lists that a variable holds one value of; others are split at spaces."""
FORMER = {"kv_offload": "kv_home", "kv_offload_memory": "kv_home_memory"}
"""Names of fields before 0.1.0, which flags, variables and configuration files may still use until 0.2.0."""


PROBLEM = "keysift.config"


def from_fields(
    *, skip: Collection[str] = (), later: Collection[str] = (), **models: type[BaseModel]
) -> Callable[[Command], Command]:
    """Gives a command one flag for each field of `models`, and hands it the models themselves under these names.

    `skip` leaves out fields, spelled ``name.field``. A value comes from the command line, else from
    ``KEYSIFT_<FIELD>``, else from ``--config``, else from the field's default. Of a model that is in `later` the
    command gets a function that makes it: nothing looks at these values before it is called. It has no switches and no
    lists.
    """
    names = {name: [key for key in models[name].model_fields if f"{name}.{key}" not in skip] for name in models}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            fields = {name: {key: values.pop(key) for key in keys} for name, keys in names.items()}
            for name, model in models.items():
                _refuse_empty_secrets(model, fields[name])
            made: dict[str, Any] = {name: functools.partial(model, **fields[name]) for name, model in models.items()}
            command(**{name: make if name in later else make() for name, make in made.items()}, **values)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in models]
        made = [_parameter(name, models[name], key, name in later) for name, keys in names.items() for key in keys]
        _set_signature(run, [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*made, *own)])
        run.__doc__ = _flowing(command)
        return run

    return decorate


def _refuse_empty_secrets(model: type[BaseModel], values: Mapping[str, Any]) -> None:
    """An empty variable counts as not set, which would open the door that a secret is to close."""
    for name, value in values.items():
        secret = SecretStr in get_args(model.model_fields[name].annotation)
        if secret and value is None and os.environ.get(PREFIX + name.upper()) == "":
            raise InvalidRequest(name, f"{PREFIX}{name.upper()} is set but empty; unset it or give it a value")


def _set_signature(command: Command, parameters: list[inspect.Parameter]) -> None:
    """What typer reads instead of the code: it looks at both places."""
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _flowing(command: Command) -> str:
    """The docstring with one line for each paragraph: the help would keep the others' ends, however wide it is."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")


def _parameter(panel: str, model: type[BaseModel], name: str, as_text: bool) -> inspect.Parameter:
    field = model.model_fields[name]
    # `read_config` looks for lists itself: the command line's library splits every list at its spaces.
    names = (name, FORMER[name]) if name in FORMER else (name,)
    variable = None if _repeats(field) else [PREFIX + each.upper() for each in names]
    common: dict[str, Any] = {"help": field.description or "", "envvar": variable, "show_envvar": False}
    kind, default_value = _type(field), _default(field)
    if as_text:
        common["metavar"] = _metavar(kind)
        kind, default_value = str | None, None if default_value is None else str(default_value)
    if name == "model":
        default = typer.Argument(default_value, **{**common, "metavar": "MODEL"})
    else:
        default = typer.Option(
            default_value,
            *(flag for each in names for flag in _flags(each, field)),
            rich_help_panel=panel.capitalize(),
            **common,
        )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _metavar(kind: Any) -> str:
    """How the help spells a type that the command line does not check."""
    if get_origin(kind) is Literal:
        return f"<{'|'.join(get_args(kind))}>"
    return f"<{next(a for a in (*get_args(kind), kind) if a is not type(None)).__name__}>"


def _flags(name: str, field: FieldInfo) -> list[str]:
    flag = name.replace("_", "-")
    if field.annotation is bool:
        return [f"--{flag}/--no-{flag}"]
    return list(dict.fromkeys([f"--{_singular(flag)}", f"--{flag}"])) if _repeats(field) else [f"--{flag}"]


def _singular(flag: str) -> str:
    return f"{flag.removesuffix('ies')}y" if flag.endswith("ies") else flag.removesuffix("s")


def _type(field: FieldInfo) -> Any:
    """The field's type as far as the command line checks it; the model checks the rest."""
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
    """Makes the file's values the defaults of the other flags; a key that no command knows is an error."""
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


def read_config_later(context: typer.Context, path: Path | None) -> Path | None:
    """As `read_config`, but what is wrong with the file is an error only once `refuse_config` is called."""
    try:
        return read_config(context, path)
    except typer.BadParameter as error:
        context.meta[PROBLEM] = error
        return path


def refuse_config(context: typer.Context) -> None:
    if (problem := context.meta.get(PROBLEM)) is not None:
        raise problem


def given(context: typer.Context, names: Collection[str]) -> list[str]:
    """Those of the parameters `names` that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return sorted(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def _spellings(parameter: Any) -> list[str]:
    """The field's name and the flag's own, which is singular where it repeats."""
    flags = {flag[2:].replace("-", "_") for flag in parameter.opts if flag.startswith("--")}
    return sorted(flags | {str(parameter.name)})


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
