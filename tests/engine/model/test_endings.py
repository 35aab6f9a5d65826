"""End tokens: all that any of a model's files states, and no default of a class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from keysift.engine import EngineConfig
from keysift.engine.model.load import load


@pytest.fixture
def change(tiny_llama: Path, tmp_path: Path) -> Any:
    """Copies the model, whose files all state 2, and has them state others; ... removes one. Returns its end tokens."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))

    def changed(config: Any = 2, generation: Any = 2, tokenizer: str = "<|end|>") -> frozenset[int]:
        for name, value in (("config", config), ("generation_config", generation)):
            content = json.loads((folder / f"{name}.json").read_text())
            content["eos_token_id"] = value
            if value is ...:
                del content["eos_token_id"]
            (folder / f"{name}.json").write_text(json.dumps(content))
        words = PreTrainedTokenizerFast.from_pretrained(folder)
        words.eos_token = tokenizer
        words.save_pretrained(folder)
        return load(EngineConfig(model=str(folder), dtype="float32"), lambda message: None).eos_token_ids

    return changed


def test_all_files_count(change: Any) -> None:
    assert change() == {2}
    assert change(config=[3, 4], generation=5, tokenizer="<unk>") == {3, 4, 5, 0}
    assert change(generation=..., tokenizer="<|start|>") == {1, 2}
    assert change(config=None, generation=[7], tokenizer="<|end|>") == {7, 2}


def test_ids_beyond_the_vocabulary_are_left_out(change: Any) -> None:
    assert change(config=100_000, generation=[-1, 6]) == {6, 2}


def test_the_default_of_a_configurations_class_is_no_statement(change: Any) -> None:
    assert change(config=..., generation=7, tokenizer="<|start|>") == {7, 1}
