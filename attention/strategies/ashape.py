"""The A-shape: sinks and a local window, with the end of the prompt reading everything (tri-shape)."""

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

    The static baseline of MInference (arXiv 2407.02490) and, with its dense last rows, the tri-shape of SCBench (arXiv
    2412.10319). It looks at nothing, so it is the cheapest and the blindest; one query of each row tells what it lost.
    """

    sink: Tokens = 128
    local: Tokens = 1024
    last_rows_dense: Tokens = 2

    def choose(self, q: Tensor, context: Context) -> tuple[Tensor, None]:
        step = context.step
        return torch.zeros(step.num_rows, q.shape[1], step.max_pages, dtype=torch.bool, device=q.device), None
