"""Recorded decode steps: a replay gives the results of the same step run op by op."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, PreTrainedConfig, Qwen3Config, masking_utils

from keysift.attention import Strategy, find
from keysift.engine import Engine, InvalidRequest, Output, Request, TokenOutput
from keysift.engine.execution import graphs
from keysift.engine.execution.forward import ForwardInput
from keysift.engine.execution.recorder import WAIT_WARNING, CudaRecorder, WaitsForDevice, check_waits
from keysift.engine.model.cpu import swap
from keysift.kvcache import Context, DeviceTier, Phase, Selection, Span
from tests.engine.driver import Make, drain, finish_of, greedy, said, tokens
from tests.models import llama
from tests.replaying import Recorder
from tests.strategies import unnamed

STRATEGIES = [
    "dense",
    "streaming window=40 sink=8",
    "topk top_k=5 sink=8 window=24",
    "quest budget=32 dense_below=0 dense_layers=1",
    "quest budget=32 dense_below=0 certify=true",
    "retrieval budget=32 sink=8 window=24 dense_below=0",
    "retrieval budget=32 sink=8 window=24 dense_below=80 certify=true",
    "retrieval budget=32 sink=8 window=24 dense_below=0 index=flat",
    "retrieval budget=32 sink=8 window=24 dense_below=0 index=summary certify=true",
    "infllmv2 topk=3 window_size=16 block_size=16 kernel_size=8 kernel_stride=8 dense_below=0",
    "nosa budget=32 queried=16 sink=8 window=24 m_max=1 dense_below=0",
    "nosa budget=32 queried=16 sink=8 window=24 epsilon=1 refused=drop index=summary dense_below=60 dense_layers=1",
]
STRATEGIES += [each for each in unnamed(STRATEGIES, 8) if find(each.split()[0]).replayable]
PROMPTS = [50, 131, 64, 9, 83]
"""Lengths; one ends with a page, so that the first token begins one."""


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 259, "max_position_embeddings": 512}
MODELS: dict[str, PreTrainedConfig] = {
    "llama3 rope": llama(
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "mistral": MistralConfig(**SHAPE, **HEADS, initializer_range=0.2, sliding_window=20),
    "qwen3": Qwen3Config(
        **SHAPE, **HEADS, initializer_range=0.2, sliding_window=20, use_sliding_window=True, max_window_layers=1
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native modules, as on a GPU: their work would not show among the ops of torch."""
    monkeypatch.setattr(swap, "native_kernel", lambda: None)


def start(engine: Engine, *, prompts: list[int] = PROMPTS, count: int = 24) -> list[str]:
    """One request for each prompt, which end at different times."""
    for i, length in enumerate(prompts):
        engine.add(Request(f"r{i}", tokens(length, seed=i), greedy(count - 3 * i, logprobs=2)))
    return [f"r{i}" for i in range(len(prompts))]


def recorded(engine: Engine) -> Recorder:
    recorder = Recorder()
    engine.runner.record(recorder)
    return recorder


def arguments(strategy: str) -> dict[str, Any]:
    name, *options = strategy.split()
    return {"strategy": name, "strategy_args": tuple(f"{name}.{option}" for option in options)}


def assert_same(got: list[Output], expected: list[Output], ids: list[str]) -> None:
    """Equal tokens, log probabilities and statistics of attention."""
    for i in ids:
        assert said(got, i) == said(expected, i)
        mine, theirs = (finish_of(outputs, i).sparsity for outputs in (got, expected))
        for name in mine.__dataclass_fields__:
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-5), name
    assert logprobs(got) == pytest.approx(logprobs(expected), abs=1e-4)


