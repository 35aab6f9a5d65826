"""Run tests on native kernels that were built with sanitizers: python -m tools.sanitize [--help].

First each sanitizer has to find a fault that is planted, without checked mode, which would refuse it. Builds lie in
build/sanitize/ and are made anew when a source or flag has changed; the library of the package stays as it is. Needs
g++ with libasan and libtsan, and Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kvcache" / "native"
TESTS = (
    *("tests/kvcache/native", "tests/kvcache/ops", "tests/kvcache/index", "tests/attention/ops"),
    *("tests/engine/test_retrieval.py", "tests/kvcache/tiers/test_offload_soak.py", "tests/attack"),
)
"""Ops and indexes, then short lives of requests on an engine, over both tiers."""
LEFT_OUT = ("tests/kvcache/native/test_native_memory.py", "tests/kvcache/native/test_calls.py")
"""Tests that limit the address space, of which sanitizers take terabytes, and of the build itself."""
NAMES = "not triton and not cheap"
"""Twins of GPUs, and a test of time, are left out by their names."""
FLAGS = ("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fvisibility=hidden", "-pthread", "-fPIC")
PREPARED = """
import torch
from keysift.attention.ops.paged_attention.native import paged_attention
from keysift.kvcache.ops.summarize.native import summarize

torch.set_num_threads(1)
k = torch.randn(4, 1, 16, 64)
table, pages = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)

def attend(frame=0, start=15):
    at = torch.tensor([start], dtype=torch.int32)
    paged_attention(torch.randn(2, 1, 64), k, k, table + frame, pages, at, queries_per_row=2, scale=1.0)
"""


@dataclass(frozen=True)
class Sanitizer:
    """A kind of build, and how to run it."""

    flags: tuple[str, ...]
    runtime: str
    """Library that has to be loaded before Python's."""
    options: dict[str, str]
    planted: dict[str, str]
    """Programs after `PREPARED`, by what their output has to name."""


SANITIZERS = {
    "address": Sanitizer(
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        "libasan.so",
        # Python and torch keep much until the process ends, which is no leak of the kernels.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        {"AddressSanitizer": "attend(frame=1000)", "signed integer overflow": "attend(start=2**31 - 1)"},
    ),
    "thread": Sanitizer(
        ("-fsanitize=thread",),
        "libtsan.so",
        # torch, Python and OpenMP are not instrumented: what they order among their threads is not seen.
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66"},
        {
            "data race": """
from threading import Thread
summaries, frames = torch.zeros(4, 1, 4, 64), torch.arange(4).repeat(200)
threads = [Thread(target=summarize, args=(summaries, k, k, frames)) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
        },
    ),
}


def main() -> int:
    arguments = parse()
    for name in arguments.sanitizers or SANITIZERS:
        library = build(name)
        if not prove(name, library):
            return 1
        chosen = arguments.tests or [path for path in TESTS if (ROOT / path).exists()]
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", NAMES, *chosen]
        command += [f"--ignore={path}" for path in LEFT_OUT]
        print(f"{name}: {' '.join(chosen)}", flush=True)
        if status := subprocess.run([sys.executable, *command], env=environment(name, library), cwd=ROOT).returncode:
            return status
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sanitizers", nargs="*", help=f"{' or '.join(SANITIZERS)}; none: all, one after the other")
    parser.add_argument("--tests", nargs="+", help="files or folders instead of those that `make sanitize` runs")
    arguments = parser.parse_args()
    if unknown := set(arguments.sanitizers) - SANITIZERS.keys():
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(SANITIZERS)}")
    return arguments


def build(name: str) -> Path:
    """Compile the library with one sanitizer, if it is not there yet; its path."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        (extension,) = tomllib.load(file)["tool"]["setuptools"]["ext-modules"]
    flags = (*FLAGS, *SANITIZERS[name].flags)
    library = ROOT / "build" / "sanitize" / f"{name}-{_digest(flags)}" / "_kernels.so"
    if library.exists():
        return library
    print(f"{name}: compiling, which takes minutes", flush=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    objects = [library.parent / f"{Path(source).stem}.o" for source in extension["sources"]]
    pairs = zip(extension["sources"], objects, strict=True)
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        list(compilers.map(lambda pair: _compile(*flags, "-c", pair[0], "-o", str(pair[1])), pairs))
    _compile(*flags, "-shared", *map(str, objects), "-o", str(library))
    return library


def _digest(flags: Sequence[str]) -> str:
    """A name for this state of all sources."""
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _compile(*arguments: str) -> None:
    subprocess.run((os.environ.get("CXX", "g++"), *arguments), check=True, cwd=ROOT)


def environment(name: str, library: Path, checked: bool = True) -> dict[str, str]:
    """Variables of a process that loads the library, whose sanitizer has to come first."""
    sanitizer = SANITIZERS[name]
    preloaded = " ".join(_library_file(file) for file in (sanitizer.runtime, "libstdc++.so.6"))
    own = {"KEYSIFT_NATIVE_LIBRARY": str(library), "KEYSIFT_CHECKED": str(int(checked)), "LD_PRELOAD": preloaded}
    return os.environ | own | sanitizer.options


def _library_file(name: str) -> str:
    command = (os.environ.get("CXX", "g++"), f"-print-file-name={name}")
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{command[0]} has no {name}; install the sanitizers' libraries of this compiler")
    return found


def prove(name: str, library: Path) -> bool:
    """True if the sanitizer finds all that is planted."""
    for message, program in SANITIZERS[name].planted.items():
        command, variables = (sys.executable, "-c", PREPARED + program), environment(name, library, checked=False)
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0 or message not in done.stderr:
            print(f"{name}: a planted fault was not found: {message}\n{done.stderr}", file=sys.stderr)
            return False
        print(f"{name}: finds a planted {message}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
