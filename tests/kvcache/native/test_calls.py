"""Call structures of the native library: their layout, and what fills them."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from keysift.kvcache.native import calls
from keysift.kvcache.native.calls import STRUCTURES, FillCall, LinearCall, Matrix, ProbeCall, TopCall
from keysift.kvcache.native.checks import OutOfBounds, check, checked

NATIVE = Path(calls.__file__).parent
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def test_every_structure_of_the_header_is_mirrored_in_its_order() -> None:
    names = re.findall(r"^struct (\w+) \{", (NATIVE / "abi.h").read_text(), re.MULTILINE)
    assert [kind.__name__ for kind in STRUCTURES] + ["Kernels"] == names


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_every_field_lies_where_the_header_puts_it(tmp_path: Path) -> None:
    fields = [(kind, field[0]) for kind in STRUCTURES for field in kind._fields_]
    lines = [f"  print(offsetof({kind.__name__}, {name}), sizeof({kind.__name__}::{name}));" for kind, name in fields]
    source = ["#include <cstddef>", "#include <cstdio>", '#include "abi.h"', "using namespace keysift;"]
    source += ["void print(std::size_t offset, std::size_t size) {", '  std::printf("%zu %zu\\n", offset, size);', "}"]
    (tmp_path / "offsets.cpp").write_text("\n".join([*source, "int main() {", *lines, "}"]))
    command = [str(COMPILER), "-std=c++17", f"-I{NATIVE}", "offsets.cpp", "-o", "offsets"]
    subprocess.run(command, check=True, cwd=tmp_path)
    printed = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True).stdout.splitlines()
    mirrored = [getattr(kind, name) for kind, name in fields]
    assert printed == [f"{field.offset} {field.size}" for field in mirrored]


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("keysift.kvcache.native.library", exc_type=ImportError)
    monkeypatch.setattr(calls, "layouts", lambda: [8, 0])
    with pytest.raises(ImportError, match="other call structures"):
        library._load()
    monkeypatch.undo()
    monkeypatch.setitem(library.KERNELS, "keysift_of_another_version", TopCall)
    with pytest.raises(ImportError, match=r"another version.*keysift_of_another_version"):
        library._load()


def test_fields_are_filled_by_name() -> None:
    x, out, weight = torch.zeros(2, 40)[:, :32], torch.zeros(2, 4), torch.zeros(4, 32)
    matrix = Matrix.pack(inputs=32, outputs=4, bias=None, scales=None, weight=weight)
    call = LinearCall.pack(batch=2, x=x, type=0, out=out, matrix=matrix)
    assert (call.x, call.out, call.x_strides[0], call.batch) == (x.data_ptr(), out.data_ptr(), 40, 2)
    assert (call.matrix.weight, call.matrix.scales, call.matrix.bias) == (weight.data_ptr(), None, None)
    assert (call.matrix.outputs, call.matrix.inputs) == (4, 32)


def test_strides_are_those_of_the_tensors() -> None:
    k, scales = torch.zeros(5, 4, 3, 2).transpose(0, 1), torch.zeros(5, 2, 2)
    tensors = dict.fromkeys(("v", "summaries", "levels", "bounds", "frames"))
    sizes = dict.fromkeys(("filled", "kv_heads", "dim", "page_size", "words", "bits", "type"), 0)
    with checked(False):
        call = FillCall.pack(k=k, scales=scales, **tensors, **sizes)
    assert list(call.k_strides) == [6, 24, 2]
    assert list(call.scales_strides) == [4, 2]
    assert list(call.v_strides) == [0, 0, 0]
    assert call.v is None


def test_a_list_of_tensors_becomes_addresses_that_the_call_keeps_alive() -> None:
    lists, others = [torch.zeros(1), None, torch.zeros(2)], dict.fromkeys(field[0] for field in ProbeCall._fields_)
    others = {name: None if name in ProbeCall.operands else 0 for name in others if not name.endswith("_strides")}
    with checked(False):
        call = ProbeCall.pack(**{**others, "centroids": lists, "ends": [], "tokens": []})
    gc.collect()
    addresses = [call.centroids[i] for i in range(3)]
    assert addresses == [tensor if tensor is None else tensor.data_ptr() for tensor in lists]


def test_a_kept_call_is_checked_by_the_fields_that_are_set_again() -> None:
    matrix, x, out = torch.zeros(2, 32), torch.zeros(3, 32), torch.zeros(3, 2)
    packed = Matrix.pack(inputs=32, outputs=2, bias=None, scales=None, weight=matrix)
    call = LinearCall.pack(batch=3, x=x, type=0, out=out, matrix=packed)
    call.batch = 1
    check(call, {"x": x[1:2], "out": out[1:2]})
    with pytest.raises(OutOfBounds, match=r"LinearCall\.x: shape \[3, 32\]: 3, needs batch, which is 1"):
        check(call, {"x": x})


def test_missing_and_unknown_fields_are_refused() -> None:
    fields = {"weight": None, "scales": None, "bias": None, "outputs": 1, "inputs": 1}
    for wrong in ({**fields, "input": 1}, {"weight": None}, {**fields, "weight_strides": (1,)}):
        with pytest.raises(TypeError, match=r"pack\(\) (missing|got an unexpected)"):
            Matrix.pack(**wrong)
