"""Load runs: arrivals, times, statistics, failed requests, prompts and configuration."""

from __future__ import annotations

import json
import math
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from keysift.engine import (
    Finish,
    FinishReason,
    InvalidRequest,
    KeysiftError,
    PromptInfo,
    SamplingParams,
    Sparsity,
    Timings,
    TokenOutput,
    Usage,
)
from keysift.engine.measure.evaluation.texts import documentation
from keysift.engine.measure.percentiles import p99, percentiles
from keysift.server.client import Client
from keysift.server.commands.flags import from_fields
from keysift.server.commands.load import prompts
from keysift.server.commands.load.report import Record, is_good, max_concurrent, parse_targets, report
from keysift.server.commands.load.run import Load, arrivals, load
from keysift.server.errors import Unauthenticated, Unavailable

from ..conftest import MAX_LEN, Run, Running

Measure = Callable[..., dict[str, Any]]


def quiet(done: int, failed: int) -> None:
    """No progress bar."""


@pytest.fixture
def measure(running: Running) -> Measure:
    """A small load on the tiny model's server."""

    def call(**fields: Any) -> dict[str, Any]:
        small = {"num_prompts": 6, "input_lens": (40, 90), "output_len": 5, "address": running.address}
        return load(Load(**small | fields), quiet)

    return call


