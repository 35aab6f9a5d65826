"""The shape of the house: imports point one way, packages are complete, the core names no strategy."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LAYERS = ["kvcache", "attention", "engine", "server"]
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py")) if "_pb2" not in path.name]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(ROOT).parts) - 1
            assert node.level <= depth, f"{path.relative_to(ROOT)} leaves its package with a relative import"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    for module in imports(path):
        head, _, rest = module.partition(".")
        assert head not in LAYERS, f"{module} must be spelt keysift.{module}"
        if head == "keysift":
            assert LAYERS.index(rest.split(".")[0]) < layer, (
                f"{module}: across packages only downwards, inside one relatively"
            )


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "keysift." + ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"
    }
    assert listed == found


def test_the_core_names_no_strategy() -> None:
    """Only the registry and the strategies themselves know a method's name; `dense` is the base, not a method."""
    methods = {path.stem for path in (ROOT / "attention" / "strategies").glob("*.py")} - {"__init__"}
    assert methods
    for path in SOURCES:
        if path.parent.name != "strategies" and path.name != "registry.py":
            named = methods & {word.lower() for word in words(ast.parse(path.read_text()))}
            assert not named, f"{path.relative_to(ROOT)} names {named}"


def words(tree: ast.AST) -> Iterator[str]:
    """Names, attributes but for those of torch's tensors, and string constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and not hasattr(torch.Tensor, node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
