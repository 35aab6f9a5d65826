"""Selection by blocks of pages, as models are trained with it: windows of mean keys, pooled to blocks.

A window is `kernel_size` tokens, one begins every `kernel_stride`; only complete ones count. As scores are linear in
keys, a window's is the mean of its pages' scores, so nothing but the pages' own mean keys is read. Shares stay
logarithms, which have the same order and keep faint ones apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from keysift.kvcache import CacheSpec, Context, Phase, Selection, Step
from keysift.kvcache.ops.page_masses import page_masses

from .strategy import Count, Dense, Positive, Strategy, Tokens, option

FLAT = 8
"""Temperature of the softmax that scores are recovered from: fp32 holds shares down to e^-104, which is then a range of
832 in scores, more than trained heads spread."""
FAINTEST = -104.0
"""Log share of a page whose share is 0 in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStrategy(Strategy, ABC):
    """Chooses blocks for one token of each sequence, one list for each KV head; prompts read everything.

    The first blocks, the last ones and the row's own are always in. Options are named as in the models' own
    configurations.
    """

    replayable = True
    dense_below: Tokens = option(0, "tokens of a context up to which everything is read")
    kernel_size: Positive = option(32, "tokens of a window, scored by its mean key; a multiple of kernel_stride")
    kernel_stride: Positive = option(
        16, "tokens from one window's start to the next one's, a multiple of the page size"
    )
    init_blocks: Count = option(1, "blocks at the start that every token reads")
    block_size: Positive = option(64, "tokens of a block, a multiple of kernel_stride")
    window_size: Tokens = option(2048, "tokens before a token's own block that it reads, a multiple of block_size")

    def __post_init__(self) -> None:
        """Raises `ValueError` naming an option that does not go with the others."""
        Strategy.__post_init__(self)
        units = (("kernel_size", "kernel_stride"), ("block_size", "kernel_stride"), ("window_size", "block_size"))
        for name, unit in units:
            if (value := getattr(self, name)) % (step := getattr(self, unit)):
                raise ValueError(f"{name}: a multiple of {unit} ({step}), got {value}")

    @property
    @abstractmethod
    def most_blocks(self) -> int:
        """Most blocks of a list."""

    @abstractmethod
    def choose(self, q: Tensor, context: Context) -> Tensor:
        """[R, Hkv, n] bool, the blocks that each row reads of the n of the context, those in `forced` included."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        return context.all()

    def decode(self, q: Tensor, context: Context) -> Selection:
        return _pages(self.choose(q, context), self.most_blocks, self.block_size, context.step)

    def part(self, phase: Phase) -> Strategy:
        return self if phase is Phase.DECODE else Dense()

    def check(self, spec: CacheSpec) -> None:
        if self.kernel_stride % spec.page_size:
            raise ValueError(
                f"page_size: a divisor of kernel_stride ({self.kernel_stride}) is needed, for windows are made of "
                f"whole pages, got {spec.page_size}"
            )

    @property
    def local_blocks(self) -> int:
        return self.window_size // self.block_size

    def forced(self, step: Step) -> Tensor:
        """[R, n] bool, the first blocks, the row's own and the `local_blocks` before it."""
        own, block = self._own(step), self._blocks(step)
        return (block <= own) & ((block < self.init_blocks) | (block >= own - self.local_blocks))

    def top(self, scores: Tensor, count: int, forced: Tensor, step: Step) -> Tensor:
        """[R, H, n] bool, the `count` best blocks by scores [R, H, n], the `forced` before all; of equals the lower."""
        seen = (self._blocks(step) <= self._own(step))[:, None]
        ranked = scores.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
        best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True) & seen

    def windows(self, pages: Tensor, step: Step, factor: int = 1) -> Tensor:
        """[R, H, w], means of pages [R, H, F] over windows that are `factor` times as long and as far apart.

        -inf for windows that are not complete, as the only one of a context that is shorter than a window.
        """
        size, stride = self.kernel_size * factor, self.kernel_stride * factor
        per, apart = min(size // step.page_size, pages.shape[-1]), stride // step.page_size
        means = pages.unfold(-1, per, apart).mean(-1)
        ends = torch.arange(means.shape[-1], device=means.device) * stride + size
        return means.masked_fill((ends > step.starts[:, None] + 1)[:, None], -torch.inf)

    def pooled(self, windows: Tensor, step: Step) -> Tensor:
        """[R, H, n], the greatest of windows [R, H, w] that share a token with each block; -inf where none does."""
        total, count = step.max_pages * step.page_size, self._count(step)
        ratio = min(self.block_size // self.kernel_stride, -(-total // self.kernel_stride))
        before = min(self.kernel_size // self.kernel_stride - 1, count * ratio)
        after = count * ratio - windows.shape[-1]
        return pad(windows, (before, after), value=-torch.inf).unfold(-1, ratio + before, ratio).amax(-1)

    def _own(self, step: Step) -> Tensor:
        return (step.starts // self.block_size)[:, None]  # [R, 1]

    def _blocks(self, step: Step) -> Tensor:
        return torch.arange(self._count(step), device=step.starts.device)

    def _count(self, step: Step) -> int:
        return -(-step.max_pages * step.page_size // self.block_size)


def scores(q: Tensor, context: Context) -> Tensor:
    """[R, Hq, F] fp32: ``scale * q . mean key`` of each full page, up to a summand per row and head.

    Without the bias that keys carry. After the last full page: arbitrary, but not NaN.
    """
    step, spec, means = context.step, context.spec, context.page_means()
    if spec.bias_channels:
        q = pad(q[..., : spec.content_dim], (0, spec.bias_channels))
    full = (step.starts + 1) // step.page_size  # [R]
    masses = page_masses(q, means.k, means.table, full - 1, scale=spec.softmax_scale / FLAT)
    return FLAT * masses.clamp(min=FAINTEST + masses.amax(-1, keepdim=True).clamp(min=FAINTEST))


def biases(q: Tensor, context: Context) -> Tensor:
    """[R, Hkv, F] fp32, the mean bias that the keys of each full page carry; arbitrary after the last full page.

    The product of the channels that are not content, which is the same for all query heads of a group. A page's mean is
    stored in the cache's precision, in bfloat16 to 8 bits.
    """
    content, means = context.spec.content_dim, context.page_means()
    heads = torch.arange(means.k.shape[1], device=q.device)[:, None]
    keys = means.k[:, :, 0, content:][means.table.long(), heads].float()  # [R, Hkv, F, bias_channels]
    ours = q[:, :: q.shape[1] // means.k.shape[1], content:].float()  # [R, Hkv, bias_channels]
    total: Tensor = (keys * ours[:, :, None]).sum(-1) * context.spec.softmax_scale
    return total


def log_sum(windows: Tensor) -> Tensor:
    """[R, H, 1], log-sum-exp of windows [R, H, w], in fp64, so that padding changes no bit of the fp32 result."""
    return windows.double().logsumexp(-1, keepdim=True).float()


def group_sum(logs: Tensor, heads: int) -> Tensor:
    """[R, heads, w], logs of the sums over the query heads of a group, of shares whose logs are [R, Hq, w]."""
    return torch.unflatten(logs.nan_to_num(nan=-torch.inf, neginf=-torch.inf), 1, (heads, -1)).logsumexp(2)


def _pages(blocks: Tensor, count: int, size: int, step: Step) -> Selection:
    """The selection of all pages of at most `count` blocks, by their mask [R, H, n]."""
    total = blocks.shape[-1]
    block = torch.arange(total, dtype=torch.int32, device=blocks.device)
    chosen = torch.where(blocks, block, total).sort(-1).values[..., : min(count, total)]  # [R, H, K]
    per = min(size // step.page_size, step.max_pages)
    pages = chosen[..., None] * per + torch.arange(per, dtype=torch.int32, device=blocks.device)
    pages = pages.flatten(-2)
    return Selection(pages.masked_fill(pages > step.last_pages[:, None, None], -1).int())
