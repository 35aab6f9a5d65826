"""Measurement of one cell: warm-up, undisturbed runs, and a separate pass under a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from keysift.attention import Part, Stretch

from ...engine import Engine
from ...errors import InvalidRequest, ResourceExhausted
from ...request import Request, SamplingParams
from ..variants import Variant
from .clock import Clock
from .drive import Run, run
from .peak import PeakMemory
from .prompts import Prompts
from .quiet import Watch, cpu_share, disturbed
from .settings import Cell, Profile
from .summary import summary

OnPass = Callable[[], None]
"""Called after each pass."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A run, and the load that other processes put on the machine."""

    run: Run
    cpu_share: float
    others: float
    disturbed: bool


def settle(devices: Iterable[torch.device]) -> None:
    """Wait for the accelerators among the devices."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class Bench:
    """An engine without other requests, and the prompts to run on it."""

    def __init__(self, engine: Engine, settings: Profile, prompts: Prompts) -> None:
        self.engine, self.settings, self._prompts = engine, settings, prompts

    def requests(self, cell: Cell) -> list[Request]:
        """The cell's prompts, greedy and of full length, past the prefix cache."""
        prompts = self._prompts.batch(cell.batch_size, cell.input_len)
        return [self._request(str(number), prompt, cell.variant) for number, prompt in enumerate(prompts)]

    def _request(self, name: str, prompt: tuple[int, ...], variant: Variant) -> Request:
        params = SamplingParams(max_new_tokens=self.settings.output_len, ignore_eos=True)
        return Request(name, prompt, params, variant.name, variant.args, bypass_prefix_cache=True)

    def check(self, cell: Cell) -> None:
        """Raise `InvalidRequest` or `Unsupported` if the cell cannot run."""
        engine, tokens = self.engine, cell.input_len + self.settings.output_len
        if tokens > (limit := engine.model.max_model_len):
            most = limit - self.settings.output_len
            raise InvalidRequest(
                "input_lens",
                f"at most {most} tokens beside output_len {self.settings.output_len} (max_model_len is {limit}), "
                f"got {cell.input_len}",
            )
        try:
            engine.check(self.requests(cell)[0])
        except ResourceExhausted as error:
            raise InvalidRequest("input_lens", f"fewer tokens than {cell.input_len} ({error})") from None
        self._check_batch(cell, tokens)

    def _check_batch(self, cell: Cell, tokens: int) -> None:
        engine = self.engine
        pages, room = cell.batch_size * engine.cache.spec.pages_for(tokens), engine.cache.allocator.total
        if pages > room:
            raise InvalidRequest(
                "batch_sizes",
                f"{cell.batch_size} prompts of {cell.input_len} tokens need {pages} pages, the cache has {room} "
                f"(kv_memory), got {cell.batch_size}",
            )
        if cell.batch_size > (most := engine.config.max_num_seqs):
            raise InvalidRequest("batch_sizes", f"at most max_num_seqs ({most}), got {cell.batch_size}")

    def passes(self) -> int:
        """Passes of a cell if no run is disturbed."""
        return self.settings.warmup + self.settings.runs + 1

    def measure(self, cell: Cell, on_pass: OnPass) -> dict[str, Any]:
        """The cell's row. Raises `KeysiftError` if a request does not run to its end."""
        for _ in range(self.settings.warmup):
            run(self.engine, self.requests(cell))
            on_pass()
        memory = PeakMemory(*dict.fromkeys(self.engine.model.devices))
        attempts = self._undisturbed(cell, on_pass)
        peak = memory.bytes()
        shares = self._shares(cell)
        on_pass()
        return {
            "runs": len(attempts),
            "disturbed": any(attempt.disturbed for attempt in attempts),
            "cpu_share": min(attempt.cpu_share for attempt in attempts),
            "others_share": max(attempt.others for attempt in attempts),
            **summary([attempt.run for attempt in attempts]),
            "peak_memory_bytes": peak,
            "peak_memory_scope": memory.scope,
            "kv_bytes": self._kv_bytes(cell),
            "shares": shares,
        }

    def _undisturbed(self, cell: Cell, on_pass: OnPass) -> list[Attempt]:
        """The wanted number of undisturbed runs, completed with the least disturbed if there were too few."""
        wanted, attempts = self.settings.runs, list[Attempt]()
        most = max(wanted, self.settings.attempts)
        while len(attempts) < most and sum(not attempt.disturbed for attempt in attempts) < wanted:
            attempts.append(self._attempt(cell))
            on_pass()
        return sorted(attempts, key=lambda attempt: (attempt.disturbed, attempt.others - attempt.cpu_share))[:wanted]

    def _attempt(self, cell: Cell) -> Attempt:
        watch, requests = Watch(), self.requests(cell)
        done = run(self.engine, requests)
        share, others = cpu_share(done), watch.others()
        on_cpu = self.engine.model.device.type == "cpu"
        return Attempt(done, share, others, disturbed(share, others, on_cpu=on_cpu))

    def _shares(self, cell: Cell) -> dict[Stretch, dict[Part, float]]:
        """Seconds of each part of the steps, from a separate pass, as tracing takes time itself."""
        devices = dict.fromkeys(self.engine.model.devices)
        clock = Clock(lambda: settle(devices))
        with self.engine.watched(clock):
            run(self.engine, self.requests(cell), clock)
        return clock.shares()

    def _kv_bytes(self, cell: Cell) -> int:
        """Bytes of the keys and values of all prompts and generated tokens, over all ranks."""
        spec = self.engine.cache.spec
        return (
            self.engine.model.ranks
            * cell.batch_size
            * spec.pages_for(cell.input_len + self.settings.output_len)
            * spec.kv_bytes
        )
