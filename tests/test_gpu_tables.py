"""What `benchmarks.gpu` makes of its numbers: rates, medians, aims, oracles, and the problems of its tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu import clock, correctness, decode, prefill
from benchmarks.gpu.clock import Clock, causal_pairs
from benchmarks.gpu.flex import Flex
from benchmarks.gpu.oracles import Pages
from benchmarks.gpu.rows import Aim, guarded
from benchmarks.lib.layer import Layer, Source
from benchmarks.lib.prompt import Prompt
from keysift.kvcache.ops.dispatch import _backend


def test_rates() -> None:
    assert causal_pairs(4) == 1 + 2 + 3 + 4
    assert clock.gb_per_s(3e9, 2.0) == 1.5
    assert clock.tflop_per_s(1e9, 128, 0.5) == pytest.approx(4 * 1e9 * 128 / 0.5 / 1e12)


def test_runs_on_a_gpu_are_medians_of_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events here tell what the work says it took: 3 ms, but for a run that was slow."""
    now = [0.0]

    class Event:
        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    calls = []

    def work() -> None:
        calls.append(1)
        now[0] += 300.0 if len(calls) == 10 else 3.0

    monkeypatch.setattr(clock, "_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timer = Clock(torch.device("cuda"), runs=3)
    assert timer.seconds(work) == pytest.approx(0.003)
    assert len(calls) == 3 + 1 + 3 * round(0.05 / 0.003)


def test_cold_caches_are_no_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    event = type("Event", (), {"record": lambda self: setattr(self, "at", now[0])})
    event.elapsed_time = lambda self, other: other.at - self.at  # type: ignore[attr-defined]

    def spend(milliseconds: float) -> None:
        now[0] += milliseconds

    monkeypatch.setattr(clock, "_event", event)
    monkeypatch.setattr(Clock, "_evict", lambda self: spend(50))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timer = Clock(torch.device("cuda"), runs=2)
    assert timer.seconds(lambda: spend(4), cold=True) == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("value", "on_gpu", "verdict"),
    [(9, True, "met"), (7, True, "missed"), (9, False, "not measured"), (None, True, "not measured")],
)
def test_aims(value: float | None, on_gpu: bool, verdict: str) -> None:
    assert Aim("at least", value, 8).verdict(on_gpu) == verdict


def test_an_aim_may_be_an_upper_bound() -> None:
    assert [Aim("", value, 1.5, False).verdict(True) for value in (1.4, 1.6)] == ["met", "missed"]


def test_aims_of_a_prompt() -> None:
    def row(what: str, ms: float, rate: float, choose: float | None = None, tokens: int = 1 << 17) -> dict[str, Any]:
        return {"what": what, "tokens": tokens, "ms": ms, "TFLOP/s": rate, "choose_ms": choose}

    rows = [row("torch flash", 200, 400), row("torch cudnn", 160, 500), row("dense", 190, 425)]
    rows += [
        row("flexprefill 0.95", 32, 350, 8),
        row("flexprefill 0.9", 50, 400, 16),
        row("sift", 1, 1, 1, tokens=8192),
    ]
    rows += [{"what": "sampleattention 0.95", "tokens": 1 << 17, "error": "out of memory"}]
    found = {aim.text: (aim.value, aim.verdict(True)) for aim in prefill.aims(rows)}
    assert found["our least rate on kept pairs at 128k, against SDPA's dense rate"] == (0.7, "met")
    assert found["flexprefill 0.95 at 128k, times faster than SDPA"] == (5.0, "met")
    assert found["flexprefill 0.9 at 128k, times faster than SDPA"] == (3.2, "missed")
    assert found["flexprefill 0.9 at 128k, choosing against SDPA"] == (0.1, "missed")
    assert found["flexprefill 0.95 at 128k, choosing against SDPA"] == (0.05, "met")
    assert found["sift at 128k, choosing against SDPA"] == (None, "not measured")
    assert found["sampleattention 0.95 at 128k, choosing against SDPA"] == (None, "not measured")


def test_aims_of_decoding_leave_shared_pages_out() -> None:
    fixed = {"batch": 16, "context": 1 << 17}
    rows: list[dict[str, Any]] = [{"what": "copy within the device", "GB/s": 1.0}]
    rows += [{"what": "dense", **fixed, "shared": True, "us": 800.0, "of copy": 1.4}]
    rows += [{"what": "quest 2048", **fixed, "shared": True, "us": 80.0, "of copy": 0.1, "graph us": 40.0}]
    found = {aim.text: aim.value for aim in decode.aims(rows)}
    assert found["dense at batch 16, best share of the copy bandwidth"] is None
    assert found["quest 2048 at 128k, batch 16, times faster than our dense"] == 10.0
    assert found["quest 2048 from a CUDA graph at 128k, batch 16, times faster than our dense"] is None


