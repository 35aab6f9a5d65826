"""The import graph of the product: ``python -m tests.architecture`` prints it, room by room and floor by floor.

A room is a file or a folder right inside a package. A twin that ``@op`` names as a string counts as an import, which it
becomes at the first call, unless it lies in the op's folder.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("kvcache", "attention", "engine", "server")
"""Each imports only those before it."""
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py")) if "_pb2" not in path.name]
Graph = Mapping[str, frozenset[str]]
"""module -> the modules that it imports"""

APPEND = """
import torch
from keysift.kvcache import CacheSpec, PagedCache, Span
spec = CacheSpec(num_layers=1, num_kv_heads=1, head_dim=16, dtype=torch.float32, code_bits=2)
cache = PagedCache(spec, 4, max_sequences=1, max_len=64)
sequence = cache.open()
cache.reserve(sequence, 32)
x = torch.randn(32, 1, 16)
step = cache.prefill(Span(sequence, 0, 32), 16)
cache.append(0, x, x, step)
"""
DECODE = """
from keysift.attention import bind, make
cache.reserve(sequence, 33)
attend = bind(make("dense+retrieval", sink=16, window=16, dense_below=0), cache, cache.decode([Span(sequence, 32, 1)]))
attend(0, x[:1], x[:1], x[:1])
"""
AT_RUN_TIME = {"kvcache": APPEND, "attention": APPEND + DECODE}
"""What a package does when it works: a full page is appended, a token is decoded, with every twin that there is."""


def module(path: Path) -> str:
    """Its dotted name."""
    parts = ("keysift", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def import_graph() -> Graph:
    """Every module of the product, and what it imports of the product, inside of functions and by ``@op`` too."""
    known = {module(path) for path in SOURCES}
    return {module(path): frozenset(_imports(path, known) - {module(path)}) for path in SOURCES}


def _imports(path: Path, known: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for name in _named(node, path):
            while name and name not in known:  # a name inside of a module
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found


def _named(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = origin(node, path)
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
        yield from (str(value.value) for value in node.args[:1] if isinstance(value, ast.Constant))
    elif isinstance(node, ast.Call) and _called(node) == "op":
        twins = [
            str(word.value.value).partition(":")[0] for word in node.keywords if isinstance(word.value, ast.Constant)
        ]
        folder = ".".join(("keysift", *path.parent.relative_to(ROOT).parts))
        yield from (twin for twin in twins if twin.rpartition(".")[0] != folder)


def _called(node: ast.Call) -> str | None:
    """The last part of the called function's name."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def origin(node: ast.ImportFrom, path: Path) -> str:
    """The module that a ``from`` statement takes its names from."""
    if node.level == 0:
        return node.module or ""
    package = module(path).split(".") if path.name == "__init__.py" else module(path).split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def room(name: str) -> str:
    """The file or folder right inside a package that a module belongs to."""
    return ".".join(name.split(".")[1:3])


def rooms(graph: Graph) -> Graph:
    """The same graph between rooms. A package's own `__init__` only hands names on, so nothing counts as its import."""
    found: dict[str, set[str]] = {}
    for name, imported in graph.items():
        if name.count(".") > 1:
            found.setdefault(room(name), set()).update(
                room(other) for other in imported if other.count(".") > 1 and room(other) != room(name)
            )
    return {name: frozenset(imported) for name, imported in found.items()}


def circle(graph: Graph) -> list[str]:
    """Modules that import each other in a loop; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floors(graph: Graph) -> dict[str, int]:
    """One more than the highest floor of anything imported."""
    found: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[other] for other in graph.get(name, ())), default=0)
    return found


def upward(graph: Graph) -> list[str]:
    """Imports from a package to one that stands above it."""
    layer = {name: LAYERS.index(name.split(".")[1]) for name in graph if name.count(".")}
    return [f"{name} -> {other}" for name, all_ in graph.items() for other in all_ if layer[other] > layer[name]]


def loaded_at_run_time(package: str) -> list[str]:
    """Modules of packages above that are loaded once the package has done its work."""
    above = LAYERS[LAYERS.index(package) + 1 :]
    prefixes = tuple(f"keysift.{name}" for name in above)
    script = f"{AT_RUN_TIME[package]}\nimport sys\nprint(*(m for m in sys.modules if m.startswith({prefixes})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def main() -> int:
    graph = import_graph()
    between = rooms(graph)
    height = floors(between)
    for layer in reversed(LAYERS):
        print(f"{layer}/")
        for name in sorted((name for name in between if name.startswith(f"{layer}.")), key=lambda name: -height[name]):
            print(f"  {height[name]:>2}  {name.partition('.')[2]:<16} {', '.join(sorted(between[name]))}")
    late = [name for package in AT_RUN_TIME for name in loaded_at_run_time(package)]
    faults = circle(graph) or circle(between), upward(graph), late
    names = "circles", "upward imports", "upward imports at run time"
    print(", ".join(f"{len(found)} {name}" for found, name in zip(faults, names, strict=True)))
    print(*(line for found in faults for line in found), sep="\n", end="")
    return 1 if any(faults) else 0


if __name__ == "__main__":
    sys.exit(main())
