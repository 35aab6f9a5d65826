"""The shape of the house: imports point one way, packages are complete, the core names no strategy."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import architecture
from .architecture import AT_RUN_TIME, LAYERS, ROOT, SOURCES

GRAPH = architecture.import_graph()
NOT_SHIPPED = ("tests", "benchmarks", "tools", "docs", "examples")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_relative_inside_a_package_and_absolute_across(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert architecture.origin(node, path).startswith(f"keysift.{package}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                assert name.split(".")[0] not in LAYERS, f"{name} must be spelt keysift.{name}"
                assert name.split(".")[0] not in NOT_SHIPPED, f"{name} is not part of the package"
                assert not name.startswith(f"keysift.{package}"), f"{name}: inside a package relatively"


def test_no_import_runs_upwards() -> None:
    assert architecture.upward(GRAPH) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert architecture.circle(GRAPH) == []
    assert architecture.circle(architecture.rooms(GRAPH)) == []


@pytest.mark.parametrize("package", AT_RUN_TIME)
def test_a_package_that_works_loads_nothing_above_it(package: str) -> None:
    assert architecture.loaded_at_run_time(package) == []


def test_a_circle_and_an_upward_import_would_be_found() -> None:
    graph = {"keysift.kvcache.a": frozenset({"keysift.engine.b"}), "keysift.engine.b": frozenset({"keysift.kvcache.a"})}
    assert set(architecture.circle(graph)) == set(graph)
    assert architecture.upward(graph) == ["keysift.kvcache.a -> keysift.engine.b"]
    assert "keysift.kvcache.native.library" in GRAPH["keysift.kvcache.ops.summarize.native"]
    assert "keysift.kvcache.ops.page_masses.native" not in GRAPH["keysift.kvcache.ops.page_masses"]


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import keysift.engine.engine",
        "import importlib\nimportlib.import_module('keysift.engine.engine')",
        "__import__('keysift.engine.engine')",
        "from . import dispatch\n@dispatch.op(native='keysift.engine.engine:f')\ndef f(): ...",
    ],
)
def test_an_import_is_found_however_it_is_spelt(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(architecture, "ROOT", tmp_path)
    path = tmp_path / "kvcache" / "a.py"
    path.parent.mkdir()
    path.write_text(source)
    monkeypatch.setattr(architecture, "SOURCES", [path, tmp_path / "engine" / "engine.py"])
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "engine.py").write_text("")
    assert architecture.upward(architecture.import_graph()) == ["keysift.kvcache.a -> keysift.engine.engine"]


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
