"""The native twins against their references, for every instruction set that this machine runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from keysift.attention.ops import paged_attention as op
from keysift.kvcache.native.checks import checked
from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import UnsupportedCall

library = pytest.importorskip("keysift.kvcache.native.library", exc_type=ImportError)

from keysift.attention.ops.paged_attention.native import paged_attention as native  # noqa: E402
from keysift.engine.model.cpu.native import linear  # noqa: E402

FLOOR = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative error of rounding once
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 2e-5}  # bf16: the weights are rounded, too
DTYPES = pytest.mark.parametrize("dtype", list(FLOOR), ids=lambda dtype: str(dtype).removeprefix("torch."))
ISAS = pytest.mark.parametrize("isa", library.isas())


@dataclass(frozen=True)
class Case:
    """One ragged call: a chunk of `tokens` queries after `prefix` cached ones, over a random part of the pages."""

    heads: tuple[int, int] = (6, 2)  # Hq, Hkv
    dim: int = 64
    page_size: int = 16
    queries_per_row: int = 16
    prefix: int = 37
    tokens: int = 40
    lists: int = 2  # H
    window: int = 0
    density: float = 0.6
    dtype: torch.dtype = torch.float32

    def make(self) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """The op's arguments; every slot that holds no token is NaN."""
        torch.manual_seed(0)
        total = self.prefix + self.tokens
        count = -(-total // self.page_size)
        frames = torch.randperm(count + 2)[:count]
        q = torch.randn(self.tokens, self.heads[0] + 2, self.dim)[:, 1:-1].to(self.dtype)
        k, v = (self._scatter(torch.randn(total, self.heads[1], self.dim), frames) for _ in range(2))
        starts = torch.arange(self.prefix, total, self.queries_per_row, dtype=torch.int32)
        tables = frames.int().expand(len(starts), self.heads[1], count)
        numbers = {"queries_per_row": self.queries_per_row, "scale": self.dim**-0.5, "window": self.window}
        return (q, k, v, tables, self._pages(starts, total, count), starts), numbers

    def _scatter(self, x: Tensor, frames: Tensor) -> Tensor:
        """x [total, Hkv, D] in its frames [N, Hkv, S, D], NaN elsewhere."""
        cache = torch.full((len(frames) + 2, self.heads[1], self.page_size, self.dim), float("nan"))
        position = torch.arange(len(x))
        cache[frames[position // self.page_size], :, position % self.page_size] = x
        return cache.to(self.dtype)

    def _pages(self, starts: Tensor, total: int, count: int) -> Tensor:
        """Random pages [R, H, P], those of the row's future left out and the rest of the list padded."""
        last = (starts + self.queries_per_row - 1).clamp(max=total - 1)
        page = torch.arange(count).expand(len(starts), self.lists, count)
        chosen = (page * self.page_size <= last[:, None, None]) & (torch.rand(page.shape) < self.density)
        order = torch.where(chosen, page, count).sort(-1).values
        return torch.where(order < count, order, -1).int()


CASES = [
    *(Case((3 * group, 3), lists=lists) for group in (1, 3, 4, 8) for lists in {3, 3 * group}),
    *(Case(dim=dim, tokens=21) for dim in (8, 24, 96, 128, 256)),
    *(Case(dim=dim, tokens=1, queries_per_row=1, lists=6) for dim in (8, 24, 64, 128, 256)),
    *(Case(page_size=size, queries_per_row=64, tokens=70) for size in (1, 4, 16, 64)),
    *(Case(page_size=size, queries_per_row=1, tokens=5, prefix=90) for size in (1, 4, 16, 64)),
    *(Case(prefix=prefix, queries_per_row=64, tokens=33) for prefix in (0, 15, 16, 17, 63, 64, 65)),
    *(Case(prefix=prefix, queries_per_row=1, tokens=2, density=1.0) for prefix in (0, 15, 16, 17, 63, 64, 65)),
    *(Case(window=window) for window in (1, 16, 20, 500)),
    *(Case(window=window, queries_per_row=1, tokens=5) for window in (1, 16, 20, 500)),
    Case(heads=(8, 2), prefix=2500, tokens=1, queries_per_row=1, density=0.9),
    Case(heads=(8, 2), prefix=2500, tokens=1, queries_per_row=1, density=0.9, window=1500),
    Case(prefix=100, tokens=150, queries_per_row=150),
    Case(density=0.0),
    Case(density=0.0, queries_per_row=1, tokens=5),
]


def identify(case: Case) -> str:
    heads = f"{case.heads[0]}to{case.heads[1]}by{case.lists}"
    sizes = f"d{case.dim}-s{case.page_size}-m{case.queries_per_row}-t{case.prefix}+{case.tokens}"
    return f"{heads}-{sizes}-w{case.window}-{case.density}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference(tensors: tuple[Tensor, ...], numbers: dict[str, float]) -> tuple[Tensor, Tensor]:
    """The reference's answer in fp32, whatever the dtype; its tensors are too small for more than one thread."""
    wide = (tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors)
    with use_backend("reference"), threads(1):
        return op(*wide, **numbers)  # type: ignore[arg-type]


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    tensors, numbers = replace(case, dtype=dtype).make()
    out, lse = reference(tensors, numbers)
    for isa in library.isas():
        with library.use_isa(isa), use_backend("native"):
            found, found_lse = op(*tensors, **numbers)  # type: ignore[arg-type]
        assert found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found.float(), out, rtol=FLOOR[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(found_lse, lse, rtol=0, atol=2e-5)


@ISAS
@DTYPES
def test_error_is_within_the_rounding_floor(isa: str, dtype: torch.dtype) -> None:
    tensors, numbers = Case(prefix=500, tokens=64, queries_per_row=64, density=1.0, dtype=dtype).make()
    out, _ = reference(tensors, numbers)
    with library.use_isa(isa):
        found, _ = native(*tensors, **numbers)  # type: ignore[arg-type]
    floor = (out.to(dtype).float() - out).norm()
    assert (found.float() - out).norm() <= 1.5 * floor + 2e-6 * out.norm()


@ISAS
@DTYPES
@pytest.mark.parametrize("rows", [1, 16])
def test_bits_depend_on_neither_threads_nor_neighbours(isa: str, dtype: torch.dtype, rows: int) -> None:
    tensors, numbers = Case(queries_per_row=rows, prefix=2100, tokens=33, dtype=dtype).make()
    q, k, v, frames, pages, starts = tensors
    with library.use_isa(isa):
        with threads(2):
            out, lse = native(*tensors, **numbers)  # type: ignore[arg-type]
        with threads(1):
            again, again_lse = native(*tensors, **numbers)  # type: ignore[arg-type]
            last = len(starts) - 1
            alone = (q[last * rows :], k, v, frames[last:], pages[last:], starts[last:])
            one, one_lse = native(*alone, **numbers)  # type: ignore[arg-type]
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    assert torch.equal(out[last * rows :], one)
    assert torch.equal(lse[last * rows :], one_lse)


def test_axes_may_have_stride_zero() -> None:
    (q, k, v, frames, pages, starts), numbers = Case(density=1.0).make()
    shared = pages[-1:, :1].expand(len(starts), 2, -1)  # holds pages of the first rows' future
    assert shared.stride()[:2] == (0, 0)
    out, lse = native(q, k, v, frames, shared, starts, **numbers)  # type: ignore[arg-type]
    expected, expected_lse = native(q, k, v, frames.contiguous(), pages, starts, **numbers)  # type: ignore[arg-type]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_cache_may_be_a_view() -> None:
    (q, k, v, frames, pages, starts), numbers = Case().make()
    both = torch.stack([k, v], dim=3)  # [N, Hkv, S, 2, D]
    out, lse = native(q, both[:, :, :, 0], both[:, :, :, 1], frames, pages, starts, **numbers)  # type: ignore[arg-type]
    expected, expected_lse = native(q, k, v, frames, pages, starts, **numbers)  # type: ignore[arg-type]
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("case", [Case(dim=12), Case(dim=264), Case(dtype=torch.float64)], ids=["12", "264", "double"])
def test_refuses_what_it_cannot_do(case: Case) -> None:
    tensors, numbers = case.make()
    with pytest.raises(UnsupportedCall):
        native(*tensors, **numbers)  # type: ignore[arg-type]
    with use_backend("native"), pytest.raises(BackendUnavailable):
        op(*tensors, **numbers)  # type: ignore[arg-type]


def test_refuses_unequal_dtypes() -> None:
    (q, *others), numbers = Case().make()
    with pytest.raises(UnsupportedCall):
        native(q.bfloat16(), *others, **numbers)  # type: ignore[arg-type]


def test_an_install_without_a_compiler_raises_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYSIFT_NATIVE_LIBRARY", raising=False)
    monkeypatch.setattr(library, "EXTENSION_SUFFIXES", [])
    with pytest.raises(ImportError, match="not built"):
        library._load()


def test_a_lower_instruction_set_holds_for_a_block() -> None:
    best = library.isa()
    with library.use_isa("portable"):
        assert library.isa() == "portable"
    assert library.isa() == best == library.isas()[-1]
    with pytest.raises(ValueError, match="this machine runs"), library.use_isa("avx1024"):
        pass


@ISAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 1), (96, 35), (576, 64)])
def test_linear(isa: str, dtype: torch.dtype, bias: bool, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(16, inputs + 8).to(dtype)[:, :inputs], torch.randn(outputs, inputs).to(dtype)
    added = torch.randn(outputs).to(dtype) if bias else None
    expected = x.double() @ weight.double().T + (0.0 if added is None else added.double())
    with library.use_isa(isa):
        out = linear(x, weight, added)
        torch.testing.assert_close(out.double(), expected, rtol=FLOOR[dtype], atol=1e-4)
        for batch in (1, 2, 3, 5):
            with threads(1):
                part = linear(x[:batch], weight, added)
            assert torch.equal(part, out[:batch])


def test_linear_refuses_what_torch_does_better() -> None:
    x, weight = torch.randn(17, 64), torch.randn(8, 64)
    one = x[:1]
    for inputs, weights in (
        (x, weight),
        (one[:, :40], weight[:, :40].contiguous()),
        (one, weight.bfloat16()),
        (one.half(), weight.half()),
    ):
        with pytest.raises(UnsupportedCall):
            linear(inputs, weights)


def test_linear_calls_are_cheap() -> None:
    x, weight = torch.randn(1, 32), torch.randn(8, 32)
    with threads(1), checked(False):
        start = time.process_time()
        for _ in range(2000):
            linear(x, weight)
        assert (time.process_time() - start) / 2000 < 40e-6  # about 6 us where nothing disturbs
