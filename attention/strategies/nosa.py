"""NOSA's locality bound on selections from token to token, for models that were not trained for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from keysift.kvcache import CacheSpec, Context, Evidence, Selection
from keysift.kvcache.index import BoundIndex, CodeIndex, FlatIndex, IndexSpec, MeanIndex

from ..ops.steady_pages import SteadyPages, steady_pages
from ..probe import on_device
from ..strategy import LARGEST, Positive, Share, Tokens, option
from ..token import TokenStrategy, check_index_options
from .nosa_trained import NosaTrained

TRAINED = NosaTrained()
"""With the options of the published checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nosa(TokenStrategy):
    """The pages that the last token read, except for a few that this one replaces by heavier ones.

    The paper trains a score that no query changes, so that most pages stay. Here the score follows from the sequence's
    own last tokens, a moving average of each page's share, whatever the model: at most `m_max` pages of a layer and KV
    head come in with a token, and one more where its own page begins. A page that is asked for and refused stands in by
    its means; where refused pages would hold more than `epsilon`, more come in all the same. The first token after a
    prompt takes the heaviest pages.
    """

    source = "Huang et al., NOSA: Native and Offloadable Sparse Attention, arXiv 2510.13602"
    epsilon: Share = option(0.02, "share of the attention that refused pages may hold, else more come in; 1: no limit")
    m_max: Annotated[int, Field(ge=-1, le=LARGEST)] = option(
        4, "pages that may come in with a token, for each layer and KV head; -1: any number"
    )
    queried: Tokens = option(512, "most tokens that a token asks for, in whole pages, within the budget; others stay")
    beta: Share = option(0.9, "weight of the past in the average share of a page")
    delta: Annotated[float, Field(ge=-math.inf, le=10.0)] = option(
        math.log(1.25),
        "log of the factor by which a page's share exceeds that of the page which it replaces, now and on average; "
        "-inf: any page may replace any",
    )
    refused: Literal["drop", "mean"] = option(
        "mean",
        "pages that were asked for and did not come in: dropped, or estimated by mean keys and values, which kept "
        "slightly more top tokens when measured (97.1 against 96.9 %)",
    )
    index: Literal["flat", "codes", "summary", "bound"] = option(
        "codes", "source of the shares: all keys exactly, their codes, the pages' mean keys, or their bounds"
    )
    candidates: Positive = option(512, "of codes: pages whose codes are read, the heaviest by the bounds of all")

    replayable = True
    trained: bool = option(
        True, "where keys carry NOSA's learned bias, choose as the model was trained to: nosa-trained, by its defaults"
    )

    def __post_init__(self) -> None:
        """Raises `ValueError` for an option of another index than the chosen one."""
        TokenStrategy.__post_init__(self)
        check_index_options(self, self.index, {"candidates": "codes"})

    def check(self, spec: CacheSpec) -> None:
        if self.trained and spec.bias_channels:
            TRAINED.check(spec)

    def decode(self, q: Tensor, context: Context) -> Selection:
        if self.trained and context.spec.bias_channels:
            return TRAINED.decode(q, context)
        return TokenStrategy.decode(self, q, context)

    @property
    def remembers(self) -> bool:
        return True

    def index_spec(self) -> IndexSpec:
        specs: dict[str, IndexSpec] = {
            "flat": FlatIndex(),
            "codes": CodeIndex(self.candidates),
            "summary": MeanIndex(),
            "bound": BoundIndex(),
        }
        return specs[self.index]

    def masses(self, q: Tensor, context: Context) -> Tensor:
        return context.page_mass(q)

    def choose(self, masses: Tensor, context: Context) -> Selection:
        turns = context.turns()
        chosen = _joined([self._turn(masses, context, rows) for rows in turns], turns, context)
        return Selection(
            chosen.pages,
            estimated=chosen.refused if self.refused == "mean" and chosen.refused.shape[2] else None,
            evidence=Evidence(
                coverage=chosen.kept if context.estimates_mass else None,
                overlap=chosen.overlap,
                bound_exceeded=chosen.bound_exceeded,
            ),
        )

    def _turn(self, masses: Tensor, context: Context, rows: Sequence[int]) -> SteadyPages:
        """Choose for these rows and store their decode history: pages read and average shares."""
        step, zones = context.step, self.zones(context.step)
        inputs, index = (masses, zones.firsts, step.last_pages), None
        if len(rows) < step.num_rows:
            index = on_device(list(rows), step)
            inputs = masses[index], zones.firsts[index], step.last_pages[index]
        chosen = steady_pages(
            *inputs,
            *context.previous(index),
            heads=context.spec.num_kv_heads,
            sinks=zones.sinks,
            window=zones.window,
            budget=self.budget // step.page_size,
            queried=self.queried // step.page_size,
            most=self.m_max,
            factor=math.exp(self.delta),
            keep=self.beta,
            epsilon=self.epsilon,
        )
        context.remember(index, chosen.read, chosen.averages)
        return chosen


def _joined(parts: list[SteadyPages], turns: list[list[int]], context: Context) -> SteadyPages:
    """The choices of all turns, rows in the step's order."""
    if len(parts) == 1:
        return parts[0]
    rows = [row for turn in turns for row in turn]
    order = on_device(sorted(range(len(rows)), key=rows.__getitem__), context.step)
    return SteadyPages(*(torch.cat(part)[order] for part in zip(*parts, strict=True)))
