"""Version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def keysift_version() -> str:
    """Version of the package, or "unknown" in a source tree that is not installed."""
    try:
        return version("keysift")
    except PackageNotFoundError:
        return "unknown"
