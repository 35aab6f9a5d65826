"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def keysift_version() -> str:
    try:
        return version("keysift")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
