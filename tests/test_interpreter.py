"""Triton's interpreter, repaired, computes in bf16 as torch does."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run on the GPU, or triton is not installed", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def arithmetic_kernel(x, y, out, count, BLOCK: tl.constexpr):
    """Write six results of bf16 arithmetic, `count` times over."""
    o = tl.arange(0, BLOCK)
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    for i in range(tl.load(count)):
        p_out = out + i * 6 * BLOCK + o
        tl.store(p_out, b_x + b_y)
        tl.store(p_out + BLOCK, b_x * b_y)
        tl.store(p_out + 2 * BLOCK, tl.maximum(b_x, b_y))
        tl.store(p_out + 3 * BLOCK, b_x * 0.7)
        tl.store(p_out + 4 * BLOCK, tl.where(b_x < b_y, b_x, b_y))
        tl.store(p_out + 5 * BLOCK, (b_x.to(tl.float32) / 3.0).to(tl.bfloat16))


@triton.jit
def dot_kernel(x, y, out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + o, tl.dot(tl.load(x + o), tl.load(y + o)))


def test_arithmetic_rounds_as_torch_does() -> None:
    x, y = torch.randn(2, 64).bfloat16()
    constant = torch.tensor(0.7, dtype=torch.bfloat16)
    out = torch.empty(2, 6, 64, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, torch.tensor([2], dtype=torch.int32), BLOCK=64)
    expected = torch.stack([x + y, x * y, x.maximum(y), x * constant, x.minimum(y), (x.float() / 3).bfloat16()])
    assert torch.equal(out[0], expected)
    assert torch.equal(out[1], expected)


def test_dot_adds_in_fp32() -> None:
    x, y = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](x, y, out, BLOCK=16)
    torch.testing.assert_close(out, x.float() @ y.float())


@triton.jit
def outcome_kernel(x, out, BLOCK: tl.constexpr):
    """The negative numbers, where the greatest is above 1."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    tl.store(out + o, (b_x < 0.0) & (tl.max(b_x, 0) > 1.0))


def test_the_outcome_of_a_comparison_is_true_or_false() -> None:
    out = torch.empty(2, 4, dtype=torch.bool)
    for row, x in zip(out, torch.tensor([[-1.0, 2.0, 0.0, -3.0], [-1.0, 0.5, 0.0, -3.0]]), strict=True):
        outcome_kernel[(1,)](x, row, BLOCK=4)
    assert out.tolist() == [[True, False, False, True], [False] * 4]
