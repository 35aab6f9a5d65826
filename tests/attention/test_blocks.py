"""Block selection of NOSA and InfLLM-V2, against loops in float64 written from their papers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from keysift.attention import StrategyError, bind, make
from keysift.attention.block import BlockStrategy
from keysift.attention.registry import trained_options
from keysift.kvcache import CacheSpec, PagedCache, Phase, Span, Step
from keysift.kvcache.ops import use_backend

HEADS, KV_HEADS, DIM, MORE = 4, 2, 16, 16
SCALE = DIM**-0.5
Lists = list[list[int]]


@dataclass(frozen=True)
class Text:
    """Queries [T, Hq, D], keys [T, Hkv, D] and biases [T, Hkv] of one sequence."""

    q: Tensor
    k: Tensor
    b: Tensor

    def __len__(self) -> int:
        return len(self.k)


def text(length: int, seed: int = 0, sharp: float = 2.0) -> Text:
    """Keys that drift, so that neighbouring blocks differ; heads of unequal sharpness; biases of either sign."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(-(-length // 24), KV_HEADS, DIM, generator=generator).repeat_interleave(24, 0)[:length]
    noise = torch.randn(length, KV_HEADS, DIM, generator=generator)
    q = torch.randn(length, HEADS, DIM, generator=generator) * torch.tensor([0.3, sharp, 1.0, 2 * sharp])[:, None]
    slow = torch.randn(-(-length // 40), KV_HEADS, generator=generator).repeat_interleave(40, 0)[:length]
    return Text(q, drift + noise / 2, 3 * slow)


def whole(n: int) -> Text:
    """Small whole numbers, in which every sum is exact, and many ties."""
    generator = torch.Generator().manual_seed(n)
    k = torch.randint(-1, 2, (-(-n // 64), KV_HEADS, DIM), generator=generator).repeat_interleave(64, 0)[:n]
    q = torch.randint(-1, 2, (n, 1, DIM), generator=generator).expand(-1, HEADS, -1)
    b = torch.randint(-2, 3, (-(-n // 64), KV_HEADS), generator=generator).repeat_interleave(64, 0)[:n]
    return Text(q.float().contiguous(), k.float(), b.float())


def windows(n: int, size: int, stride: int) -> list[range]:
    return [range(start, start + size) for start in range(0, n - size + 1, stride)]


def means(x: Tensor, where: list[range]) -> list[Tensor]:
    return [x[window.start : window.stop].double().mean(0) for window in where]


def pool(values: list[float], n: int, size: int, stride: int, block: int) -> list[float]:
    """The greatest value of the windows that overlap each block."""
    where, found = windows(n, size, stride), []
    for begin in range(0, n, block):
        inside = [i for i, window in enumerate(where) if window.start < begin + block and window.stop > begin]
        found.append(max((values[i] for i in inside), default=-1e30))
    return found


def best(values: list[float], count: int, forced: set[int]) -> set[int]:
    order = sorted(range(len(values)), key=lambda j: (j not in forced, -values[j], j))
    return set(order[:count])


def always(n: int, s: BlockStrategy) -> set[int]:
    own = (n - 1) // s.block_size
    return {j for j in range(own + 1) if j < s.init_blocks or j >= own - s.window_size // s.block_size}


def nosa(s: BlockStrategy, t: Text, n: int) -> Lists:
    """I_q = topk(S_q), S_e[I_q] = inf, I = topk(S_e), for the query at n - 1."""
    lists = []
    for kv in range(KV_HEADS):
        where = windows(n, s.kernel_size, s.kernel_stride)
        keys, shares = means(t.k[:n, kv], where), [0.0] * len(where)
        for head in range(2 * kv, 2 * kv + 2):
            weights = [float((t.q[n - 1, head].double() @ key * SCALE).exp()) for key in keys]
            shares = [share + weight / sum(weights) for share, weight in zip(shares, weights, strict=True)]
        sizes = (n, s.kernel_size, s.kernel_stride, s.block_size)
        by_query = best(pool(shares, *sizes), s.query_blocks, always(n, s))  # type: ignore[attr-defined]
        bias = pool([float(b) for b in means(t.b[:n, kv], where)], *sizes)
        lists.append(sorted(best(bias, s.topk, by_query)))  # type: ignore[attr-defined]
    return lists


def infllm(s: BlockStrategy, t: Text, n: int) -> Lists:
    """P = sum over the group of exp(q . fine - LSE over coarse windows)."""
    lists = []
    for kv in range(KV_HEADS):
        where = windows(n, s.kernel_size, s.kernel_stride)
        coarse = windows(n, 4 * s.kernel_size, 4 * s.kernel_stride) or where
        fine, rough = (means(t.k[:n, kv], each) for each in (where, coarse))
        shares = [0.0] * len(where)
        for head in range(2 * kv, 2 * kv + 2):
            q = t.q[n - 1, head].double() * SCALE
            total = sum(float((q @ key).exp()) for key in rough)
            shares = [share + float((q @ key).exp()) / total for share, key in zip(shares, fine, strict=True)]
        scores = pool(shares, n, s.kernel_size, s.kernel_stride, s.block_size)
        count = s.topk + s.window_size // s.block_size  # type: ignore[attr-defined]
        lists.append(sorted(best(scores, count, always(n, s))))
    return lists


Oracle = Callable[[BlockStrategy, Text, int], Lists]
SMALL = {"window_size": 64, "topk": 6}
STRATEGIES: list[tuple[str, Oracle, dict[str, object]]] = [
    ("nosa-trained", nosa, {}),
    ("nosa-trained", nosa, {"query_blocks": 4, **SMALL}),
    ("nosa-trained", nosa, {"query_blocks": 3, "init_blocks": 0, "topk": 9, "window_size": 0}),
    ("infllmv2", infllm, {}),
    ("infllmv2", infllm, {**SMALL}),
    ("infllmv2", infllm, {"kernel_size": 64, "init_blocks": 2, "window_size": 0, "topk": 5}),
]
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="for Triton's interpreter"
)


def each(strategies: list[tuple[str, Oracle, dict[str, object]]]) -> pytest.MarkDecorator:
    names = [f"{name} {options}" for name, _, options in strategies]
    return pytest.mark.parametrize(("name", "oracle", "options"), strategies, ids=names)


EACH = each(STRATEGIES)
EACH_SMALL = each([strategy for strategy in STRATEGIES if "topk" in strategy[2]])
BORDERS = [
    1,
    2,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    80,
    127,
    128,
    129,
    143,
    144,
    191,
    192,
    193,
    207,
    208,
    383,
    384,
    385,
]


def cache_of(page_size: int = 16, dtype: torch.dtype = torch.float32, pages: int = 4096) -> PagedCache:
    spec = CacheSpec(1, KV_HEADS, DIM + MORE, page_size, dtype, SCALE, code_bits=None, bias_channels=MORE)
    cache = PagedCache(spec, pages, max_sequences=4, max_len=pages * page_size)
    for tensor in (cache.tier.k, cache.tier.v, cache.tier.summaries(0)):  # type: ignore[attr-defined]
        tensor.fill_(float("nan"))
    return cache


def packed(t: Text, where: slice, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries and keys whose last channels have the bias as their product."""
    q, k, b = t.q[where], t.k[where], t.b[where]
    ones = torch.nn.functional.pad(torch.ones(*q.shape[:2], 2), (0, MORE - 2))
    parts = torch.nn.functional.pad(torch.stack([b * 0.75, b * 0.25], -1) / SCALE, (0, MORE - 2))
    return torch.cat([q, ones], -1).to(dtype), torch.cat([k, parts], -1).to(dtype)


def append(cache: PagedCache, t: Text, where: slice, step: Step) -> Tensor:
    q, k = packed(t, where, cache.spec.dtype)
    cache.append(0, k, torch.zeros_like(k), step)
    return q


def prepare(cache: PagedCache, t: Text, n: int) -> int:
    """A sequence whose first n - 1 tokens are cached."""
    cache.reserve(sequence := cache.open(), n)
    if n > 1:
        append(cache, t, slice(0, n - 1), cache.prefill(Span(sequence, 0, n - 1), 64))
    return sequence


def blocks(strategy: BlockStrategy, q: Tensor, cache: PagedCache, step: Step) -> list[Lists]:
    """The blocks of each row's lists; asserts that each is there with all pages that the row may see."""
    selection, size, rows = strategy.decode(q, cache.context(0, step)), strategy.block_size, []
    for row, last in enumerate(step.last_pages.tolist()):
        lists = []
        for pages in selection.pages[row].tolist():
            chosen = [page for page in pages if page >= 0]
            assert pages == chosen + [-1] * (len(pages) - len(chosen))
            found = sorted({page * step.page_size // size for page in chosen})
            per = size // step.page_size
            assert chosen == [page for j in found for page in range(j * per, (j + 1) * per) if page <= last]
            lists.append(found)
        rows.append(lists)
    return rows


def chosen(strategy: BlockStrategy, t: Text, n: int, page_size: int = 16) -> Lists:
    """The blocks of the query at n - 1."""
    cache = cache_of(page_size, pages=-(-n // page_size))
    span = Span(prepare(cache, t, n), n - 1, 1)
    step = cache.decode([span])
    return blocks(strategy, append(cache, t, slice(n - 1, n), step), cache, step)[0]


@EACH
@pytest.mark.parametrize("n", BORDERS)
def test_around_borders(name: str, oracle: Oracle, options: dict[str, object], n: int) -> None:
    strategy = make(name, **options)
    assert isinstance(strategy, BlockStrategy)
    assert chosen(strategy, t := text(n, seed=n), n) == oracle(strategy, t, n)


@EACH
@pytest.mark.parametrize("blocks", [33, 64, 65, 96, 97, 110])
@pytest.mark.parametrize("more", [0, 1])
def test_around_as_many_blocks_as_are_read(
    name: str, oracle: Oracle, options: dict[str, object], blocks: int, more: int
) -> None:
    strategy, n = make(name, **options), 64 * blocks + more
    assert isinstance(strategy, BlockStrategy)
    found = chosen(strategy, t := text(n, seed=blocks), n)
    assert found == oracle(strategy, t, n)
    assert all(len(each) == min(strategy.most_blocks, -(-n // 64)) for each in found)


@EACH_SMALL
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_window_counts_from_the_token_that_completes_it(
    name: str, oracle: Oracle, options: dict[str, object], more: int
) -> None:
    """The last window reaches back into the block before the row's own, for which the row's own 16 tokens stand out."""
    strategy, n = make(name, **options), 64 * 14 + 16 + more
    assert isinstance(strategy, BlockStrategy)
    t = text(n, seed=2)
    t.q[-1] = t.q[-1, 0]
    t.k[64 * 14 :] = 3 * t.q[-1, :1]
    t.b[64 * 14 :] = 20.0
    found = chosen(strategy, t, n)
    assert found == oracle(strategy, t, n)
    assert more or all(13 in each for each in found)


@EACH_SMALL
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sharp", [0.1, 2.0, 12.0])
def test_random_texts(name: str, oracle: Oracle, options: dict[str, object], seed: int, sharp: float) -> None:
    """Sharp heads whose scores spread over hundreds of nats must not drown those of their neighbour."""
    strategy, n = make(name, **options), 1000 + 37 * seed
    assert isinstance(strategy, BlockStrategy)
    assert chosen(strategy, t := text(n, seed, sharp), n) == oracle(strategy, t, n)


@EACH_SMALL
@pytest.mark.parametrize("n", [640, 800, 1000, 1001, 1300])
def test_of_equal_blocks_the_lower(name: str, oracle: Oracle, options: dict[str, object], n: int) -> None:
    strategy, t = make(name, **options), whole(n)
    assert isinstance(strategy, BlockStrategy)
    same = Text(t.q, torch.ones_like(t.k), torch.zeros_like(t.b))
    assert chosen(strategy, same, n) == oracle(strategy, same, n)
    if name == "nosa-trained":
        alike = Text(t.q, torch.ones_like(t.k), t.b)
        assert chosen(strategy, alike, n) == oracle(strategy, alike, n)


@EACH_SMALL
@pytest.mark.parametrize("page_size", [1, 2, 4, 8])
def test_pages_smaller_than_a_stride(name: str, oracle: Oracle, options: dict[str, object], page_size: int) -> None:
    strategy = make(name, **options)
    assert isinstance(strategy, BlockStrategy)
    for n in (5, 70, 500, 777):
        assert chosen(strategy, t := text(n, seed=n), n, page_size) == oracle(strategy, t, n)


@EACH_SMALL
def test_far_past_the_prompt(name: str, oracle: Oracle, options: dict[str, object]) -> None:
    """Generated tokens have scores like all others, and a prompt of 100 tokens does not anchor anything."""
    strategy, t, cache = make(name, **options), text(900, seed=5), cache_of(pages=64)
    assert isinstance(strategy, BlockStrategy)
    sequence = prepare(cache, t, 101)
    cache.reserve(sequence, 900)
    for n in range(101, 901):
        step = cache.decode([Span(sequence, n - 1, 1)])
        q = append(cache, t, slice(n - 1, n), step)
        if n % 53 == 0 or n == 900:
            assert blocks(strategy, q, cache, step)[0] == oracle(strategy, t, n)


@EACH_SMALL
@pytest.mark.parametrize("backend", ["reference", "native", pytest.param("triton", marks=TRITON)])
def test_sequences_of_a_batch(name: str, oracle: Oracle, options: dict[str, object], backend: str) -> None:
    strategy, cache, lengths = make(name, **options), cache_of(), (40, 1030, 700, 64)
    assert isinstance(strategy, BlockStrategy)
    texts = [text(n, seed=n) for n in lengths]
    step = cache.decode([Span(prepare(cache, t, len(t)), len(t) - 1, 1) for t in texts])
    last = Text(*(torch.stack([getattr(t, part)[-1] for t in texts]) for part in ("q", "k", "b")))
    q = append(cache, last, slice(0, None), step)
    with use_backend(backend):  # type: ignore[arg-type]
        found = blocks(strategy, q, cache, step)
    assert found == [oracle(strategy, t, len(t)) for t in texts]


@EACH_SMALL
def test_half_precision_finds_what_stands_out(name: str, oracle: Oracle, options: dict[str, object]) -> None:
    strategy, n = make(name, **options), 1500
    assert isinstance(strategy, BlockStrategy)
    t = text(n, seed=3)
    t.k[64 * 7 : 64 * 8, 0] = t.q[-1, 0] + t.q[-1, 1]
    t.b[64 * 11 : 64 * 12] = 40.0
    cache = cache_of(dtype=torch.bfloat16)
    step = cache.decode([Span(prepare(cache, t, n), n - 1, 1)])
    found = blocks(strategy, append(cache, t, slice(n - 1, n), step), cache, step)[0]
    assert 7 in found[0]
    assert (11 in found[0] and 11 in found[1]) == (name == "nosa-trained")
    wanted = oracle(strategy, t, n)
    assert all(len(set(a) & set(b)) >= len(b) - 1 for a, b in zip(found, wanted, strict=True))


def test_biases_do_not_touch_what_the_query_chooses() -> None:
    n, strategy = 2000, make("infllmv2", **SMALL)
    assert isinstance(strategy, BlockStrategy)
    t = text(n)
    assert chosen(strategy, t, n) == chosen(strategy, Text(t.q, t.k, t.b * 100), n)


def test_prompts_read_everything() -> None:
    for name in ("nosa-trained", "infllmv2"):
        assert make(name).part(Phase.PREFILL) == make("dense")
        cache = cache_of()
        cache.reserve(sequence := cache.open(), 300)
        step = cache.prefill(Span(sequence, 0, 300), 64)
        q, k = packed(text(300), slice(0, 300))
        expected = bind(make("dense"), cache, step)(0, q, k, k)
        assert torch.equal(bind(make(name), cache, step)(0, q, k, k), expected)


@pytest.mark.parametrize(("dense_len", "least"), [(8192, 8192), (-1, 1), (0, 1), (100, 100)])
def test_contexts_shorter_than_dense_len_are_read_completely(dense_len: int, least: int) -> None:
    for name in ("infllmv2", "dense+infllmv2"):
        strategy = make(name, **trained_options("infllmv2", {"dense_len": dense_len, "use_nope": False}))
        assert strategy.at(Phase.DECODE, least, 1).name == "infllmv2"
        assert strategy.at(Phase.DECODE, least - 1, 1).name == "dense"
    assert make("infllmv2") == make("infllmv2", **trained_options("infllmv2", {"dense_len": 8192}))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"use_nope": True}, "use_nope: keys are cached"),
        ({"dense_len": "x"}, "dense_len: a number"),
        ({"use_nope": None}, "use_nope: keys are cached"),
        *(({"dense_len": wrong}, "dense_len: a number") for wrong in (-7, True, None, 0.5)),
    ],
)
def test_a_configuration_that_is_not_supported(stated: dict[str, object], message: str) -> None:
    with pytest.raises(StrategyError, match=f"strategy infllmv2: {message}"):
        trained_options("infllmv2", stated)


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("infllmv2", {"use_nope": True}, r"infllmv2\.use_nope: removed: keys are cached after rotary embedding"),
    ("infllmv2", {"kernel_size": 40}, "kernel_size: a multiple of kernel_stride"),
    ("infllmv2", {"block_size": 72}, "block_size: a multiple of kernel_stride"),
    ("infllmv2", {"window_size": 100}, "window_size: a multiple of block_size"),
    ("infllmv2", {"topk": 1}, "topk: more than init_blocks"),
    ("infllmv2", {"dense_len": 9}, r"infllmv2\.dense_len: removed: use dense_below"),
    ("nosa-trained", {"query_blocks": 17}, "query_blocks: at least 18"),
    ("nosa-trained", {"topk": 32}, "topk: at least query_blocks"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_that_do_not_go_together_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        make(name, **options)


@pytest.mark.parametrize("page_size", [3, 5, 32, 64])
@pytest.mark.parametrize("name", ["nosa-trained", "infllmv2", "sift+infllmv2"])
def test_page_sizes_that_do_not_divide_a_window_are_refused(name: str, page_size: int) -> None:
    spec = CacheSpec(1, 2, 32, page_size, bias_channels=16)
    with pytest.raises(ValueError, match=f"page_size: a divisor of kernel_stride .16.*got {page_size}"):
        make(name).check(spec)


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(ValueError, match="no learned bias"):
        make("nosa-trained").check(CacheSpec(1, 2, 32))
    make("infllmv2").check(CacheSpec(1, 2, 32))
    make("nosa-trained").check(CacheSpec(1, 2, 32, bias_channels=16))
