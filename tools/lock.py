"""Renew the files in requirements/, which `make install`, CI and the Dockerfile take their packages from.

One lock serves Python 3.11 to 3.13, in the format of `uv pip compile`, with the hashes of every file.
torch stands there by version alone: its CPU build is another file than the package index's. Without `--upgrade` what is
locked stays, as far as pyproject.toml still allows it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .install import ROOT, torch_version

REQUIREMENTS = ROOT / "requirements"
COMPILE = ("-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version=3.11", "--generate-hashes")
HEADER = "# Made by `make lock`.\n"
TORCH = "# By version alone: the CPU build, which an index of torch's own serves, is another file.\n"
AS_DEV = f"--constraint={REQUIREMENTS / 'dev.txt'}"
PROJECT: dict[str, tuple[str, ...]] = {
    "dev": ("--extra=dev", "--extra=docs", "--extra=triton", "--group=model"),
    "run": ("--group=model", AS_DEV),
    "bench": ("--extra=bench", AS_DEV),
}
"""What the product needs for development, in the Docker image, and for `make bench`; for Linux x86-64."""
TOOLS = ("uv", "proto")
"""The installer, and the generator of the gRPC code, each from a `.in` file; for any system."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    options = ["--upgrade"] if parser.parse_args().upgrade else []
    for name, sources in PROJECT.items():
        settings = f"--config-file={REQUIREMENTS / 'uv.toml'}", "--no-emit-package=torch"
        compile_lock(REQUIREMENTS / f"{name}.txt", ["pyproject.toml", *sources, *settings, *options])
        with (REQUIREMENTS / f"{name}.txt").open("a") as lock:
            lock.write(f"{TORCH}torch=={torch_version()}\n")
    for name in TOOLS:
        compile_lock(REQUIREMENTS / f"{name}.txt", [str(REQUIREMENTS / f"{name}.in"), "--no-config", *options])


def compile_lock(lock: Path, options: list[str]) -> None:
    command = [sys.executable, *COMPILE, "--no-header", "--output-file", str(lock), *options]
    subprocess.run(command, cwd=ROOT, check=True)
    lock.write_text(HEADER + lock.read_text().removeprefix(HEADER))


if __name__ == "__main__":
    main()
