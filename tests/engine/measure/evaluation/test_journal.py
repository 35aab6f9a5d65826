"""What was found survives a kill, and never mixes with another run's."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from keysift.engine import InvalidRequest
from keysift.engine.measure.evaluation.journal import NAME, Journal
from keysift.engine.measure.variants import Variant, variants

RUN = {"seed": 0, "model": "abc"}


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    Journal.open(folder, RUN, restart=False).add(("samples", 64, "dense"), [{"score": 0.5}], 2.5)
    again = Journal.open(folder, RUN, restart=False)
    assert again.found == {("samples", 64, "dense"): [{"score": 0.5}]}
    assert again.seconds == {("samples", 64, "dense"): 2.5}
    again.add(("text", 1), {"kl": [0.25]})
    assert len(Journal.open(folder, RUN, restart=False).found) == 2


def test_a_line_that_a_kill_cut_is_dropped(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, RUN, restart=False)
    journal.add(("a",), 1)
    journal.add(("b",), 2)
    whole = (tmp_path / NAME).read_bytes()
    for cut in range(len(whole) - 5, len(whole) - 1):
        (tmp_path / NAME).write_bytes(whole[:cut])
        again = Journal.open(tmp_path, RUN, restart=False)
        assert again.found == {("a",): 1}
        again.add(("b",), 2)
        assert (tmp_path / NAME).read_bytes() == whole


def test_another_run_is_refused_and_may_be_thrown_away(tmp_path: Path) -> None:
    Journal.open(tmp_path, RUN, restart=False).add(("a",), 1)
    with pytest.raises(InvalidRequest, match=r"output_dir: .* holds another run \(seed: 0 there, 1 now\)"):
        Journal.open(tmp_path, RUN | {"seed": 1}, restart=False)
    assert Journal.open(tmp_path, RUN | {"seed": 1}, restart=True).found == {}
    with pytest.raises(InvalidRequest, match="seed: 1 there, 0 now"):
        Journal.open(tmp_path, RUN, restart=False)


@pytest.mark.parametrize("foreign", ["[1, 2]", "3", "a diary", '{"key": 1}'])
def test_a_file_that_is_not_ours_stays_as_it_is(tmp_path: Path, foreign: str) -> None:
    (tmp_path / NAME).write_text(foreign)
    with pytest.raises(InvalidRequest, match=r"output_dir: .* holds another run"):
        Journal.open(tmp_path, RUN, restart=False)
    assert (tmp_path / NAME).read_text() == foreign


@pytest.mark.parametrize("foreign", ["[1, 2]", '{"key": ["c"]}'])
def test_a_line_of_another_shape_is_dropped(tmp_path: Path, foreign: str) -> None:
    Journal.open(tmp_path, RUN, restart=False).add(("a",), 1)
    with (tmp_path / NAME).open("a") as file:
        file.write(f"{foreign}\n")
    assert Journal.open(tmp_path, RUN, restart=False).found == {("a",): 1}


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="output_dir: a folder that can be written to"):
        Journal.open(tmp_path / "file", RUN, restart=False)


def test_what_was_found_is_in_memory_once(tmp_path: Path) -> None:
    text, count = "x" * 100_000, 40
    journal = Journal.open(tmp_path, RUN, restart=False)
    for number in range(count):
        journal.add(("samples", number), [{"text": text}])
    tracemalloc.start()
    try:
        again = Journal.open(tmp_path, RUN, restart=False)
        assert len(again.found) == count
        assert tracemalloc.get_traced_memory()[1] < 1.3 * count * len(text)
    finally:
        tracemalloc.stop()


def test_variants_are_dense_and_each_asked_for_once() -> None:
    found = variants(["sift+retrieval,sift.threshold=0.01", "dense", "quest", "quest"], ["quest.budget=64"])
    assert found == (
        Variant("dense", "dense", ()),
        Variant("sift+retrieval,sift.threshold=0.01", "sift+retrieval", ("sift.threshold=0.01",)),
        Variant("quest", "quest", ("quest.budget=64",)),
    )


def test_variants_choose_at_every_length_unless_they_say_otherwise() -> None:
    _, one, two = variants(["nosa", "sift,dense_below=7"], always_sparse=True)
    assert one.args == ("dense_below=0",)
    assert two.args == ("dense_below=7",)


def test_options_go_to_every_strategy_that_has_them() -> None:
    found = variants(["streaming", "sift+quest", "quest"], ["window=512", "quest.budget=64", "looks=8"])
    assert [each.args for each in found] == [
        (),
        ("window=512",),
        ("window=512", "quest.budget=64", "looks=8"),
        ("window=512", "quest.budget=64"),
    ]


@pytest.mark.parametrize("option", ["streming.window=512", "quest.window=512", "windw=512"])
def test_options_that_belong_to_nobody_are_refused(option: str) -> None:
    with pytest.raises(InvalidRequest, match=f"strategy_args: an option of one of dense, streaming, got {option!r}"):
        variants(["streaming"], [option])
