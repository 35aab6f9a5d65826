"""Compile every Triton kernel in every shipped configuration for several GPUs, without one at hand.

Run as ``python -m tests.compile_kernels``; with ``--all`` in every dtype for every target, which takes minutes. Fails
if a kernel spills registers, asks for more shared memory than a block may have, or misses the tensor cores. The
interpreter checks the results, but also runs code that no GPU compiler accepts.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kernel_cases import Case, Target, cases

INT32_POINTERS = re.compile(
    r"frames|pages|starts|positions|levels|firsts|lasts|pool|loads|places|refused|found|where|owner|used|counts|ages|table"
)
INT64_POINTERS = re.compile(r"slots|bases|order|tally|sums")
FP32_POINTERS = re.compile(
    r"lse|pieces|pieces_lse|mass|peak|halves|bands|masses|promises|scales|kept|averages|now_averages|overlap|tops"
)
BYTE_POINTERS = re.compile(r"bounds|known|read|now_read|bound_exceeded|named|missing")
POINTERS = {"*i32": INT32_POINTERS, "*i64": INT64_POINTERS, "*fp32": FP32_POINTERS, "*i8": BYTE_POINTERS}
INT32_SCALARS = re.compile(
    r"window|F|FIRST|M|N|T|P|Q|C|B|W|E|LP?|Hkv|PIECES?|stride.*|sinks|budget|spare|queried|most|now|before"
)
FP32_SCALARS = {"scale", "slack", "factor", "keep", "rest"}
MULTIPLES_OF_16 = re.compile(r"stride_(q|k|v|ck|cv|u).*")
MODULES = [
    *(f"keysift.attention.ops.{name}.kernels" for name in ("paged_attention", "column_scores", "steady_pages")),
    *(f"keysift.kvcache.ops.{name}.kernels" for name in ("store", "summarize", "admit", "fetch", "encode", "heaviest")),
    *(f"keysift.kvcache.ops.page_masses.{name}" for name in ("kernels", "code_kernels")),
]
"""Modules of the kernels."""
TENSOR_CORES = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma")


@dataclass(frozen=True)
class Report:
    """Result of compiling a case; `problems` is empty if it passed."""

    registers: int
    spilled: int
    shared: int
    products: int
    problems: tuple[str, ...]


def compile_case(case: Case) -> Report:
    """Compile ahead of time and read the compiler's report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = find_kernel(case.kernel)
    names: list[str] = kernel.arg_names
    types = {name: "constexpr" if name in case.constants else argument_type(name, case.dtype) for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or MULTIPLES_OF_16.fullmatch(name)]
    source = ASTSource(
        kernel,
        types,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget(case.target.backend, case.target.arch, case.target.warp_size)
    return judge(case, triton.compile(source, target=target, options=case.options))


def find_kernel(name: str) -> Any:
    modules = map(importlib.import_module, MODULES)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def argument_type(name: str, dtype: str) -> str:
    """Triton's name for the type of an argument that is not a constant."""
    if name in FP32_SCALARS:
        return "fp32"
    if INT32_SCALARS.fullmatch(name):
        return "i32"
    if name in ("first", "refusable"):
        return "i64"
    return next((kind for kind, names in POINTERS.items() if names.fullmatch(name)), f"*{dtype}")


def judge(case: Case, built: Any) -> Report:
    """Check a compiled kernel against the limits of its target."""
    read = amd_account if case.target.backend == "hip" else nvidia_account
    registers, spilled, text = read(built.asm, case.target)
    shared, products = built.metadata.shared, len(TENSOR_CORES.findall(text))
    problems = {
        "spills": spilled > 0,
        "too much shared memory": shared > case.target.shared_memory,
        "no tensor cores": case.wants_tensor_cores and not products,
    }
    return Report(registers, spilled, shared, products, tuple(name for name, found in problems.items() if found))


def nvidia_account(asm: dict[str, Any], target: Target) -> tuple[int, int, str]:
    """Registers, spilled bytes and assembly, as ptxas reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx: str = asm["ptx"]
    machine = re.findall(r"\.target (sm_\w+)", ptx)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={machine}", str(path), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return number(r"Used (\d+) registers", log), number(r"(\d+) bytes spill stores", log), ptx


def amd_account(asm: dict[str, Any], target: Target) -> tuple[int, int, str]:
    """Vector registers, spilled ones and assembly. Scalar ones spill into lanes of vector ones, not to memory."""
    text: str = asm["amdgcn"]
    return number(r"\.vgpr_count:\s+(\d+)", text), number(r"\.vgpr_spill_count:\s+(\d+)", text), text


def number(pattern: str, text: str) -> int:
    """The number that `pattern` captures; `IndexError` if the compiler does not report it."""
    return int(re.findall(pattern, text)[0])


def main() -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        import triton  # noqa: F401
    except ImportError:
        print("triton is not installed here: no kernel was compiled")
        return 0
    todo = list(cases(every="--all" in sys.argv[1:]))
    failed = 0
    print(f"{'target':8}{'dtype':6}{'kernel':14}{'registers':>10}{'spilled':>9}{'shared':>8}{'products':>10}")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for case, report in zip(todo, pool.map(compile_case, todo), strict=True):
            failed += bool(report.problems)
            numbers = f"{report.registers:10}{report.spilled:9}{report.shared:8}{report.products:10}"
            print(f"{case.target.name:8}{case.dtype:6}{case.label:14}{numbers}  {', '.join(report.problems)}".rstrip())
    print(f"{len(todo) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
