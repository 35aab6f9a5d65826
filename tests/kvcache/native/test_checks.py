"""Checked mode: whatever would lead a kernel out of its tensors is refused, for every operand of every call."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("keysift.kvcache.native.library", exc_type=ImportError)

from keysift.attention.ops import paged_attention
from keysift.kvcache.native import calls
from keysift.kvcache.native.call import Call
from keysift.kvcache.native.calls import STRUCTURES, AttentionCall, TopCall
from keysift.kvcache.native.checks import Each, Numbers, Operand, OutOfBounds, checked

from . import examples

ROOT = Path(__file__).parents[3]
LIMITS = {
    "AttentionCall": {"frames": 6, "pages": 3, "starts": 12},
    "ScoresCall": {"frames": 6, "positions": 12},
    "PagesCall": {"own": 6, "frames": 6, "positions": 12},
    "TopCall": {"firsts": 3, "lasts": 3},
    "ClusterCall": {"frames": 6},
    "ProbeCall": {"frames": 6, "positions": 12, "places": 1, "ends": 9, "tokens": 8},
    "GraphSearchCall": {"frames": 6, "positions": 12, "ends": 13, "links": 8, "points": 8},
    "GraphNearestCall": {"frames": 6},
    "GraphLinksCall": {"nearest": 12},
    "FillCall": {"frames": 6},
    "AdmitCall": {"owner": 6, "frames": 6, "pages": 3},
    "ReadCall": {"slots": 3},
}
"""What each number of the examples is below."""
PLAIN = {"levels", "used", "hubs", "entries", "bounds", "where", "loads"}
"""Integers that a kernel reads and does not follow into a tensor, or compares itself before it does."""
WRITTEN = {
    "out",
    "ends",
    "tokens",
    "keys",
    "scanned",
    "nearest",
    "links",
    "refused",
    "loads",
    "slots",
    "found",
    "table",
}
NUMBERS = [(kind, name) for kind, names in LIMITS.items() for name in names]
OPERANDS = [(kind, name) for kind in STRUCTURES for name in kind.operands]


@cache
def captured() -> dict[str, list[dict[str, Any]]]:
    return examples.captured()


def uses(kind: str, name: str) -> Iterator[dict[str, Any]]:
    """The values of the examples' calls that use this operand."""
    found = [values for values in captured()[kind] if values[name] is not None]
    assert found
    yield from found


def with_first(value: Any, tensor: Tensor) -> Any:
    return [tensor, *value[1:]] if isinstance(value, list) else tensor


def first(value: Any) -> Tensor:
    tensor = value[0] if isinstance(value, list) else value
    assert isinstance(tensor, Tensor)
    return tensor


def held(kind: type[Call], name: str) -> Operand:
    operand = kind.operands[name]
    return operand.operand if isinstance(operand, Each) else operand


def test_every_pointer_of_every_structure_has_an_operand() -> None:
    header = (Path(calls.__file__).parent / "abi.h").read_text()
    for kind in STRUCTURES:
        body = re.search(rf"^struct {kind.__name__} {{(.*?)^}};", header, re.MULTILINE | re.DOTALL)
        assert body is not None
        assert list(kind.operands) == re.findall(r"\*(?: const\*)? (\w+);", body.group(1)), kind


def test_every_integer_that_is_read_has_a_range() -> None:
    for kind, name in OPERANDS:
        operand = held(kind, name)
        if operand.dtype.startswith("int") and not isinstance(operand, Numbers):
            assert name in PLAIN | WRITTEN, (kind, name)
        if isinstance(operand, Numbers):
            assert name in LIMITS[kind.__name__], (kind, name)


def test_every_call_has_an_example_that_passes() -> None:
    assert captured().keys() == {kind.__name__ for kind in STRUCTURES}


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_a_planted_number_is_refused(kind: str, name: str) -> None:
    structure: type[Call] = getattr(calls, kind)
    operand = held(structure, name)
    assert isinstance(operand, Numbers)
    least = operand.least
    for values in uses(kind, name):
        for wrong, place in ((LIMITS[kind][name], -1), (LIMITS[kind][name] + 1000, -1), (least - 1, 0)):
            planted = first(values[name]).clone()
            planted.view(-1)[place] = wrong
            expected = rf"{kind}\.{name}.*: {wrong}, must be from {least} to"
            if kind == "GraphSearchCall" and name == "ends":
                expected += r"|GraphSearchCall.links"  # which it says the length of
            with pytest.raises(OutOfBounds, match=expected):
                structure.pack(**values | {name: with_first(values[name], planted)})


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_the_greatest_number_is_allowed(kind: str, name: str) -> None:
    structure: type[Call] = getattr(calls, kind)
    for values in uses(kind, name):
        planted = first(values[name]).clone()
        planted.view(-1)[-1] = LIMITS[kind][name] - 1
        if not (name == "ends" and kind == "GraphSearchCall"):  # says how long other operands are, too
            structure.pack(**values | {name: with_first(values[name], planted)})


