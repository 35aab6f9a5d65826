"""The engine over a tiny random model: outputs, limits, aborts, prefixes, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from keysift.engine import (
    LLM,
    DuplicateRequest,
    Engine,
    EngineConfig,
    Finish,
    FinishReason,
    InvalidRequest,
    Output,
    PrefillProgress,
    PromptInfo,
    Request,
    ResourceExhausted,
    SamplingParams,
    TokenOutput,
)
from tests.models import llama

Make = Callable[..., Engine]


@pytest.fixture
def make(tiny_llama: Path) -> Make:
    def build(**config: object) -> Engine:
        fields = {"model": str(tiny_llama), "dtype": "float32", "prefill_chunk": 64, "kv_memory": 2**22}
        return Engine(EngineConfig(**fields | config))

    return build


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> Callable[[list[int], int], list[int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")

    def generate(prompt: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
        return out[0, len(prompt) :].tolist()

    return generate


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 259, (length,), generator=generator).tolist())


def greedy(count: int, **fields: object) -> SamplingParams:
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


@pytest.fixture(autouse=True)
def _pages_come_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, once it is drained every page is free again."""
    engines: list[Engine] = []
    original = Engine.__init__

    def remember(self: Engine, *args: object, **fields: object) -> None:
        original(self, *args, **fields)  # type: ignore[arg-type]
        engines.append(self)

    Engine.__init__ = remember  # type: ignore[method-assign,assignment]
    yield
    Engine.__init__ = original  # type: ignore[method-assign]
    for engine in engines:
        drain(engine)
        assert engine.status.pages_free == engine.status.pages_total


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("chunk", [64, 128])
def test_greedy_equals_transformers_alone_and_ragged(make: Make, expected: Callable, chunk: int, backend: str) -> None:
    engine = make(prefill_chunk=chunk, backend=backend)
    lengths = [1, 15, 16, 17, 63, 64, 65, 200]
    for index, length in enumerate(lengths):
        engine.add(Request(str(index), tokens(length, index), greedy(5 + index)))
    outputs = drain(engine)
    for index, length in enumerate(lengths):
        assert said(outputs, str(index)) == expected(list(tokens(length, index)), 5 + index)


def test_preemption_changes_nothing_but_time(make: Make, expected: Callable) -> None:
    page = make().status.page_bytes
    engine = make(kv_memory=14 * page, prefix_cache=False)
    for index in range(3):
        engine.add(Request(str(index), tokens(60, index), greedy(40)))
    outputs = drain(engine)
    assert engine.scheduler.preemptions > 0
    for index in range(3):
        assert said(outputs, str(index)) == expected(list(tokens(60, index)), 40)


def test_a_prefix_hit_changes_nothing_but_what_is_computed(make: Make, expected: Callable) -> None:
    engine = make()
    first, second = tokens(150), tokens(150)[:140] + tokens(30, 9)
    engine.add(Request("first", first, greedy(4)))
    drain(engine)
    engine.add(Request("second", second, greedy(8)))
    outputs = drain(engine)
    assert finish_of(outputs, "second").usage.cached_tokens == 128
    assert said(outputs, "second") == expected(list(second), 8)


@pytest.mark.parametrize(
    "change", [{"cache_salt": "other"}, {"strategy": "streaming"}, {"bypass_prefix_cache": True}], ids=str
)
def test_prefixes_are_not_shared_across_salt_strategy_or_bypass(make: Make, change: dict[str, object]) -> None:
    engine = make()
    engine.add(Request("first", tokens(150), greedy(1)))
    drain(engine)
    engine.add(Request("second", tokens(150), greedy(1), **change))  # type: ignore[arg-type]
    assert finish_of(drain(engine), "second").usage.cached_tokens == 0


@pytest.mark.parametrize(
    ("strategy", "args", "cached"),
    [
        ("dense", (), 128),
        ("dense+streaming", (), 128),
        ("dense+streaming", ("streaming.sink=0", "streaming.window=16"), 64),
    ],
    ids=["dense", "a window over everything", "a window that bites"],
)
def test_generated_pages_are_reused_while_decoding_is_exact(
    make: Make, strategy: str, args: tuple[str, ...], cached: int
) -> None:
    engine = make()
    engine.add(Request("first", tokens(64), greedy(70), strategy=strategy, strategy_args=args))
    answer = said(drain(engine), "first")
    engine.add(Request("next", (*tokens(64), *answer, *tokens(20)), greedy(1)))
    assert finish_of(drain(engine), "next").usage.cached_tokens == cached


