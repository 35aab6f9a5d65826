"""Steps, requests and outputs of an engine, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keysift.engine import Engine, Finish, Output, SamplingParams, TokenOutput
from keysift.kvcache.tiers.device import DeviceTier

Make = Callable[..., Engine]


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 259, (length,), generator=generator).tolist())


def greedy(count: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **fields)


def drain(engine: Engine) -> list[Output]:
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def said(outputs: list[Output], request_id: str) -> list[int]:
    mine = [output for output in outputs if output.request_id == request_id]
    return [token for output in mine if isinstance(output, TokenOutput) for token in output.token_ids]


def finish_of(outputs: list[Output], request_id: str) -> Finish:
    (finish,) = (output for output in outputs if isinstance(output, Finish) and output.request_id == request_id)
    return finish


def keys_and_values(engine: Engine, request_id: str) -> Tensor:
    """Keys and values [2, L, n, Hkv, D] in the cache of a running request's prompt of n tokens."""
    (sequence,) = (running for running in engine.scheduler.running if running.request.request_id == request_id)
    assert sequence.handle is not None
    tier = engine.cache.tier
    assert isinstance(tier, DeviceTier)
    frames = engine.cache._frames[sequence.handle]
    pages = torch.stack([tier.k[:, frames], tier.v[:, frames]])  # [2, L, F, Hkv, S, D]
    return pages.transpose(3, 4).flatten(2, 3)[:, :, : sequence.prompt_len]
