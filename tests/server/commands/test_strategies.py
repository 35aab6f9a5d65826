"""`keysift strategies`: the list, one strategy explained, and the same as JSON."""

from __future__ import annotations

import json

import pytest

from keysift.attention import known
from keysift.attention.registry import options

from ..conftest import Run


@pytest.mark.parametrize("name", sorted(known()))
def test_one_is_explained_with_all_its_options(run: Run, name: str) -> None:
    status, out, err = run("strategies", name)
    strategy, flat = known()[name], " ".join(out.split())
    assert (status, err) == (0, "")
    assert (strategy.__doc__ or "").split("\n")[0] in flat
    assert strategy.source in out
    assert all(each.name in out and each.description[:40] in flat for each in options(strategy))


def test_bounds_and_defaults_are_spelt_as_a_command_line_takes_them(run: Run) -> None:
    out = [" ".join(line.split()) for line in run("strategies", "retrieval")[1].splitlines()]
    assert "epsilon number 0.075 at least 0, at most 1 share of the attention" in " ".join(out)
    assert any(line.startswith("wait boolean false of graph") for line in out)
    assert any(line.startswith("index string codes flat, codes, ivf, graph, summary, bound") for line in out)
    assert any(line.startswith("window integer 256 at least 1 last tokens") for line in out)


def test_both_parts_of_a_pair_are_explained(run: Run) -> None:
    out = run("strategies", "sift+retrieval")[1]
    assert out.index("chooses in: prefill") < out.index("retrieval") < out.index("chooses in: decode")
    assert set(json.loads(run("strategies", "sift+retrieval", "--json")[1])) == {"sift", "retrieval"}


def test_json_has_what_the_table_has(run: Run) -> None:
    listed = json.loads(run("strategies", "--json")[1])
    assert set(listed) == set(known())
    for name, strategy in known().items():
        described = listed[name]
        assert set(described) == {"about", "fields", "description", "phases", "source", "options"}
        assert described["description"].startswith(described["about"])
        assert described["options"] == [json.loads(json.dumps(each._asdict())) for each in options(strategy)]
        assert described["fields"] == {each["name"]: each["default"] for each in described["options"]}
    assert listed["streaming"]["phases"] == ["prefill", "decode"]
    assert json.loads(run("strategies", "sift", "--json")[1]) == {"sift": listed["sift"]}


def test_an_unknown_one_is_refused_in_one_line(run: Run) -> None:
    status, out, err = run("strategies", "sfit")
    assert (status, out) == (2, "")
    assert err.startswith("keysift: strategy: unknown 'sfit'; did you mean 'sift'?")
    assert err.count("\n") == 1
