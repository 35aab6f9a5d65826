"""A-shape: attention sinks and a local window, with dense last rows (tri-shape)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.kvcache import Context

from ..prompt import PromptStrategy
from ..strategy import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class AShape(PromptStrategy):
    """The first tokens and every query's last ones; only the prompt's last rows read everything.

    The static baseline of MInference and, with its dense last rows, the tri-shape of SCBench. The cheapest selection,
    as it depends on no query; one query of each row is probed, only to report the coverage.
    """

    source = "Jiang et al., MInference 1.0, arXiv 2407.02490; Li et al., SCBench, arXiv 2412.10319"
    sink: Tokens = 128
    local: Tokens = 1024
    last_rows_dense: Tokens = 2

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, None]:
        step = context.step
        return torch.zeros(step.num_rows, q.shape[1], step.max_pages, dtype=torch.bool, device=q.device), None