def test_outputs_tell_the_story_in_order(make: Make) -> None:
    engine = make()
    engine.add(Request("a", tokens(150), greedy(3)))
    outputs = drain(engine)
    kinds = [type(output) for output in outputs]
    assert kinds == [PromptInfo, *[PrefillProgress] * 3, *[TokenOutput] * 3, Finish]
    assert [output.processed for output in outputs if isinstance(output, PrefillProgress)] == [64, 128, 150]
    finish = finish_of(outputs, "a")
    assert finish.reason is FinishReason.LENGTH
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (150, 3)
    assert finish.timings.ttft_ms >= finish.timings.prefill_ms > 0
    assert finish.sparsity.prefill_density == finish.sparsity.decode_density == finish.sparsity.coverage == 1.0


def test_streaming_reads_less_and_says_so(make: Make) -> None:
    engine = make()
    engine.add(Request("a", tokens(400), greedy(3), strategy="streaming", strategy_args=("sink=16", "window=64")))
    sparsity = finish_of(drain(engine), "a").sparsity
    assert sparsity.strategy == "streaming"
    assert 0.15 < sparsity.prefill_density < 0.6
    assert 0.15 < sparsity.decode_density < 0.3
    assert sparsity.coverage is None


def test_a_dense_fallback_is_reported(make: Make) -> None:
    engine = make(strategy="streaming", strategy_args=("dense_below=100",))
    for length in (50, 200):
        engine.add(Request(str(length), tokens(length), greedy(1)))
    outputs = drain(engine)
    assert finish_of(outputs, "50").sparsity.dense_fallback
    assert not finish_of(outputs, "200").sparsity.dense_fallback


@pytest.mark.parametrize("after", [0, 1, 3])
def test_abort_frees_pages_at_once(make: Make, after: int) -> None:
    engine = make()
    engine.add(Request("a", tokens(150), greedy(50)))
    for _ in range(after):
        engine.step()
    assert engine.abort("a")
    assert engine.status.pages_free == engine.status.pages_total
    assert not engine.abort("a")
    assert finish_of(drain(engine), "a").reason is FinishReason.CANCELLED


def test_stop_ids_and_stop_strings_end_the_text(make: Make) -> None:
    engine = make()
    engine.add(Request("free", tokens(40), greedy(12)))
    free = drain(engine)
    words = said(free, "free")
    text = "".join(output.text for output in free if isinstance(output, TokenOutput))
    engine.add(Request("id", tokens(40), greedy(12, stop_token_ids=(words[4],))))
    outputs = drain(engine)
    first = words.index(words[4])
    assert said(outputs, "id") == words[: first + 1]
    assert finish_of(outputs, "id").matched_stop == words[4]
    stop = text[3:5]
    engine.add(Request("string", tokens(40), greedy(12, stop_strings=(stop,))))
    outputs = drain(engine)
    assert "".join(output.text for output in outputs if isinstance(output, TokenOutput)) == text[: text.index(stop)]
    assert finish_of(outputs, "string").matched_stop == stop


