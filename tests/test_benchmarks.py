"""The commands of benchmarks/: every module with a `main` explains itself, and the documents name only such modules."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.lib.process import ROOT, command

IN_PEERS = {"benchmarks.peers.llama_cpp", "benchmarks.peers.openvino"}
"""They import the libraries of the peers' own environments."""
ANY = "benchmarks.x"
"""As documents call any of them."""
NAMED = re.compile(r"python3? -m (benchmarks[\w.]*)")


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


COMMANDS = sorted(
    {module(file) for file in (ROOT / "benchmarks").rglob("*.py") if "\nif __name__ ==" in file.read_text()} - IN_PEERS
)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main_of(name).main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {name} [-h]")


def main_of(name: str) -> ModuleType:
    found = import_module(name)
    return import_module(f"{name}.__main__") if hasattr(found, "__path__") else found


@pytest.mark.parametrize("name", ["benchmarks.engine", "benchmarks.engine.quantization"])
def test_commands_run_from_the_root(name: str) -> None:
    """One package and one module, as a shell runs them."""
    done = subprocess.run(command(name, "--help"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {name} [-h]")


def test_documents_name_commands_that_exist() -> None:
    files = [ROOT / "Makefile", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
    named = {found.rstrip(".") for file in files for found in NAMED.findall(file.read_text().replace("\n", " "))}
    assert named - {ANY} <= set(COMMANDS)
    assert len(named) > 10


def test_every_package_says_what_it_is() -> None:
    folders = {file.parent for file in (ROOT / "benchmarks").rglob("*.py")}
    assert all((folder / "__init__.py").read_text().startswith('"""') for folder in folders)
