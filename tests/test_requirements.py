"""The locks in requirements/: whole, hashed, without an address, and as pyproject.toml asks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PYTHONS = ("3.11", "3.12", "3.13")


def pins(lock: Path) -> list[Requirement]:
    lines = re.findall(r"^([A-Za-z0-9][^\\\n]*?)\s*\\?$", lock.read_text(), re.MULTILINE)
    return [Requirement(line) for line in lines]


def locked(name: str, python: str) -> dict[str, SpecifierSet]:
    """Each package that the lock `name` installs on Linux x86-64 under that Python, with its version."""
    here = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": "linux",
            "platform_machine": "x86_64", "platform_python_implementation": "CPython"}  # fmt: skip
    found = [pin for pin in pins(ROOT / "requirements" / f"{name}.txt") if not pin.marker or pin.marker.evaluate(here)]
    names = [pin.name for pin in found]
    assert len(names) == len(set(names)), "a package with two versions under one Python"
    return {pin.name: pin.specifier for pin in found}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_package_has_one_version_and_hashes_but_torch(lock: Path) -> None:
    text = lock.read_text()
    for pin in pins(lock):
        assert re.fullmatch(r"==[\w.!]+", str(pin.specifier)), pin
        entry = re.search(
            rf"^{re.escape(pin.name)}=={re.escape(str(pin.specifier)[2:])}\b.*\n(.*)$", text, re.MULTILINE
        )
        assert entry
        assert ("--hash=sha256:" in entry[1]) == (pin.name != "torch"), pin


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_names_no_address_and_no_path(lock: Path) -> None:
    assert not re.search(r"https?:|file:|--(extra-)?index-url|--find-links|(?<![\w.-])/\w", lock.read_text())


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("name", "asked"),
    [("run", []), ("dev", [*EXTRAS["dev"], *EXTRAS["docs"], *EXTRAS["triton"]]), ("bench", EXTRAS["bench"])],
    ids=["run", "dev", "bench"],
)
def test_a_lock_meets_what_pyproject_asks_for(name: str, asked: list[str], python: str) -> None:
    versions = locked(name, python)
    for requirement in map(Requirement, [*PROJECT["project"]["dependencies"], *asked]):
        pinned = str(versions[canonicalize_name(requirement.name)])[2:]
        assert requirement.specifier.contains(pinned), f"{requirement} is locked as {pinned}: make lock"


def test_the_installer_is_the_same_on_every_system() -> None:
    """A marker that leaves it out is no error to pip; the next step then finds no uv."""
    assert [pin.marker for pin in pins(ROOT / "requirements" / "uv.txt")] == [None]


def test_settings_of_the_lock_are_not_those_of_users() -> None:
    """In pyproject.toml they would count for every `uv` command in a checkout: a CUDA torch without its libraries."""
    assert "uv" not in PROJECT["tool"]


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_served_is_what_is_tested(python: str) -> None:
    """The image's packages, and those of the benchmarks, have the versions of the tests."""
    tested = locked("dev", python)
    for name in ("run", "bench"):
        for package, version in locked(name, python).items():
            assert tested.get(package, version) == version