def press_ctrl_c() -> None:
    """SIGINT to the main thread, as from a terminal: it ends any wait of that thread."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def finish(reason: FinishReason = FinishReason.LENGTH, error: str = "") -> Finish:
    read = Sparsity("dense", 0.5, 0.25, None, False, 100, 10, None, 0.0)
    return Finish("r", reason, Usage(10, 3, 4), Timings(0, 0, 0, 0, 0), read, error=error)


def completed(sent: float, *messages: tuple[float, int], number: int = 0) -> Record:
    """Record of a request sent at `sent`, with messages of (moment, number of tokens)."""
    record = Record(number, sent)
    record.add(PromptInfo("r", 10, 0, "dense", 0.0), sent)
    for now, count in messages:
        record.add(TokenOutput("r", "x" * count, (7,) * count), now)
    record.add(finish(), messages[-1][0])
    record.end(messages[-1][0])
    return record


# Arrivals


def test_arrivals_repeat_for_a_seed() -> None:
    assert arrivals(50, 3.0, 1.0, seed=4) == arrivals(50, 3.0, 1.0, seed=4) != arrivals(50, 3.0, 1.0, seed=5)
    assert arrivals(20, 3.0, 1.0, seed=4) == arrivals(50, 3.0, 1.0, seed=4)[:20]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_requested_rate_and_burstiness(burstiness: float) -> None:
    moments = arrivals(40_000, 8.0, burstiness, seed=0)
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert moments[0] == 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 8, rel=0.03)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_arrivals_are_exponential() -> None:
    gaps = sorted(later - earlier for earlier, later in pairwise(arrivals(20_000, 2.0, 1.0, seed=1)))
    furthest = max(abs((n + 1) / len(gaps) - (1 - math.exp(-2.0 * gap))) for n, gap in enumerate(gaps))
    assert furthest < 1.63 / math.sqrt(len(gaps))  # Kolmogorov and Smirnov, 1 %


def test_an_infinite_rate_is_everything_at_once() -> None:
    assert arrivals(3, math.inf, 1.0, seed=0) == [0, 0, 0]


def test_requests_count_from_their_arrival(measure: Measure) -> None:
    result = measure(num_prompts=12, request_rate=60.0, burstiness=0.5, seed=3)
    assert result["start_times"] == arrivals(12, 60.0, 0.5, seed=3)
    assert result["completed"] == 12
    assert (result["request_rate"], result["burstiness"]) == (60.0, 0.5)


# Times and statistics


def test_a_message_of_several_tokens() -> None:
    record = completed(1.0, (1.5, 1), (1.6, 1), (2.2, 3))
    assert (record.input_len, record.output_len) == (10, 5)
    assert record.ttft == pytest.approx(0.5)
    assert record.itl == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert record.e2el == pytest.approx(1.2)
    assert record.tpot == pytest.approx(0.7 / 4)
    assert record.error == ""


def test_one_token_has_no_time_per_token() -> None:
    record = completed(0.0, (0.5, 1))
    assert record.tpot is None
    assert is_good(record, {"tpot": 1.0})


def test_a_message_without_tokens_is_none() -> None:
    record = completed(0.0, (0.5, 0), (1.0, 1), (1.5, 1))
    assert (record.ttft, record.itl) == (1.0, [0.5])


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        (None, "the stream ended early"),
        (finish(FinishReason.CANCELLED), "cancelled"),
        (finish(FinishReason.ERROR, "no room"), "no room"),
    ],
)
def test_an_incomplete_stream_has_failed(last: Finish | None, problem: str) -> None:
    record = Record(0, 0.0)
    record.add(TokenOutput("r", "x", (7,)), 1.0)
    if last:
        record.add(last, 2.0)
    record.end(2.0)
    assert record.error == problem
    assert not is_good(record, {})


def test_an_answer_without_a_token_is_none() -> None:
    record = Record(0, 0.0)
    record.add(finish(FinishReason.STOP), 1.0)
    record.end(1.0)
    assert not is_good(record, {"ttft": 1e9})
    assert record.error == "no token came"


def test_statistics_are_those_of_numpy() -> None:
    seconds = [((7 * n) % 101) ** 1.5 / 1000 for n in range(250)]
    ms = 1e3 * np.array(seconds)
    found = percentiles("itl", seconds)
    assert list(found) == ["mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms"]
    assert list(found.values()) == pytest.approx([ms.mean(), np.median(ms), ms.std(), np.percentile(ms, 99)])
    assert p99([3.0]) == 3.0
    assert percentiles("ttft", [])["p99_ttft_ms"] is None


def test_the_largest_number_of_concurrent_requests() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.7)]
    records = [Record(n, start, ended=stop) for n, (start, stop) in enumerate(spans)]
    assert max_concurrent(records) == 3
    assert max_concurrent(records[:3]) == 2
    assert max_concurrent([]) == 0


def test_goodput_is_what_meets_every_target() -> None:
    records = [
        completed(0.0, (0.4, 1), (0.5, 1), number=0),  # good
        completed(0.0, (0.6, 1), (0.7, 1), number=1),  # first token too late
        completed(1.0, (1.1, 1), (1.4, 1), number=2),  # second token too late
        completed(1.0, (1.5, 1), (1.7, 1), number=3),  # on the line in both
        Record(4, 0.0, ended=2.0, error="refused"),
    ]
    result = report(records, {"ttft": 500.0, "tpot": 200.001}, duration=4.0)
    assert result["request_goodput"] == pytest.approx(2 / 4.0)
    assert result["request_throughput"] == pytest.approx(4 / 4.0)
    assert (result["completed"], result["failed"]) == (4, 1)
    assert report(records, {"e2el": 400.0}, duration=4.0)["request_goodput"] == pytest.approx(1 / 4.0)
    assert report(records, {}, duration=4.0)["request_goodput"] is None


def test_the_report_of_a_handmade_run() -> None:
    failed = Record(1, 0.5, 99, ended=0.6, error="refused")
    result = report([completed(0.0, (1.0, 1), (3.0, 2)), failed, completed(1.0, (3.0, 1), number=2)], {}, duration=4.0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 4)
    assert (result["output_throughput"], result["total_token_throughput"]) == (1.0, 6.0)
    assert (result["mean_ttft_ms"], result["median_ttft_ms"], result["std_ttft_ms"]) == (1500, 1500, 500)
    assert (result["mean_tpot_ms"], result["mean_itl_ms"], result["mean_e2el_ms"]) == (1000, 1000, 2500)
    assert result["p99_ttft_ms"] == pytest.approx(1990)
    assert (result["input_lens"], result["output_lens"]) == ([10, 99, 10], [3, 0, 1])
    assert (result["ttfts"], result["itls"]) == ([1.0, 0.0, 2.0], [[1.0, 1.0], [], []])
    assert (result["start_times"], result["errors"]) == ([0.0, 0.5, 1.0], ["", "refused", ""])
    assert (result["prefill_density"], result["kv_bytes_read"], result["total_cached_tokens"]) == (0.5, 200, 8)


# Over a real connection


def test_every_request_is_counted_and_timed(measure: Measure) -> None:
    result = measure(goodput=("ttft:60000", "e2el:60000"))
    assert (result["completed"], result["failed"], result["errors"]) == (6, 0, [""] * 6)
    assert result["input_lens"] == [40, 90] * 3
    assert result["output_lens"] == [5] * 6
    assert result["total_input_tokens"] == 3 * (40 + 90)
    assert result["total_output_tokens"] == 30
    assert result["total_cached_tokens"] == 0
    assert (result["model_id"], result["request_rate"], result["max_concurrency"]) == ("tiny", "inf", None)
    assert all(1 <= len(gaps) <= 4 for gaps in result["itls"]), "a first message may have several tokens"
    assert all(0 < first <= result["duration"] for first in result["ttfts"])
    assert result["request_goodput"] == result["request_throughput"] == pytest.approx(6 / result["duration"])
    assert result["median_ttft_ms"] == pytest.approx(1e3 * float(np.median(result["ttfts"])))
    assert result["median_itl_ms"] == pytest.approx(1e3 * float(np.median(np.concatenate(result["itls"]))))
    e2el = [first + sum(gaps) for first, gaps in zip(result["ttfts"], result["itls"], strict=True)]
    assert result["mean_e2el_ms"] == pytest.approx(1e3 * float(np.mean(e2el)))
    assert "generated_texts" not in result
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_answers_of_one_token_have_no_time_between_tokens(measure: Measure) -> None:
    result = measure(output_len=1, goodput=("tpot:1",))
    assert (result["completed"], result["output_lens"], result["itls"]) == (6, [1] * 6, [[]] * 6)
    absent = {f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p99") for metric in ("tpot", "itl")}
    assert {name for name, value in result.items() if value is None} == absent | {"max_concurrency", "decode_density"}
    assert result["mean_e2el_ms"] == result["mean_ttft_ms"] > 0
    assert result["request_goodput"] == result["output_throughput"] == result["request_throughput"]


def test_failed_requests_are_counted_and_the_others_go_on(measure: Measure) -> None:
    result = measure(input_lens=(40, MAX_LEN + 5), num_warmups=0)
    assert (result["completed"], result["failed"]) == (3, 3)
    assert result["errors"][::2] == [""] * 3
    assert all("max_model_len" in error for error in result["errors"][1::2])
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (120, 15)
    assert result["output_lens"] == [5, 0] * 3
    assert result["input_lens"] == [40, MAX_LEN + 5] * 3


def test_without_a_complete_request_there_are_no_statistics(measure: Measure) -> None:
    result = measure(strategy="no-such", num_prompts=2, num_warmups=0)
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 2, None)
    assert "no-such" in result["errors"][0]


def test_a_failed_warm_up_is_printed_once(measure: Measure, capsys: pytest.CaptureFixture[str]) -> None:
    result = measure(input_lens=(40, MAX_LEN + 5), num_warmups=5, num_prompts=1)
    assert (result["completed"], result["failed"]) == (1, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"2 of 5 warm-up requests failed: \w+: .*max_model_len.*", line)


def test_a_warm_up_without_a_complete_request_ends_the_run(measure: Measure) -> None:
    with pytest.raises(KeysiftError, match=r"^3 of 3 warm-up requests failed: \w+: .*no-such"):
        measure(strategy="no-such", num_prompts=2, num_warmups=3)


@pytest.mark.parametrize("most", [1, 3])
def test_never_more_requests_than_max_concurrency(measure: Measure, most: int) -> None:
    result = measure(num_prompts=12, max_concurrency=most, output_len=12)
    assert result["completed"] == 12
    assert result["max_concurrent_requests"] == most
    moments = result["start_times"]
    assert moments == sorted(moments)
    assert moments[:most] == [0.0] * most
    assert moments[most] > 0, "it waits until there is room, and only then counts as sent"


def test_a_request_that_the_queue_refuses_has_failed(slow: Running) -> None:
    """One request runs and one may wait."""
    config = Load(address=slow.address, num_prompts=6, input_lens=(20,), output_len=20, num_warmups=0)
    result = load(config, quiet)
    assert 2 <= result["completed"] < 6
    assert any("max_queue" in error for error in result["errors"])


def test_the_strategy_of_the_requests(measure: Measure) -> None:
    arguments = ("streaming.sink=16", "streaming.window=16")
    sparse = measure(strategy="streaming", strategy_args=arguments, input_lens=(600,))
    assert "streaming" in sparse["strategy"]
    assert sparse["decode_density"] < 0.2 < measure(input_lens=(600,))["decode_density"]


def test_prompts_share_a_prefix_only_with_the_prefix_cache(measure: Measure, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "%s"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n' % ("x" * 300))
    shared = measure(prompts=file, bypass_prefix_cache=False, max_concurrency=1, generated_texts=True)
    assert shared["input_lens"] == [300, len("user: hi\nassistant:")] * 3
    assert shared["total_cached_tokens"] > 0
    assert len(shared["generated_texts"]) == 6
    assert shared["generated_texts"][0] == shared["generated_texts"][2] != ""
    assert measure(prompts=file)["total_cached_tokens"] == 0
    assert measure(bypass_prefix_cache=False, input_lens=(64,))["total_cached_tokens"] == 0


def test_prompts_repeat_for_a_seed(measure: Measure) -> None:
    """Arrivals repeat too, so that two runs differ in their times only."""
    one, same, other = (measure(seed=seed, generated_texts=True)["generated_texts"] for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_reports_the_completed_requests(slow: Running) -> None:
    def interrupt(done: int, failed: int) -> None:
        if done == 2:
            press_ctrl_c()

    config = Load(
        address=slow.address, num_prompts=1000, input_lens=(20,), output_len=10, max_concurrency=2, num_warmups=0
    )
    result = load(config, interrupt)
    assert result["interrupted"]
    assert 2 <= result["completed"] <= 4
    assert result["failed"] == 0, "running requests were aborted, which is no failure"
    assert slow.free_pages() == slow.engine.status.pages_total


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_during_the_warm_up_measures_nothing(slow: Running, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not slow.engine.status.running:
            time.sleep(0.01)
        press_ctrl_c()

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a long one"}')
    thread = threading.Thread(target=interrupt)
    thread.start()
    begun = time.monotonic()
    result = load(Load(address=slow.address, prompts=file, output_len=1900), quiet)
    thread.join()
    assert time.monotonic() - begun < 30, "the answer would have taken longer"
    assert result["interrupted"]
    assert (result["completed"], result["failed"], result["duration"]) == (0, 0, 0.0)
    assert slow.free_pages() == slow.engine.status.pages_total


def test_no_bar_outside_of_a_terminal(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    result = load(Load(address=running.address, num_prompts=2, input_lens=(20,), output_len=2))
    assert result["completed"] == 2
    assert "".join(capsys.readouterr()).strip() == ""


def test_no_server_at_the_address() -> None:
    with pytest.raises(Unavailable):
        load(Load(address="127.0.0.1:1"), quiet)


def test_a_server_with_a_key(start: Callable[..., Running]) -> None:
    guarded = start(api_key="sesame")
    config = {"address": guarded.address, "num_prompts": 1, "input_lens": (20,), "output_len": 2}
    with pytest.raises(Unauthenticated):
        load(Load(**config), quiet)
    assert load(Load(**config, api_key="sesame"), quiet)["completed"] == 1


def test_a_load_and_an_answer_have_the_priority_that_the_tenant_may_state(
    start: Callable[..., Running], run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text("batch sesame priority=10..20")
    guarded = start(api_key_file=file)
    config = {"address": guarded.address, "api_key": "sesame", "num_prompts": 1, "input_lens": (20,), "output_len": 2}
    with pytest.raises(InvalidRequest, match=r"priority: 10 to 20 .*got 0"):
        load(Load(**config), quiet)
    assert load(Load(**config, priority=10), quiet)["completed"] == 1
    asked = ("generate", "--prompt", "x", "--max-new-tokens", "2", "--address", guarded.address, "--api-key", "sesame")
    assert run(*asked)[0] == 2
    assert run(*asked, "--priority", "20")[0] == 0
    assert "priority: 10 to 20" in run(*asked, "--priority", "21")[2]


# The prompts


def test_a_prompt_has_the_requested_number_of_tokens(client: Client) -> None:
    size = prompts.token_size(client, MAX_LEN)
    assert size == 1, "the tiny model has one token for every byte"
    (sized,) = prompts.cut([1500], seed=0, token_size=size)
    outputs = client.generate(sized.prompt, SamplingParams(max_new_tokens=1), truncate_prompt_tokens=sized.length)
    assert next(o.prompt_tokens for o in outputs if isinstance(o, PromptInfo)) == 1500


def test_prompts_start_at_random_offsets() -> None:
    found = prompts.cut([10, 20] * 20, seed=0, token_size=4.0)
    assert [sized.length for sized in found] == [10, 20] * 20
    assert len({str(sized.prompt)[:40] for sized in found}) > 35
    assert prompts.cut([10, 20] * 20, seed=0, token_size=4.0) == found
    assert prompts.cut([10, 20] * 20, seed=1, token_size=4.0) != found


def test_a_prompt_longer_than_the_text_begins_again() -> None:
    text = documentation()
    (sized,) = prompts.cut([len(text)], seed=0, token_size=2.0)
    assert len(sized.prompt) >= 3 * len(text)
    assert str(sized.prompt)[: len(text)] == str(sized.prompt)[len(text) : 2 * len(text)]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"text": "x"}', '{"prompt": 7}', ""])
def test_a_file_without_prompts(measure: Measure, tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(InvalidRequest, match=r"^prompts: .*bad\.jsonl"):
        measure(prompts=file)


# The configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("goodput", ("ttfs:5",)),
        ("goodput", ("ttft",)),
        ("goodput", ("ttft:nan",)),
        ("goodput", ("ttft:-1",)),
        ("strategy_args", ("streaming.sink",)),
        ("request_rate", 0),
        ("request_rate", math.nan),
        ("burstiness", 0),
        ("max_concurrency", 0),
        ("input_lens", ()),
        ("input_lens", (0,)),
        ("num_prompts", 0),
    ],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Load(**{"address": "x:1", field: value})


def test_a_load_without_an_address() -> None:
    with pytest.raises(InvalidRequest, match="address"):
        load(Load(), quiet)


def test_targets_are_numbers() -> None:
    assert parse_targets(("ttft:500", "tpot:12.5")) == {"ttft": 500.0, "tpot": 12.5}


def test_fields_of_a_load_are_flags() -> None:
    app, made = typer.Typer(), []
    app.command()(from_fields(load=Load)(lambda load: made.append(load)))
    flags = ["--address", "host:1", "--input-len", "100", "--input-len", "2000", "--request-rate", "inf"]
    result = CliRunner().invoke(app, [*flags, "--goodput", "ttft:500", "--max-concurrency", "4"])
    assert result.exit_code == 0, result.output
    assert made == [
        Load(address="host:1", input_lens=(100, 2000), goodput=("ttft:500",), max_concurrency=4),
    ]
