"""Numbers of frames are no places in tensors: whoever looks pages up by them cannot read a page by them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from keysift.kvcache import CacheSpec, PagedCache, Span

ROOT = Path(__file__).parents[2]
READERS = [path for folder in ("kvcache/index", "attention") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_contents_are_equal_by_their_pages_and_index_nothing() -> None:
    spec = CacheSpec(num_layers=1, num_kv_heads=2, head_dim=8, page_size=4)
    cache = PagedCache(spec, 16, max_sequences=2, max_len=64)
    first, second = cache.open(), cache.open()
    cache.reserve(first, 20)
    cache.share(second, cache._frames[first][:3])
    cache.reserve(second, 20)
    one, other = (cache.prefill(Span(sequence, 0, 20), 4) for sequence in (first, second))
    assert one.contents(0, 0, 3) == other.contents(0, 0, 3) != other.contents(0, 0, 4)
    assert one.contents(0, 3, 5) != other.contents(0, 3, 5)
    assert len({*one.contents(0, 0, 5).pages(), *other.contents(0, 0, 5).pages()}) == 7
    for wrong in (lambda c: torch.zeros(99)[c], lambda c: torch.tensor(c), lambda c: torch.tensor([c])):
        with pytest.raises((IndexError, TypeError, RuntimeError)):
            wrong(one.contents(0, 0, 1))


@pytest.mark.parametrize("path", READERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_indexes_and_strategies_read_pages_through_the_table_that_came_with_them(path: Path) -> None:
    """A table belongs to the tensors of `Frames` or `Described`; a step's own is that of the tier."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr != "held", f"line {node.lineno}: frames of a sequence"
            assert node.attr != "table" or "step" not in ast.unparse(node.value), f"line {node.lineno}: a step's table"
