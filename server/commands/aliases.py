"""Former spellings of commands and fields, accepted until 0.2.0 and hidden from the help."""

from __future__ import annotations

from keysift.engine.errors import InvalidRequest

from .progress import report

FORMER_FIELDS = {"kv_offload": "kv_home", "kv_offload_memory": "kv_home_memory"}
"""Field -> its former name, as a flag, an environment variable and a key of a configuration file."""
FORMER_FLAGS = {f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-") for new, old in FORMER_FIELDS.items()}


def current(arguments: list[str]) -> list[str]:
    """Arguments of the command line in the current spelling, with one line on standard error for each former one."""
    match [_current_flag(argument) for argument in arguments]:
        case ["doctor", *rest] if "--forget" in rest:
            return _renamed("keysift doctor --forget", "keysift calibrate --forget", ["calibrate", *_forget(rest)])
        case ["doctor", *rest] if "--calibrate" in rest:
            return _renamed("keysift doctor --calibrate", "keysift calibrate", ["calibrate", *_calibrate(rest)])
        case ["profile", *rest] if any(argument.partition("=")[0] == "--address" for argument in rest):
            return _renamed("keysift profile --address", "keysift load", ["load", *rest])
        case flags:
            return flags


def _current_flag(argument: str) -> str:
    """Argument with the current name in place of a former flag."""
    name, equals, value = argument.partition("=")
    if name not in FORMER_FLAGS:
        return argument
    (renamed,) = _renamed(name, FORMER_FLAGS[name], [FORMER_FLAGS[name] + equals + value])
    return renamed


def _renamed(old: str, new: str, arguments: list[str]) -> list[str]:
    report(f"keysift: {old} is now {new}; the old spelling goes away in 0.2.0")
    return arguments


def _calibrate(arguments: list[str]) -> list[str]:
    """Arguments of `calibrate`: without ``--calibrate``, and with the value of ``--model`` alone."""
    kept = (argument.removeprefix("--model=") for argument in arguments)
    return [argument for argument in kept if argument not in ("--calibrate", "--model")]


def _forget(arguments: list[str]) -> list[str]:
    if "--calibrate" in arguments:
        raise InvalidRequest("forget", "either --calibrate or --forget, got both")
    return arguments
