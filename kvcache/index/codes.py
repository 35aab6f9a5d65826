"""An index of quantised keys: page bounds choose the pages whose codes are scanned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.page_masses import code_masses
from .protocol import Stateless

if TYPE_CHECKING:
    from ..context import Context
    from ..spec import CacheSpec


@dataclass(frozen=True, slots=True)
class CodeIndex(Stateless):
    """Masses by the codes of the most promising pages, which the bounds of all pages choose: see `Codes`."""

    candidates: int = 512
    """Pages of each KV head whose codes are read."""

    def make(self, spec: CacheSpec) -> CodeIndex:
        if not spec.code_bits:
            raise ValueError("codes: the cache keeps none (code_bits)")
        return self

    def masses(self, q: Tensor, context: Context) -> Tensor:
        tier = context.tier
        return code_masses(
            q,
            *context.own_page(),
            tier.codes(context.layer),
            context.step.table,
            context.step.starts,
            scale=context.spec.softmax_scale,
            candidates=self.candidates,
        )
