"""Compile the sources of the native kernels side by side: each instruction set is one file of half a minute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildSideBySide(build_ext):
    """setuptools' own build, one compiler for each core."""

    def build_extension(self, ext: Extension) -> None:
        self.compiler.compile = partial(_compile, self.compiler.compile)
        super().build_extension(ext)


def _compile(compile_one: Any, sources: Sequence[str], *arguments: Any, **options: Any) -> list[str]:
    """The object files of `sources`, in their order."""
    with ThreadPoolExecutor(_cores()) as compilers:
        objects = compilers.map(lambda source: compile_one([source], *arguments, **options), sources)
        return [path for paths in objects for path in paths]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


setup(cmdclass={"build_ext": BuildSideBySide})
