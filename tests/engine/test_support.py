"""Unsupported combinations: every row of the table is refused, and each of its options is accepted alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from keysift.engine import EngineConfig, InvalidRequest, Unsupported
from keysift.engine.support import FACTS, UNSUPPORTED, Facts, Limit, check, rows
from tests.architecture import import_graph

BEYOND: Mapping[str, object] = {
    "cuda_graphs": True,
    "device": "cuda:1",
    "device_map": "auto",
    "kv_offload": "/tmp",
    "kv_offload_memory": 2**20,
    "kv_prefetch": 4,
    "quantization": "int8",
    "tensor_parallel_size": 2,
}
"""A value of each limited option that is beyond every limit."""
MET: Mapping[str, tuple[dict[str, object], dict[str, object]]] = {
    "with kv_offload": ({"kv_offload": "pinned"}, {}),
    "without kv_offload": ({}, {}),
    "with device_map auto": ({"device_map": "auto"}, {}),
    "with tensor_parallel_size above 1": ({"tensor_parallel_size": 2}, {}),
    "on a device other than CUDA": ({}, {"runs_on": torch.device("cpu")}),
    "on a device other than the CPU": ({}, {"runs_on": torch.device("cuda")}),
    "on the CPU or one GPU": ({}, {"runs_on": torch.device("cuda:1")}),
    "where there are GPUs": ({}, {"gpus": 2}),
    "with a torch without torch.distributed": ({}, {"torch_distributed": False}),
    "with a transformers that has no DistributedConfig": ({}, {"splits_weights": False}),
    "under torchrun": ({}, {"torchrun": True}),
    "in a process that is in a process group": ({}, {"process_group": True}),
    "for evaluation and calibration": ({}, {"one_process": True}),
    "with a checkpoint that has a bias of its keys": ({}, {"key_bias": True}),
    "on several devices": ({}, {"devices": 2}),
}
"""Fields of the configuration, and facts, under which each condition holds."""


def name(limit: Limit) -> str:
    return f"{limit.option} {limit.where}"


def beyond(limit: Limit) -> tuple[dict[str, Any], Facts]:
    """Options and facts that this row refuses."""
    options: dict[str, Any] = {limit.option: BEYOND[limit.option]}
    facts: dict[str, Any] = {}
    for condition in limit.conditions:
        more, known = MET[condition.text]
        options |= more
        facts |= known
    return options, Facts(**facts)


def unchecked(**options: Any) -> EngineConfig:
    """A configuration as the table sees it, before it is held against the table."""
    return EngineConfig.model_construct(**EngineConfig().model_dump() | options)


@pytest.mark.parametrize("limit", UNSUPPORTED, ids=name)
def test_each_row_is_refused_by_field_limit_reason_and_value(limit: Limit) -> None:
    options, facts = beyond(limit)
    error = limit.refusal(unchecked(**options), facts)
    of_model = facts.key_bias is not None
    assert type(error) is (Unsupported if of_model else InvalidRequest)
    got = re.escape(repr(options[limit.option]).replace("True", "true"))
    assert re.fullmatch(rf"{limit.option}: {limit.values} .+, as {re.escape(limit.reason)}, got {got}", str(error))
    assert of_model or error.field == limit.option  # type: ignore[union-attr]


@pytest.mark.parametrize("limit", UNSUPPORTED, ids=name)
def test_each_row_is_enforced_as_soon_as_it_is_known(limit: Limit) -> None:
    """By another row first, where that has the same option or condition."""
    options, facts = beyond(limit)
    if facts == Facts():
        with pytest.raises(InvalidRequest, match=f"^{limit.option}: "):
            EngineConfig(**options)
    else:
        with pytest.raises((InvalidRequest, Unsupported)):
            check(unchecked(**options), facts)


@pytest.mark.parametrize("limit", UNSUPPORTED, ids=name)
def test_each_row_allows_its_values_and_other_conditions(limit: Limit) -> None:
    options, facts = beyond(limit)
    for value in limit.allowed:
        assert limit.refusal(unchecked(**options | {limit.option: value}), facts) is None
    if set(options) != {limit.option}:
        assert limit.refusal(unchecked(**{limit.option: BEYOND[limit.option]}), facts) is None
    elif facts != Facts():
        assert limit.refusal(unchecked(**options), Facts()) is None


@pytest.mark.parametrize("option", BEYOND)
def test_an_option_alone_is_accepted(option: str) -> None:
    """Those of the backing store alone with it."""
    store = {"kv_offload": "/tmp"} if option in ("kv_offload_memory", "kv_prefetch") else {}
    assert getattr(EngineConfig(**{option: BEYOND[option]} | store), option) == BEYOND[option]


@pytest.mark.parametrize("facts", [known for _, known in MET.values() if known], ids=lambda known: next(iter(known)))
def test_a_fact_alone_is_accepted(facts: dict[str, Any]) -> None:
    check(EngineConfig(), Facts(**facts))


def test_the_table_names_existing_options_and_facts() -> None:
    options = set(EngineConfig.model_fields)
    assert not FACTS & options
    for limit in UNSUPPORTED:
        assert limit.option in options
        assert {condition.name for condition in limit.conditions} <= options | FACTS
    assert len(set(map(name, UNSUPPORTED))) == len(UNSUPPORTED)
    assert {condition.text for limit in UNSUPPORTED for condition in limit.conditions} == set(MET)


def test_the_table_is_listed_as_text() -> None:
    listed = list(rows())
    assert ("cuda_graphs", "false", "with kv_offload", "its pages move between steps") in listed
    assert ("device", "auto or cuda", "with tensor_parallel_size above 1 where there are GPUs") in [
        r[:3] for r in listed
    ]
    assert [row[0] for row in listed] == [limit.option for limit in UNSUPPORTED]
    assert all(isinstance(cell, str) and cell and "{" not in cell for row in listed for cell in row)


def test_the_table_takes_nothing_that_computes() -> None:
    """It can be listed where there is no model, and the configuration can import it."""
    assert import_graph()["keysift.engine.support"] == {"keysift.engine.checked", "keysift.engine.errors"}
