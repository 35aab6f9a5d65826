"""Keysift in lm-evaluation-harness: it scores and says what the harness's own model of transformers does.

The harness is an optional extra that brings much along, so it is no part of the development tools: without it all but
one of these tests are skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from keysift.engine import LLM, InvalidRequest, Unsupported
from keysift.engine.model.tokenizer import Tokenizer
from tests.models import make_tokenizer

MODULE = "keysift.engine.measure.lm_eval_model"
HARNESS = importlib.util.find_spec("lm_eval") is not None
with_harness = pytest.mark.skipif(not HARNESS, reason="lm_eval is not installed: pip install 'keysift[lm-eval]'")
# What the harness's own dependencies warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows. "


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), strategy="dense", dtype="float32", prefill_chunk=64, kv_memory=2**22)


@pytest.fixture
def ours(llm: LLM) -> Any:
    return importlib.import_module(MODULE).KeysiftLM(llm)


@pytest.fixture(scope="module")
def theirs(tiny_llama: Path) -> Any:
    """The harness's own model, of the same weights."""
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny_llama), batch_size=1, max_length=512)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture
def without_harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield
    sys.modules.pop(MODULE, None)


def test_without_the_harness_it_says_what_to_install(without_harness: None) -> None:
    with pytest.raises(Unsupported, match=r"pip install 'keysift\[lm-eval\]'"):
        importlib.import_module(MODULE)


@with_harness
def test_likelihoods_are_those_of_transformers(ours: Any, theirs: Any) -> None:
    pairs = [
        (TEXT, "And by opposing end them."),
        (TEXT, "To die"),
        ("", "No context at all"),
        ("A space at the end ", "belongs to what follows"),
        (TEXT * 3, "x"),
        (TEXT, "And by opposing end them."),
    ]
    asked = requests("loglikelihood", *pairs)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    for (total, greedy), (right, right_greedy) in zip(ours.loglikelihood(asked, True), expected, strict=True):
        assert total == pytest.approx(right, abs=1e-3)
        assert greedy == right_greedy


@with_harness
def test_what_the_model_would_say_is_greedy(ours: Any, theirs: Any) -> None:
    pairs = [(context, chr(letter)) for context in ("x", "Short", "the end") for letter in range(33, 127)]
    asked = requests("loglikelihood", *pairs)
    found = [greedy for _, greedy in ours.loglikelihood(asked, True)]
    assert found == [greedy for _, greedy in theirs.loglikelihood(asked, disable_tqdm=True)]
    assert 0 < sum(found) <= 3


@with_harness
def test_a_request_that_is_too_long_loses_its_beginning(
    ours: Any, theirs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = requests("loglikelihood", (TEXT * 8, "the end"), (TEXT * 5, TEXT * 4))
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=2e-3)
    assert len([record for record in caplog.records if record.name == MODULE]) == 1
    with pytest.raises(InvalidRequest, match="continuation"):
        ours.loglikelihood(requests("loglikelihood", ("x", TEXT * 6)), True)


@with_harness
def test_whole_texts(ours: Any, theirs: Any) -> None:
    """Shorter than the model's 512 tokens, as long, and of several windows."""
    texts = ["", "x", TEXT, (TEXT * 5)[:512], (TEXT * 5)[:513], TEXT * 12]
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked, True) == pytest.approx(expected, abs=1e-2)


@with_harness
def test_answers_are_those_of_transformers(ours: Any, theirs: Any) -> None:
    greedy = {"until": [], "max_gen_toks": 20, "do_sample": False}
    asked = requests("generate_until", (TEXT, greedy), ("Short", greedy), (TEXT * 8, greedy), ("", greedy))
    expected = theirs.generate_until(asked[:3], disable_tqdm=True)
    found = ours.generate_until(asked, True)
    assert found[:3] == expected
    assert len(found) == 4


@with_harness
def test_an_answer_ends_at_any_of_its_stops(ours: Any, theirs: Any) -> None:
    whole = ours.generate_until(requests("generate_until", ("x", {"max_gen_toks": 30})), True)[0]
    letters = [letter for letter in whole if letter.isascii()]  # others may be halves of a character
    stops = [letters[4], letters[2], "never"]
    options = {"until": stops, "max_gen_toks": 30}
    asked = requests("generate_until", ("x", options), ("Other options", {"until": "x", "max_gen_toks": 3}))
    answers = ours.generate_until(asked, True)
    assert answers[0] == whole[: min(whole.index(stop) for stop in stops[:2])] != ""
    assert answers[0] == theirs.generate_until(asked[:1], disable_tqdm=True)[0]


