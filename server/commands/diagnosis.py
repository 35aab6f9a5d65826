"""Checks of `keysift doctor`: versions, hardware, native code, self-tests, model and calibration."""

from __future__ import annotations

import importlib.util
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
from rich.console import Console
from rich.table import Table

from keysift.attention.ops import paged_attention
from keysift.engine.calibration import calibration
from keysift.engine.errors import ModelNotFound
from keysift.engine.model.embedded import NAME, cache_folder, package_file
from keysift.engine.version import keysift_version
from keysift.kvcache.native.cores import num_threads
from keysift.kvcache.ops.dispatch import Backend, BackendUnavailable, use_backend

PACKAGES = ("torch", "transformers", "tokenizers", "grpcio", "protobuf", "pydantic", "triton")
GIB = 2**30
TOLERANCE = 1e-4
"""Largest difference between two backends of an op in fp32."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check. `fatal`: Keysift cannot run unless it is ok."""

    name: str
    ok: bool
    detail: str
    fatal: bool = False


def examine() -> list[Finding]:
    """Run all checks, in the order of the table."""
    machine = _versions(), _processor(), _native_library(), _gpu(), _memory()
    return [*machine, *_self_tests(), _embedded_model(), _calibration()]


def _versions() -> Finding:
    packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return Finding("versions", True, f"keysift {keysift_version()}, python {platform.python_version()}, {packages}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _processor() -> Finding:
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("processor", True, f"{capability}; compute threads: {num_threads()}")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("gpu", True, "none that torch can use; runs on the CPU")
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if importlib.util.find_spec("triton") is None:
        return Finding("gpu", False, f"{names}, but triton is missing: pip install 'keysift[triton]'")
    return Finding("gpu", True, names)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("memory", True, f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f} GiB")


def _native_library() -> Finding:
    try:
        from keysift.kvcache.native import library
    except ImportError as error:
        return Finding("native library", False, f"{error}; the torch reference runs instead")
    return Finding("native library", True, f"built; uses {library.isa()} of {', '.join(library.isas())}")


def _self_tests() -> list[Finding]:
    try:
        expected = _attention("reference")
    except Exception as error:
        return [Finding("self-test reference", False, f"{type(error).__name__}: {error}", fatal=True)]
    backends: tuple[Backend, ...] = ("native", "triton") if torch.cuda.is_available() else ("native",)
    return [
        Finding("self-test reference", bool(expected.isfinite().all()), "one small attention", fatal=True),
        *(_compare(backend, expected) for backend in backends),
    ]


def _compare(backend: Backend, expected: torch.Tensor) -> Finding:
    name = f"self-test {backend}"
    try:
        difference = float((_attention(backend) - expected).abs().max())
    except BackendUnavailable as missing:
        return Finding(name, False, str(missing))
    except Exception as error:  # of a driver or a compiler, of any kind
        return Finding(name, False, f"{type(error).__name__}: {error}", fatal=True)
    return Finding(name, difference < TOLERANCE, f"largest difference from the reference {difference:.1e}", fatal=True)


def _attention(backend: Backend) -> torch.Tensor:
    """Dense attention [T, Hq, D] of 40 tokens over 3 pages of 16, two query heads for each KV head."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=random) for shape in ((40, 4, 32), (3, 2, 16, 32), (3, 2, 16, 32)))
    pages = torch.arange(3, dtype=torch.int32).expand(1, 2, 3)
    starts = torch.zeros(1, dtype=torch.int32)
    device = torch.device("cuda" if backend == "triton" else "cpu")
    tensors = (tensor.to(device) for tensor in (q, k, v, pages, pages, starts))
    with use_backend(backend):
        out, _ = paged_attention(*tensors, queries_per_row=64, scale=32**-0.5)
    return out.cpu()


def _embedded_model() -> Finding:
    try:
        file = package_file()
    except ModelNotFound as error:
        return Finding("embedded model", False, str(error))
    converted = any((cache_folder() / "models").glob(f"{NAME}-*"))
    state = f"converted, in {cache_folder()}" if converted else "will be converted at its first use, about 20 s"
    return Finding("embedded model", True, f"{file.name}, {state}")


def _calibration() -> Finding:
    """Stored calibrations of this machine and this version, one for each model, and their file."""
    here, stored = calibration.machine(), calibration.stored()
    valid = [each for each in stored if each.setting.machine == here]
    others = f"{len(stored) - len(valid)} of another machine or version" if len(stored) > len(valid) else ""
    none = "none for this machine; keysift calibrate measures from which length on prompts are faster sparse"
    file = f"stored in {calibration.store_file()}" if stored else ""
    details = [*([_crossovers(each) for each in valid] or [none]), others, file]
    return Finding("calibration", True, "; ".join(filter(None, details)))


def _crossovers(each: calibration.Calibration) -> str:
    setting = each.setting
    about = f"{each.model} on {setting.device} ({setting.backend}) in {setting.dtype}, pages of {setting.page_size}"
    about += f", chunks of {setting.prefill_chunk}" + f" by {setting.dense_kernel}" * (setting.dense_kernel != "paged")
    found = "; ".join(f"{name} {crossover.summary}" for name, crossover in each.crossovers.items())
    return f"{about}: in tokens, {found}"


def usable(findings: list[Finding]) -> bool:
    """True if no fatal check failed."""
    return all(finding.ok for finding in findings if finding.fatal)


def print_json(findings: list[Finding]) -> None:
    checks = [asdict(finding) for finding in findings]
    print(json.dumps({"usable": usable(findings), "checks": checks}))


def print_table(findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]broken[/]" if finding.fatal else "[yellow]without[/]"
        table.add_row(mark, finding.name, finding.detail)
    Console().print(table)