def logprobs(outputs: list[Output]) -> list[float]:
    spoken = [output for output in outputs if isinstance(output, TokenOutput)]
    return [choice.logprob for output in spoken for each in output.logprobs for choice in each]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_replayed_step_is_the_step(make: Make, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """Requests of different lengths come and go, and outgrow the pages of a recording."""
    monkeypatch.setattr(graphs, "MIN_PAGES", 8)
    fields = {"backend": "reference", "page_size": 8, **arguments(strategy)}
    plain, replaying = make(**fields), make(**fields)
    recorder = recorded(replaying)
    ids = start(plain)
    start(replaying)
    assert_same(drain(replaying), drain(plain), ids)
    assert recorder.replayed > 2 * recorder.recorded > 2


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_shapes_replay_too(
    make: Make, write_model: Callable[[PreTrainedConfig], Path], name: str
) -> None:
    fields = {"model": str(write_model(MODELS[name])), "backend": "reference", "page_size": 8}
    plain, replaying = make(**fields), make(**fields)
    recorder = recorded(replaying)
    ids = start(plain)
    start(replaying)
    assert_same(drain(replaying), drain(plain), ids)
    assert recorder.replayed


def test_padding_touches_no_page_of_a_sequence(make: Make) -> None:
    """With three rows of four, every frame but the padding's holds after the step what it holds in a plain engine."""
    plain, replaying = make(backend="reference"), make(backend="reference")
    recorder = recorded(replaying)
    for engine in (plain, replaying):
        start(engine, prompts=[20, 40, 47])
        for _ in range(9):
            engine.step()
    assert recorder.replayed
    for one, other in zip(pages(replaying), pages(plain), strict=True):
        torch.testing.assert_close(one[:, :-1], other[:, :-1], equal_nan=True)


def pages(engine: Engine) -> list[Tensor]:
    tier = engine.cache.tier
    assert isinstance(tier, DeviceTier)
    return [tier.k, tier.v, tier._descriptions._summaries]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting(Strategy):
    """Reads the context's length on the host, but declares that it can be replayed."""

    __module__ = "keysift.tests"  # as one of ours: what a plug-in selects is read on a CPU, which no recording allows
    replayable = True

    def decode(self, q: Tensor, context: Context) -> Selection:
        return context.zones(sink=0, window=context.step.spans[0].start // 2)


def test_a_strategy_that_reads_on_the_host_is_detected(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the tests above could not fail."""
    plain, replaying = make(backend="reference", page_size=8), make(backend="reference", page_size=8)
    for engine in (plain, replaying):
        engine.preparation.default = Counting()
    recorded(replaying)
    start(plain, prompts=[50])
    start(replaying, prompts=[50])
    assert logprobs(drain(replaying)) != pytest.approx(logprobs(drain(plain)), abs=1e-4)


@pytest.mark.parametrize("strategy", ["retrieval index=ivf dense_below=0", "retrieval index=graph"])
def test_an_index_on_the_host_runs_op_by_op(make: Make, strategy: str) -> None:
    engine = make(backend="reference", **arguments(strategy))
    recorder = recorded(engine)
    start(engine, prompts=[50], count=6)
    drain(engine)
    assert recorder.recorded == 0 or strategy.endswith("graph")


def test_an_index_of_another_request_takes_notes_of_every_step(make: Make) -> None:
    """While it lives, dense requests run op by op too; afterwards they are replayed again."""
    engine = make(backend="reference")
    recorder = recorded(engine)
    engine.add(Request("noted", tokens(40), greedy(4), strategy="retrieval", strategy_args=("retrieval.index=ivf",)))
    engine.add(Request("dense", tokens(40), greedy(20)))
    while "noted" in engine._jobs:
        engine.step()
    assert recorder.recorded == 0
    drain(engine)
    assert recorder.replayed > 0


def test_a_watched_step_runs_op_by_op(make: Make) -> None:
    engine = make(backend="reference")
    recorder = recorded(engine)
    start(engine, prompts=[20], count=5)
    with engine.watched(lambda name, layer=None: nullcontext()):
        drain(engine)
    assert recorder.recorded == 0


NOSA = "nosa budget=32 queried=16 sink=8 window=24 m_max=1 dense_below=0"


def test_the_decode_history_may_move(make: Make) -> None:
    """More sequences need more memory; then the first is alone again, in steps of a kind that was recorded before."""
    fields = {"backend": "reference", "page_size": 8, **arguments(NOSA)}
    plain, replaying = make(**fields), make(**fields)
    recorder = recorded(replaying)
    outputs = []
    for engine in (plain, replaying):
        engine.add(Request("long", tokens(80), greedy(40, logprobs=2)))
        begun = [output for _ in range(10) for output in engine.step()]
        for i in range(3):
            engine.add(Request(f"short{i}", tokens(40, seed=i), greedy(8, logprobs=2)))
        outputs.append(begun + drain(engine))
    assert_same(outputs[1], outputs[0], ["long", "short0", "short1", "short2"])
    assert recorder.recorded >= 3
    assert recorder.replayed > 20


def test_a_recording_serves_later_requests(make: Make) -> None:
    engine = make(backend="reference", page_size=8, **arguments(NOSA))
    recorder = recorded(engine)
    counts = []
    for _ in range(3):
        start(engine, prompts=[50], count=12)
        drain(engine)
        counts.append((recorder.recorded, recorder.replayed))
    assert counts[0][0] == counts[2][0] == 1
    assert counts[2][1] > 2 * counts[0][1]


def test_a_sequence_that_was_only_replayed_is_forgotten_too(make: Make) -> None:
    """A later sequence of the same number would find its decode history."""
    fields = {"backend": "reference", "page_size": 8, **arguments(f"{NOSA} epsilon=1")}
    plain, replaying = make(**fields), make(**fields)
    recorder, outputs = recorded(replaying), []
    for engine in (plain, replaying):
        outputs.append([])
        for i, length in enumerate((90, 90, 90, 101)):
            params = greedy(12, logprobs=2)
            engine.add(Request(f"r{i}", tokens(length, seed=i), params, bypass_prefix_cache=True))
            outputs[-1] += drain(engine)
    assert recorder.replayed
    assert_same(outputs[1], outputs[0], ["r0", "r1", "r2", "r3"])


def test_a_kind_of_step_is_recorded_when_it_comes_for_the_third_time(make: Make) -> None:
    engine = make(backend="reference")
    recorder = recorded(engine)
    start(engine, prompts=[20], count=8)
    while not recorder.replayed:
        engine.step()
    assert len(engine._jobs["r0"].sequence.tokens) == 20 + 1 + graphs.MIN_USES


def test_several_tokens_of_one_sequence_run_op_by_op(make: Make) -> None:
    """Each needs the decode history of the one before it."""
    engine = make(backend="reference", **arguments(NOSA))
    recorder = recorded(engine)
    cache = engine.cache
    cache.reserve(sequence := cache.open(), 60)
    work = ForwardInput(Phase.DECODE, engine.default, tuple(Span(sequence, i, 1) for i in range(3)), [1, 2, 3], 0)
    for _ in range(graphs.MIN_USES + 1):
        engine.runner.compute(work, torch.arange(3))
    cache.release(sequence)
    assert recorder.recorded == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Strategy):
    """Waits for the device, but declares that it can be replayed."""

    __module__ = "keysift.tests"
    replayable = True

    def decode(self, q: Tensor, context: Context) -> Selection:
        return context.zones(sink=0, window=int(context.step.positions.max()))


def test_a_strategy_that_waits_is_left_to_itself(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    engine = make(backend="reference")
    recorder = recorded(engine)
    usual, engine.preparation.default = engine.default, Waiting()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            start(engine, prompts=[20], count=12)
            drain(engine)
    assert recorder.recorded == recorder.replayed == 0
    assert caplog.text.count("steps under waiting run kernel by kernel") == 1
    engine.preparation.default = usual
    start(engine, prompts=[20], count=12)
    drain(engine)
    assert recorder.replayed > 0


def test_without_memory_it_is_tried_again_later(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "RETRY_AFTER", 5)
    plain, engine = make(backend="reference"), make(backend="reference")
    recorder, attempts = Recorder(), []

    def tight(work: Callable[[], Any]) -> Any:
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recorder(work)

    engine.runner.record(tight)
    ids = start(plain, prompts=[20])
    start(engine, prompts=[20])
    with caplog.at_level(logging.WARNING):
        assert_same(drain(engine), drain(plain), ids)
    assert "dropped, as memory ran out" in caplog.text
    assert len(attempts) == 2
    assert 0 < recorder.replayed < 24 - graphs.RETRY_AFTER


def test_steps_run_kernel_by_kernel_if_recording_fails(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    plain, broken = make(backend="reference"), make(backend="reference")
    calls = []

    def refuse(work: Callable[[], object]) -> Any:
        calls.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    broken.runner.record(refuse)
    ids = start(plain)
    start(broken)
    with caplog.at_level(logging.WARNING):
        assert_same(drain(broken), drain(plain), ids)
    assert len(calls) == 1
    assert "kernel by kernel" in caplog.text
    assert "recording one failed" in caplog.text
    assert "not permitted" in caplog.text


def test_the_recordings_that_are_kept_are_few(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_RECORDED", 2)
    engine = make(backend="reference")
    recorder = recorded(engine)
    ids = start(engine)
    outputs = drain(engine)
    assert recorder.recorded > 2
    assert engine.runner.graphs is not None
    assert len(engine.runner.graphs._recorded) == 2
    assert all(finish_of(outputs, i).usage.completion_tokens for i in ids)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sync debug modes set so far, without a CUDA device."""
    chosen = ["default"]

    def choose(mode: str) -> None:
        chosen.append(mode)
        warnings.warn_explicit("Synchronization debug mode is a prototype feature", UserWarning, "torch.py", 1)

    monkeypatch.setattr("torch.cuda.get_sync_debug_mode", lambda: chosen[-1])
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", choose)
    return chosen


def wait_in(file: str, line: int) -> None:
    """The warning that torch gives of a wait in "warn" mode."""
    warnings.warn_explicit(WAIT_WARNING + " (Triggered internally)", UserWarning, file, line)


def test_waits_are_reported_with_their_lines(modes: list[str]) -> None:
    def work() -> None:
        assert modes == ["default", "warn"]
        for file, line in (("a/other.py", 3), ("b/mine.py", 12), ("a/other.py", 3)):
            wait_in(file, line)

    with pytest.raises(WaitsForDevice, match=r"in mine\.py:12, other\.py:3$"):
        check_waits(work)
    assert modes == ["default", "warn", "default"]


def test_waits_that_models_skip_while_recording_do_not_count(modes: list[str]) -> None:
    check_waits(lambda: wait_in(str(Path(masking_utils.__file__)), 776))
    assert modes[-1] == "default"


class Stream:
    """Stand-in for a CUDA stream that logs its waits."""

    def __init__(self, log: list[tuple[str, str]], name: str) -> None:
        self._log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self._log.append((self.name, other.name))


@pytest.mark.parametrize("error", [WaitsForDevice, torch.OutOfMemoryError])
def test_a_warm_up_that_fails_is_waited_for(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Kernels that it started may still read tensors that are freed next."""
    log: list[tuple[str, str]] = []
    monkeypatch.setattr("torch.cuda.Stream", lambda _: Stream(log, "own"))
    monkeypatch.setattr("torch.cuda.current_stream", lambda: Stream(log, "current"))
    for name in ("device", "stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda _: nullcontext())
    monkeypatch.setattr("torch.cuda.graph_pool_handle", object)

    def work() -> None:
        raise error("not here")

    with pytest.raises(error):
        CudaRecorder(torch.device("cuda"))(work)
    assert log == [("own", "current"), ("current", "own")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "cuda_graphs: false on cpu"),
        ({"kv_offload": "/tmp"}, "cuda_graphs: false with kv_offload"),
        ({"tensor_parallel_size": 2}, "cuda_graphs: false with tensor_parallel_size 2"),
    ],
)
def test_combinations_with_graphs_are_refused(make: Make, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(device="cpu", cuda_graphs=True, **fields)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_cuda_graphs_give_the_results_of_the_kernels(make: Make, strategy: str, device: str) -> None:
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("no second GPU")
    fields = {"page_size": 16, "device": device, **arguments(strategy)}
    plain, replaying = make(**fields), make(**fields, cuda_graphs=True)
    ids = start(plain)
    start(replaying)
    assert_same(drain(replaying), drain(plain), ids)
    assert replaying.runner.graphs is not None
    assert replaying.runner.graphs._recorded
    assert not replaying.runner.graphs._broken