@with_harness
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"max_new_tokens": 256, "temperature": 0.0}),
        ({"max_new_tokens": 7, "temperature": 0.7}, {"max_new_tokens": 7, "temperature": 0.7}),
        ({"max_gen_toks": 7, "max_tokens": 9, "do_sample": False, "temperature": 0.7}, {"max_new_tokens": 7}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"until": "\n"}, {"stop_strings": ("\n",)}),
        ({"until": ["a", "", "b"]}, {"stop_strings": ("a", "b")}),
    ],
)
def test_options_of_an_answer(options: dict[str, Any], wanted: dict[str, Any]) -> None:
    params = importlib.import_module(MODULE).sampling(options)
    assert {name: getattr(params, name) for name in wanted} == wanted
    if "temperature" not in wanted:
        assert params.temperature == 0


@with_harness
def test_an_option_that_cannot_be_honoured_is_named(ours: Any) -> None:
    with pytest.raises(InvalidRequest, match="num_beams"):
        ours.generate_until(requests("generate_until", ("x", {"num_beams": 4})), True)
    with pytest.raises(InvalidRequest, match="max_gen_toks"):
        ours.generate_until(requests("generate_until", ("x", {"max_gen_toks": 512})), True)


@with_harness
def test_sampled_answers_repeat_for_a_seed(ours: Any) -> None:
    options = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "seed": 3}
    asked = requests("generate_until", (TEXT, options), (TEXT, options | {"seed": 4}))
    first, again = ours.generate_until(asked, True), ours.generate_until(asked, True)
    assert first == again
    assert first[0] != first[1]


@with_harness
def test_conversations(ours: Any) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}]
    assert ours.apply_chat_template(turns[:1]) == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert ours.apply_chat_template(turns, add_generation_prompt=False).endswith("assistant\nwell")
    assert ours.chat_template(True) == make_tokenizer().chat_template
    assert ours.chat_template() is None
    assert "/" not in ours.tokenizer_name
    assert ours.prefix_token_id == 1
    assert ours.eot_token_id == 2


@with_harness
def test_a_text_begins_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer that puts a token in front of every text, and texts that have it already."""
    hf = make_tokenizer()
    hf.backend_tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    lm = importlib.import_module(MODULE).KeysiftLM(llm)
    monkeypatch.setattr(lm, "_tokenizer", Tokenizer(hf))
    letter = Tokenizer(make_tokenizer()).encode("x")
    assert lm.tok_encode("x") == lm.tok_encode("<|start|>x") == [1, *letter]
    assert lm.tok_encode("x", add_special_tokens=False) == letter
    assert lm.tok_encode("<|start|>x", add_special_tokens=True) == [1, 1, *letter]


@with_harness
def test_a_strategy_of_its_own(llm: LLM, ours: Any) -> None:
    make: Callable[..., Any] = importlib.import_module(MODULE).KeysiftLM
    sparse = make(llm, strategy="streaming")
    assert sparse.get_model_info()["strategy"] == "streaming"
    assert ours.get_model_info()["strategy"] == "dense"
    asked = requests("loglikelihood", (TEXT * 4, "the end"))
    assert sparse.loglikelihood(asked, True)[0][0] == pytest.approx(ours.loglikelihood(asked, True)[0][0], abs=1.0)


@with_harness
def test_a_task_of_the_harness(tiny_llama: Path, ours: Any, tmp_path: Path) -> None:
    """One of our own, with a likelihood for each choice, from a file; twice, as a killed run would go on."""
    module = importlib.import_module(MODULE)
    data = tmp_path / "data.jsonl"
    data.write_text('{"q": "1+1=", "a": 0}\n{"q": "1+2=", "a": 1}\n')
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["2", "3"],
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    config = importlib.import_module("keysift.engine").EngineConfig(
        model=str(tiny_llama), strategy="dense", dtype="float32", kv_memory=2**22
    )
    options = {"bootstrap_iters": 0, "use_cache": str(tmp_path / "answers")}
    first = module.evaluate(config, [task], **options)
    assert first["results"]["sums"]["acc,none"] in (0.0, 0.5, 1.0)
    assert first["config"]["strategy"] == "dense"
    assert first["configs"]["sums"]["metadata"]["tokenizer"] == tiny_llama.name
    # None but ours: the harness looks through the files of all its tasks otherwise, for seconds.
    few = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=False)
    assert module.evaluate(ours, [task], task_manager=few, **options)["results"] == first["results"]
