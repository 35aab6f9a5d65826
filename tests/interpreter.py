"""Make Triton's interpreter (3.6 to 3.9) compute what a GPU would.

Out of the box it keeps bf16 as raw 16-bit integers and does arithmetic on those, cuts fp32 to bf16 instead of rounding
to nearest even, takes the outcome of a comparison for a number of the kind that was compared, and cannot read a loop
bound from memory with numpy 2.4. The methods replaced here are private to Triton; `test_interpreter.py` fails where one
of them stops taking effect. Reductions of bf16 stay wrong: the kernels widen what they load.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Replace the interpreter's broken methods; call once, before the first launch."""
    _repair_loop_bounds()
    _repair_arithmetic()
    _repair_casts()


def _repair_loop_bounds() -> None:
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_arithmetic() -> None:
    dot, binary = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *rest)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        wide = _is_bf16(lhs)
        result = op(_widen(lhs).data, _widen(rhs).data) if wide else binary(self, lhs, rhs, op).data
        if result.dtype == bool:
            return TensorHandle(result, tl.int1)
        return _narrow(result) if wide else TensorHandle(result, lhs.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(np.array([value], np.float32))


def _repair_casts() -> None:
    original = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        wide = _widen(src)
        return _narrow(wide.data) if dst_type.scalar == tl.bfloat16 else original(self, wide, dst_type)

    InterpreterBuilder.cast_impl = cast_impl


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widen(handle: Any) -> Any:
    """A bf16 handle as the fp32 one of the same values; any other as it is."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: NDArray[np.float32]) -> Any:
    """fp32 values as a bf16 handle, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)
