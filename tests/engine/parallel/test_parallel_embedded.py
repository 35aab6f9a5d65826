"""A real model with nine query heads, shared by three processes."""

from __future__ import annotations

import importlib.util

import pytest

from keysift.engine import Engine, EngineConfig, Request
from keysift.engine.model import embedded
from tests.engine.driver import finish_of, greedy, said

from .test_parallel import SPARSE, run


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(embedded.PACKAGE) is None, reason=f"needs {embedded.INSTALL}")
def test_three_processes_with_a_kv_head_each_of_the_embedded_model() -> None:
    text, found = "The history of the bicycle begins in the nineteenth century. " * 20, []
    for size in (1, 3):
        engine = Engine(
            EngineConfig(dtype="float32", prefill_chunk=128, kv_memory=2**27, tensor_parallel_size=size, **SPARSE)
        )
        outputs = run(engine, Request("a", tuple(engine.tokenizer.encode(text)), greedy(16)))
        found.append((said(outputs, "a"), finish_of(outputs, "a").sparsity.kv_bytes_read))
        engine.close()
    assert found[0] == found[1]
