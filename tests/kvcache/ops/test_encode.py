"""The codes of keys: against a formula in fp64 one channel at a time, and the twins against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend
from keysift.kvcache.ops.encode import Codes, decode, encode
from keysift.kvcache.ops.summarize import summarize
from tests.problems import built

NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
NOT_BUILT = pytest.mark.skipif(not built("keysift.kvcache.ops.encode.native"), reason="not built")
TWINS = [pytest.param("native", marks=NOT_BUILT), pytest.param("triton", marks=NO_TRITON)]
BACKENDS = ["reference", *TWINS]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BITS = pytest.mark.parametrize("bits", [2, 4])
SHAPES = [
    pytest.param(2, 16, 64, id="plain"),
    pytest.param(1, 1, 16, id="pages-of-one"),
    pytest.param(3, 6, 40, id="no-power-of-two"),
    pytest.param(1, 32, 8, id="part-of-a-word"),
    pytest.param(2, 5, 21, id="odd"),
]
FRAMES, LISTED, UNTOUCHED = 6, [4, 0], -77


@dataclass(frozen=True)
class Encoded:
    """Keys [N, Hkv, S, D], NaN outside the listed frames, and their codes."""

    k: Tensor
    summaries: Tensor
    codes: Codes


def prepare(heads: int, page_size: int, dim: int, bits: int, dtype: torch.dtype) -> Encoded:
    """Keys whose channels have outliers, and codes of unwritten pages."""
    k = torch.full((FRAMES, heads, page_size, dim), torch.nan)
    k[LISTED] = torch.randn(len(LISTED), heads, page_size, dim) + 8 * torch.randn(heads, 1, dim)
    summaries = torch.full((FRAMES, heads, 4, dim), torch.nan).to(dtype)
    with use_backend("reference"):
        summarize(summaries, k.to(dtype), k.to(dtype), torch.tensor(LISTED))
    words = -(-dim * bits // 32)
    levels = torch.full((FRAMES, heads, words, page_size), UNTOUCHED, dtype=torch.int32)
    bounds = torch.full((FRAMES, heads, 2, dim), UNTOUCHED, dtype=torch.int8)
    return Encoded(k.to(dtype), summaries, Codes(levels, bounds, torch.full((FRAMES, heads, 2), float(UNTOUCHED))))


def run(
    backend: Backend, given: Encoded, frames: list[int], layout: Callable[[Tensor], Tensor] = Tensor.clone
) -> Codes:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    k, summaries, *codes = (layout(part.to(device)) for part in (given.k, given.summaries, *given.codes))
    with use_backend(backend):
        encode(k, summaries, torch.tensor(frames, dtype=torch.int64, device=device), Codes(*codes))
    return Codes(*(part.cpu() for part in codes))


def levels_of(codes: Codes, frame: int, head: int) -> Tensor:
    """[S, D], bit by bit as the words are described."""
    _, _, words, page_size = codes.levels.shape
    dim, bits = codes.bounds.shape[-1], codes.bits
    levels = torch.zeros(page_size, dim, dtype=torch.int64)
    for word in range(words):
        for slot in range(page_size):
            number = int(codes.levels[frame, head, word, slot]) % 2**32
            for place in range(32 // bits):
                level, channel = number >> place * bits & (2**bits - 1), word * (32 // bits) + place
                if channel < dim:
                    levels[slot, channel] = level
                else:
                    assert level == 0, "nothing where there is no channel"
    return levels


def cells_of(codes: Codes, frame: int, head: int) -> tuple[Tensor, Tensor]:
    """Lower end of the first cell and width of all, of each channel, [D] fp64 each."""
    middle, half = codes.bounds[frame, head].double() * codes.scales[frame, head].double()[:, None]
    return middle - half, 2 * half / 2**codes.bits


@DTYPES
@BITS
@pytest.mark.parametrize(("heads", "page_size", "dim"), SHAPES)
def test_levels_number_the_cells_between_rounded_bounds(
    heads: int, page_size: int, dim: int, bits: int, dtype: torch.dtype
) -> None:
    given = prepare(heads, page_size, dim, bits, dtype)
    codes = run("reference", given, LISTED)
    for frame in LISTED:
        for head in range(heads):
            keys = given.k[frame, head].double()
            least, greatest = keys.amin(0), keys.amax(0)
            for side, bound in enumerate([(least + greatest) / 2, (greatest - least) / 2]):
                step = bound.abs().max() / 127
                torch.testing.assert_close(codes.scales[frame, head, side].double(), step, rtol=1e-6, atol=0)
                assert ((codes.bounds[frame, head, side] * step - bound).abs() <= step * 0.5001).all()
            low, width = cells_of(codes, frame, head)
            place = ((keys - low) / width).clamp(0, 2**codes.bits - 1e-6)
            off = (levels_of(codes, frame, head) - place.floor()).abs()
            allowed = (place - place.round()).abs() < 1e-3  # a border may fall either way
            assert (off <= allowed)[:, width > 0].all()


@DTYPES
@BITS
def test_codes_lie_within_half_a_cell_and_the_rounding_of_the_bounds(bits: int, dtype: torch.dtype) -> None:
    given = prepare(2, 16, 64, bits, dtype)
    codes = run("reference", given, LISTED)
    listed = Codes(*(part[LISTED] for part in codes))
    width = 2 * listed.bounds[:, :, 1].float() * listed.scales[:, :, 1:] / 2**bits  # [F, Hkv, D]
    off = (decode(listed) - given.k[LISTED].float()).abs()
    assert (off <= (width / 2 + listed.scales.sum(-1, keepdim=True) / 2 * 1.001)[:, :, None]).all()
    assert (off > width[:, :, None] / 8).any(), "not all lie in the middle"


@pytest.mark.parametrize("backend", BACKENDS)
@BITS
def test_constant_channels_cost_no_more_than_the_rounding_of_their_middle(backend: Backend, bits: int) -> None:
    given = prepare(1, 16, 32, bits, torch.float32)
    given.k[4, :, :, 3:9] = given.k[4, :, :1, 3:9]
    given.k[0] = 0.0
    given.summaries[LISTED, :, 1], given.summaries[LISTED, :, 2] = given.k[LISTED].amin(2), given.k[LISTED].amax(2)
    codes = run(backend, given, LISTED)
    keys = decode(Codes(*(part[LISTED] for part in codes)))
    assert (keys[0] - given.k[4])[..., 3:9].abs().max() <= codes.scales[4, 0, 0] / 2 * 1.001
    assert torch.equal(keys[1], torch.zeros_like(keys[1]))


@pytest.mark.parametrize("backend", BACKENDS)
@DTYPES
@BITS
@pytest.mark.parametrize(("heads", "page_size", "dim"), SHAPES)
def test_the_twins_write_the_same_bits_in_the_listed_frames_and_nothing_else(
    backend: Backend, dtype: torch.dtype, bits: int, heads: int, page_size: int, dim: int
) -> None:
    given = prepare(heads, page_size, dim, bits, dtype)
    assert_same(run(backend, given, LISTED), run("reference", given, LISTED))


@NOT_BUILT
@DTYPES
@BITS
@pytest.mark.parametrize(("heads", "page_size", "dim"), SHAPES)
def test_every_instruction_set_writes_the_same_bits(
    dtype: torch.dtype, bits: int, heads: int, page_size: int, dim: int
) -> None:
    from keysift.kvcache.native.library import isas, use_isa

    given = prepare(heads, page_size, dim, bits, dtype)
    expected = run("reference", given, LISTED)
    for isa in isas():
        with use_isa(isa):
            assert_same(run("native", given, LISTED), expected)


@NOT_BUILT
@BITS
def test_keys_on_the_border_of_two_cells_fall_where_the_reference_has_them(bits: int) -> None:
    """Keys of few values, most of which are such borders but for rounding."""
    from keysift.kvcache.native.library import isas, use_isa

    given = prepare(2, 64, 64, bits, torch.float32)
    given.k[LISTED] = torch.randint(-6, 7, (len(LISTED), 2, 64, 64)) * torch.rand(2, 1, 64)
    with use_backend("reference"):
        summarize(given.summaries, given.k, given.k, torch.tensor(LISTED))
    expected = run("reference", given, LISTED)
    for isa in isas():
        with use_isa(isa):
            assert_same(run("native", given, LISTED), expected)


@NOT_BUILT
def test_many_frames_on_many_threads() -> None:
    """As many as are worth a second thread."""
    from keysift.kvcache.ops.summarize.native import CHANNELS_OF_ONE_THREAD

    frames = torch.randperm(CHANNELS_OF_ONE_THREAD // 4096 + 1)
    k = torch.randn(len(frames), 1, 64, 64).to(torch.bfloat16)
    summaries = torch.stack([k.mean(2), k.amin(2), k.amax(2), k.mean(2)], dim=2)
    shapes = ((4, 64), torch.int32), ((2, 64), torch.int8), ((2,), torch.float32)
    apart = [Codes(*(torch.zeros(len(frames), 1, *shape, dtype=dtype) for shape, dtype in shapes)) for _ in range(2)]
    with use_backend("native"):
        encode(k, summaries, frames, apart[0])
    with use_backend("reference"):
        encode(k, summaries, frames, apart[1])
    assert all(torch.equal(*parts) for parts in zip(*apart, strict=True))


def assert_same(written: Codes, expected: Codes) -> None:
    """The same bits in the listed frames, and nothing in the others."""
    rest = [frame for frame in range(FRAMES) if frame not in LISTED]
    for part, reference in zip(written, expected, strict=True):
        assert torch.equal(part, reference)
        assert (part[rest] == UNTOUCHED).all()
        assert not (part[LISTED] == UNTOUCHED).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_frames(backend: Backend) -> None:
    given = prepare(1, 16, 16, 2, torch.float32)
    assert all(torch.equal(*parts) for parts in zip(run(backend, given, []), given.codes, strict=True))


@pytest.mark.parametrize("backend", TWINS)
def test_codes_apart_are_refused(backend: Backend) -> None:
    given = prepare(1, 16, 16, 2, torch.float32)
    apart = given.codes._replace(levels=given.codes.levels.repeat_interleave(2, -1)[..., ::2])
    with pytest.raises(BackendUnavailable, match="encode"), use_backend(backend):
        encode(given.k, given.summaries, torch.tensor(LISTED), apart)


@pytest.mark.parametrize("backend", BACKENDS)
@BITS
def test_parts_of_larger_tensors(backend: Backend, bits: int) -> None:
    given = prepare(2, 6, 40, bits, torch.bfloat16)
    assert_same(run(backend, given, LISTED, within), run("reference", given, LISTED))


def within(part: Tensor) -> Tensor:
    """The same numbers as part of a larger tensor: only the last axis lies side by side."""
    return torch.stack([part, part], dim=-2)[..., 0, :]