def test_a_completion_ends_at_the_models_length(make: Make) -> None:
    engine = make(max_model_len=100)
    engine.add(Request("a", tokens(95), greedy(50)))
    finish = finish_of(drain(engine), "a")
    assert (finish.reason, finish.usage.completion_tokens) == (FinishReason.LENGTH, 5)


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"prompt": ()}, r"prompt: 1 to 511 tokens \(max_model_len is 512\), got 0"),
        ({"prompt": tokens(512)}, r"prompt: 1 to 511 tokens .* got 512"),
        ({"prompt": (5, 259)}, r"prompt: token ids from 0 to 258, got 259"),
        ({"strategy": "dens"}, r"strategy: unknown 'dens'; did you mean 'dense'\?"),
        ({"strategy_args": ("dense.x=1",)}, r"dense.x: no such option"),
        ({"params": greedy(1, stop_token_ids=(300,))}, r"stop_token_ids: .*259, got 300"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_bad_requests_are_refused_by_field(make: Make, request_fields: dict[str, object], message: str) -> None:
    engine = make()
    with pytest.raises(InvalidRequest, match=message):
        engine.add(Request(**{"request_id": "a", "prompt": (3,)} | request_fields))  # type: ignore[arg-type]
    assert not engine.has_work


def test_a_live_id_cannot_be_used_again(make: Make) -> None:
    engine = make()
    engine.add(Request("a", tokens(3), greedy(1)))
    with pytest.raises(DuplicateRequest, match="'a'"):
        engine.add(Request("a", tokens(3), greedy(1)))
    drain(engine)
    engine.add(Request("a", tokens(3), greedy(1)))


def test_what_can_never_fit_is_refused_with_both_numbers(make: Make) -> None:
    page = make().status.page_bytes
    engine = make(kv_memory=8 * page)
    with pytest.raises(ResourceExhausted, match=rf"need 13 pages = {13 * page} bytes, the cache has 8 pages") as error:
        engine.add(Request("a", tokens(100), greedy(100)))
    assert error.value.retry_after_s is None


def test_a_full_queue_asks_to_come_again(make: Make) -> None:
    engine = make(max_num_seqs=1, max_queue=1)
    for name in "ab":
        engine.add(Request(name, tokens(3), greedy(2)))
    with pytest.raises(ResourceExhausted, match="max_queue: 2 requests") as error:
        engine.add(Request("c", tokens(3), greedy(2)))
    assert error.value.retry_after_s
    drain(engine)
    engine.add(Request("c", tokens(3), greedy(2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_memory": 10}, "kv_memory: at least one page = .* got 10"),
        ({"prefill_chunk": 100}, r"prefill_chunk: a multiple of queries_per_row \(64\), got 100"),
        ({"queries_per_row": 24}, r"queries_per_row: a multiple of page_size \(16\), got 24"),
        ({"strategy": "nope"}, "strategy: unknown 'nope'"),
        ({"page_sizes": 3}, "page_sizes: Extra inputs are not permitted, got 3"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_a_configuration_that_cannot_run_is_refused_by_field(
    make: Make, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(**fields)


def test_sampling_does_not_depend_on_the_company(make: Make) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_new_tokens=20, ignore_eos=True)
    engine = make()
    engine.add(Request("alone", tokens(30), params))
    alone = said(drain(engine), "alone")
    for index in range(5):
        engine.add(Request(str(index), tokens(20 + index, index), greedy(9, temperature=1.3)))
    engine.add(Request("together", tokens(30), params))
    assert said(drain(engine), "together") == alone


def test_sparse_strategies_say_the_same_with_preemption(make: Make) -> None:
    page = make().status.page_bytes
    for strategy in ("streaming", "dense+streaming", "streaming+dense"):
        args = ("streaming.sink=0", "streaming.window=16")
        fields = {"strategy": strategy, "strategy_args": args}
        roomy, cramped = make(prefix_cache=False), make(kv_memory=14 * page, prefix_cache=False)
        answers = []
        for engine in (roomy, cramped):
            for index in range(3):
                engine.add(Request(str(index), tokens(60, index), greedy(40), **fields))  # type: ignore[arg-type]
            outputs = drain(engine)
            answers.append([said(outputs, str(index)) for index in range(3)])
        assert cramped.scheduler.preemptions > 0
        assert answers[0] == answers[1], strategy


def test_every_request_is_announced_once_and_reported_to_its_end(make: Make) -> None:
    page = make().status.page_bytes
    engine = make(kv_memory=16 * page, prefix_cache=False)
    for index in range(4):
        engine.add(Request(str(index), tokens(70 + index, index), greedy(30)))
    outputs = drain(engine)
    assert engine.scheduler.preemptions > 0
    for index in range(4):
        mine = [output for output in outputs if output.request_id == str(index)]
        reports = [output.processed for output in mine if isinstance(output, PrefillProgress)]
        assert [type(output) for output in mine].count(PromptInfo) == 1
        assert isinstance(mine[0], PromptInfo)
        assert reports == sorted(set(reports))
        assert reports[-1] == 70 + index


@pytest.mark.parametrize(
    ("strategy", "args", "first", "second"),
    [
        ("streaming", ("dense_below=130", "window=16"), 129, 140),
        ("streaming+dense", ("streaming.window=16",), 100, 150),
    ],
)
def test_a_prefix_hit_brings_what_the_own_prefill_would(
    make: Make, strategy: str, args: tuple[str, ...], first: int, second: int
) -> None:
    answers = []
    for warm in (False, True):
        engine = make(strategy=strategy, strategy_args=args)
        prompt = tokens(first)
        if warm:
            engine.add(Request("first", prompt, greedy(50)))
            prompt += tuple(said(drain(engine), "first"))
        else:
            engine.add(Request("first", prompt, greedy(50), bypass_prefix_cache=True))
            prompt += tuple(said(drain(engine), "first"))
        engine.add(Request("second", (*prompt, *tokens(9, 5))[:second], greedy(20)))
        answers.append(said(drain(engine), "second"))
    assert answers[0] == answers[1]


def test_pairs_share_the_prefixes_of_their_prompt_strategy(make: Make) -> None:
    engine = make()
    engine.add(Request("first", tokens(150), greedy(1), strategy="dense+streaming"))
    drain(engine)
    engine.add(Request("second", tokens(150), greedy(1), strategy="dense"))
    assert finish_of(drain(engine), "second").usage.cached_tokens == 128


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_backend_that_cannot_run_is_refused_at_the_start(write_model: Callable, dtype: str) -> None:
    folder = write_model(llama(head_dim=4))
    with pytest.raises(InvalidRequest, match="backend: 'native' cannot run here"):
        Engine(EngineConfig(model=str(folder), dtype=dtype, backend="native", kv_memory=2**20))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.01, "logit_bias": {5: 1e4}},
        {"temperature": 100.0, "top_p": 1e-30},
        {"temperature": 1.0, "repetition_penalty": 0.01, "logprobs": 3},
        {"temperature": 1.0, "logit_bias": {token: float("-inf") for token in range(258)}},
        {"temperature": 1.0, "min_p": 1.0},
    ],
    ids=lambda params: "-".join(params),
)
def test_extreme_sampling_still_yields_tokens(make: Make, params: dict) -> None:
    engine = make()
    engine.add(Request("a", tokens(20), SamplingParams(max_new_tokens=8, ignore_eos=True, **params)))
    words = said(drain(engine), "a")
    assert len(words) == 8
    assert all(0 <= word < 259 for word in words)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 1e-39}, "temperature: 0 or at least 0.01, got 1e-39"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty: .*greater than or equal to 0.01, got 1e-45"),
        ({"logit_bias": {7: 1e300}}, r"logit_bias: -10000 to 10000 or -inf, got 1e\+300 for token 7"),
        ({"logit_bias": {token: float("-inf") for token in range(259)}}, "logit_bias: at least one token"),
        ({"stop_token_ids": tuple(range(259)), "min_new_tokens": 2}, "stop_token_ids: at least one token"),
        ({"stop_strings": ("x",) * 65}, "stop_strings: .*at most 64 items"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:12],
)
def test_sampling_that_leaves_nothing_to_choose_is_refused(make: Make, params: dict, message: str) -> None:
    engine = make()
    with pytest.raises(InvalidRequest, match=message):
        engine.add(Request("a", tokens(3), SamplingParams(max_new_tokens=4, **params)))