def test_what_fails_is_told_and_the_others_go_on() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"what": "one"}
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    assert list(guarded({"what": "rest"}, rows())) == [
        {"what": "one"},
        {"what": "rest", "error": "OutOfMemoryError: CUDA out of memory"},
    ]


@pytest.mark.parametrize("wrong", [math.nan, 5.0])
def test_a_kernel_that_sees_what_nobody_may_is_found(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    pages = Pages.make((8, 2, 64), (70, 3, 48), torch.float32, torch.device("cpu"))
    error, limit = correctness.check_few_codes(pages)
    assert error <= limit
    right = correctness.code_masses

    def off(*args: Any, **kwargs: Any) -> torch.Tensor:
        masses = right(*args, **kwargs)
        return masses if _backend.get() == "reference" else masses.masked_fill(masses.isneginf(), wrong)

    monkeypatch.setattr(correctness, "code_masses", off)
    error, limit = correctness.check_few_codes(pages)
    assert error > limit


@pytest.mark.parametrize("name", ["page_masses", "page_bounds", "code_masses"])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pages = Pages.make((8, 2, 64), (70, 3, 48), torch.float32, torch.device("cpu"))
    check = {
        "page_masses": correctness.check_masses,
        "page_bounds": correctness.check_bounds,
        "code_masses": correctness.check_codes,
    }[name]
    error, limit = check(pages)
    assert error <= limit
    right = getattr(correctness, name)

    def off(*args: Any, **kwargs: Any) -> torch.Tensor:
        masses = right(*args, **kwargs)
        masses[0, 0, 1] += 0.01
        return masses

    monkeypatch.setattr(correctness, name, off)
    error, limit = check(pages)
    assert error > limit


def test_nan_and_infinity_are_errors() -> None:
    worst, inf = correctness.worst, math.inf
    assert worst(torch.tensor([1.0, -inf]), torch.tensor([1.0, -inf])) == 0
    assert worst(torch.tensor([math.nan]), torch.tensor([1.0])) == inf
    assert worst(torch.tensor([-inf]), torch.tensor([1.0])) == inf
    assert worst(torch.tensor([11.0, 0.5]), torch.tensor([10.0, 0.25])) == 0.25


@pytest.fixture(scope="module")
def prompt() -> Any:
    return Prompt.make((4, 2, 32), 640, 256)


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_fixed_rule_keeps_its_share(prompt: Any, share: float) -> None:
    selections = prompt.choose(prefill.Heaviest(share=share))
    assert prompt.density(selections) == pytest.approx(share, abs=0.03)
    for selection, (_, context) in zip(selections, prompt.chunks(), strict=True):
        pages = selection.pages
        assert (selection.mask(context.step.max_pages).sum(-1) == selection.counts()).all(), "unique"
        assert (pages.amax(-1) == context.step.last_pages[:, None]).all(), "causal, the own pages among them"


def test_kept_pairs_are_counted_for_every_query_head(prompt: Any) -> None:
    causal = causal_pairs(640) * 4
    whole = [context.all() for _, context in prompt.chunks()]
    assert prefill.kept_pairs(prompt, whole, 4) == causal
    some = prompt.choose(prefill.Heaviest(share=0.3))
    assert prefill.kept_pairs(prompt, some, 4) == pytest.approx(prompt.density(some) * causal)


def test_flex_reads_the_pages_that_we_read(prompt: Any) -> None:
    selections = prompt.choose(prefill.Heaviest(share=0.3))
    flex = Flex(torch.device("cpu"))
    mask, kept = flex.mask(prompt, selections, 64, (64, 16))
    assert kept == prefill.kept_pairs(prompt, selections, 4)
    dense = mask.to_dense()[0]  # [Hq, Q, K]
    first = 0
    for selection in selections:
        rows = selection.pages.shape[0]
        assert torch.equal(dense[:, first : first + rows].transpose(0, 1).bool(), selection.mask(40))
        first += rows
    wide, more = flex.mask(prompt, selections, 64, (128, 128))
    blocks = torch.nn.functional.max_pool2d(dense.float(), (2, 8))
    assert torch.equal(wide.to_dense()[0].float(), blocks)
    assert kept < more < causal_pairs(640) * 4


@pytest.mark.parametrize("shared", [False, True])
def test_sequences_of_a_layer_decode_alike(shared: bool) -> None:
    source = Source.make((4, 2, 32), 576)
    layer = Layer.make(source, torch.float32, 512, [], batch=3, shared=shared, new=2, chunk=256)
    layer = layer.after(source)
    context = layer.cache.context(0, layer.step)
    out = layer.attend(context.all())
    k, v = decode._in_a_row(layer, shared)
    peer = torch.nn.functional.scaled_dot_product_attention(layer.q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    assert k.shape == (3, 2, 514, 32)
    torch.testing.assert_close(out, peer, rtol=1e-4, atol=1e-4)
    assert layer.cache.free_pages == 0
    assert (layer.step.table[0, 0, :32] == layer.step.table[1, 0, :32]).all() == shared