@pytest.mark.parametrize(("kind", "name"), [("AttentionCall", "pages"), ("ProbeCall", "ends")])
def test_lists_out_of_order_are_refused(kind: str, name: str) -> None:
    structure: type[Call] = getattr(calls, kind)
    for values in uses(kind, name):
        turned = first(values[name]).flip(-1).contiguous()
        with pytest.raises(OutOfBounds, match=rf"{kind}\.{name}.*must ascend"):
            structure.pack(**values | {name: with_first(values[name], turned)})


@pytest.mark.parametrize(("kind", "name"), OPERANDS)
def test_a_short_tensor_is_refused(kind: type[Call], name: str) -> None:
    for values in uses(kind.__name__, name):
        tensor = first(values[name])
        for axis in range(tensor.dim()):
            short = tensor.narrow(axis, 0, tensor.shape[axis] - 1).contiguous()
            with pytest.raises(OutOfBounds, match=rf"{kind.__name__}[.:]"):
                kind.pack(**values | {name: with_first(values[name], short)})


@pytest.mark.parametrize(("kind", "name"), OPERANDS)
def test_other_dtypes_strides_and_storage_are_refused(kind: type[Call], name: str) -> None:
    for values in uses(kind.__name__, name):
        tensor = first(values[name])
        wrong = [tensor.new_empty(2 * tensor.numel()).view(*tensor.shape, 2)[..., 0]]
        emptied = tensor.clone()
        emptied.untyped_storage().resize_(tensor.element_size())
        wrong.append(emptied)
        operand = held(kind, name)
        if operand.dtype not in ("any", "bytes"):
            wrong.append(tensor.to(torch.complex64))
        if operand.strides >= tensor.dim():
            del wrong[0]
        for other in wrong:
            with pytest.raises(OutOfBounds, match=rf"{kind.__name__}\.{name}"):
                kind.pack(**values | {name: with_first(values[name], other)})


@pytest.mark.parametrize("kind", STRUCTURES)
def test_broken_rules_and_negative_sizes_are_refused(kind: type[Call]) -> None:
    values = captured()[kind.__name__][0]
    for size in kind.sizes:
        if isinstance(values[size], int) and size not in kind.signed:
            with pytest.raises(OutOfBounds, match=rf"{kind.__name__}\.{size}: -1, at least 0"):
                kind.pack(**values | {size: -1})


def test_a_missing_tensor_is_refused() -> None:
    values = captured()["AttentionCall"][0]
    with pytest.raises(OutOfBounds, match=r"AttentionCall.v: None, needs type \[N kv_heads page_size dim\]"):
        AttentionCall.pack(**values | {"v": None})


def test_a_rule_names_its_numbers() -> None:
    values = captured()["TopCall"][0]
    with pytest.raises(OutOfBounds, match=r"TopCall: not budget <= pages, where budget is 4, pages is 3"):
        TopCall.pack(**values | {"budget": 4})


def test_an_op_raises_in_checked_mode_alone() -> None:
    values = captured()["AttentionCall"][0]
    tensors = [values[name] for name in ("q", "k", "v", "frames", "pages", "starts")]
    tensors[2] = tensors[2][:1].expand_as(tensors[1])  # all values that may be asked for are there
    few = tensors[1][:5], tensors[2][:5]
    with pytest.raises(OutOfBounds, match=r"AttentionCall.frames: 5, must be from 0 to 4 \(below N\)"):
        paged_attention(tensors[0], *few, *tensors[3:], queries_per_row=1, scale=1.0)
    with checked(False):  # the sixth frame is there, behind the five
        paged_attention(tensors[0], *few, *tensors[3:], queries_per_row=1, scale=1.0)


def test_environment_turns_it_on() -> None:
    source = "from keysift.kvcache.native.checks import mode; print(mode.on)"
    for value, on in (("1", "True"), ("true", "True"), ("0", "False"), ("", "False")):
        done = subprocess.run(
            [sys.executable, "-c", source], env={"KEYSIFT_CHECKED": value, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == on


def test_no_address_is_made_elsewhere() -> None:
    """Every pointer of a call comes from `Call.pack`, where it is checked, or from a layer that checks it beside."""
    for folder in ("kvcache", "attention", "engine"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name not in ("call.py", "triton.py", "decode_layer.py"):
                assert not re.search(r"\b(data_ptr|addressof)\(", path.read_text()), path