def test_llm_yields_in_order_and_cleans_up_when_left_early(llm: LLM) -> None:
    prompts = ["one", "two and more", [5, 6, 7]]
    completions = list(llm.generate(prompts, greedy(6), progress=False))
    assert [completion.prompt for completion in completions] == prompts
    assert all(len(completion.token_ids) == 6 for completion in completions)
    assert all(completion.finish and completion.finish.reason is FinishReason.LENGTH for completion in completions)
    stream = llm.generate(prompts, greedy(30), progress=False)
    assert next(stream).prompt == "one"
    stream.close()
    assert llm.engine.status.running == llm.engine.status.waiting == 0


def test_llm_iterators_may_be_read_in_turns(llm: LLM) -> None:
    left = llm.generate(["abc", "defg"], greedy(5), progress=False)
    right = llm.generate(["hi", "jklm"], greedy(9), progress=False)
    read = [next(left), next(right), next(right), next(left)]
    assert [completion.prompt for completion in read] == ["abc", "hi", "jklm", "defg"]
    assert [len(completion.token_ids) for completion in read] == [5, 9, 9, 5]


def test_llm_refuses_before_it_starts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt: .* got 600"):
        llm.generate(["fine", "x" * 600], greedy(5), progress=False)
    assert not llm.engine.has_work


@pytest.fixture
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), dtype="float32", kv_memory=2**22, max_num_seqs=2)
