"""Every page, whatever its results hold: nothing from outside, nothing unescaped, every axis named."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keysift.engine.measure.evaluation.report import write_report as evaluation_page
from keysift.engine.measure.profiling.report import write_comparison
from keysift.engine.measure.profiling.report import write_report as profile_page
from tests.engine.measure.reports.document import Document
from tests.engine.measure.reports.results import EVIL, STRATEGIES, TASKS, Json, evaluation, load, profile

FEW = ("dense", "sift+retrieval", "xattention(threshold=0.95, stride=8)+retrieval(top_k=100, probes=4)")
Write = Callable[[Path], None]
UNITS = re.compile(
    r"\((%|s|ms|nats|GiB|tokens|tokens/s|nats per token|ms per token)\)|log scale|against|^(layer|query head)$"
)


def compared(path: Path) -> None:
    after = profile(FEW, (1024, 4096), (1,))
    after["environment"]["commit"] = "0123abc"
    write_comparison(profile(FEW, (1024, 4096), (1, 4)), after, path)


PAGES: dict[str, Write] = {
    "evaluation": lambda path: evaluation_page(evaluation(FEW, (1024, 4096), 2, layers=4), path),
    "profile": lambda path: profile_page(profile(FEW, (1024, 4096), (1, 4)), path),
    "load": lambda path: profile_page(load(), path),
    "comparison": compared,
}
SECTIONS = {
    "evaluation": ["verdict", "curves", "tasks", "agreement", "heads", "samples", "run", "terms"],
    "profile": ["cells", "latency", "shares", "run", "terms"],
    "load": ["load", "run", "terms"],
    "comparison": ["ratios", "differences", "terms"],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Document]:
    folder = tmp_path_factory.mktemp("pages")
    for name, write in PAGES.items():
        write(folder / f"{name}.html")
    return {name: Document(folder / f"{name}.html") for name in PAGES}


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest, pages: dict[str, Document]) -> Document:
    return pages[request.param]


@pytest.mark.parametrize("name", PAGES)
def test_all_sections_are_there(pages: dict[str, Document], name: str) -> None:
    assert list(pages[name].sections) == SECTIONS[name]
    links = [link for link in pages[name].attributes("href") if link[1:] in SECTIONS[name]]
    assert links == [f"#{section}" for section in SECTIONS[name]]


def test_nothing_comes_from_outside(page: Document) -> None:
    """No address but of the page's own parts and of data within it, in attributes or in the style sheet."""
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"iframe", "object", "embed", "base", "audio", "video", "form"}
    for link in page.attributes("src", "href", "srcset", "action", "data", "xlink:href"):
        assert link.startswith(("#", "data:")), link
    assert not re.search(r"@import|url\((?!#)", page.source)
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert "http:" not in policy
    assert "script-src 'sha256-" in policy


def test_there_is_one_script_and_no_handler(page: Document) -> None:
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert EVIL not in page.source


def test_ids_are_unique_and_every_reference_leads_somewhere(page: Document) -> None:
    ids = page.attributes("id")
    named = {link[1:] for link in page.attributes("href") if link.startswith("#")}
    named |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert len(set(ids)) == len(ids)
    assert named <= set(ids)


def test_charts_wear_the_colours_of_the_page(page: Document) -> None:
    """No stand-in colour is left, no colour of matplotlib's own, and the style sheet knows each variable."""
    for _, attributes in page.elements:
        style = attributes.get("style", "")
        assert not re.search("#[0-9a-f]{6}", style), style
        for variable in re.findall(r"var\((--\w+)\)", style):
            assert page.source.count(f"{variable}:") == (1 if variable == "--loss" else 2), variable


def test_text_of_charts_is_text_in_the_reader_s_font(page: Document) -> None:
    svgs = sum(tag == "svg" and attributes.get("class") == "chart" for tag, attributes in page.elements)
    assert svgs
    assert len(page.inside("svg", "text")) > 4 * svgs
    assert "font-family: 'DejaVu" not in page.source


def test_every_axis_has_a_name_and_a_unit(page: Document) -> None:
    """Each chart has a label under it, with a unit; matplotlib writes the labels of axes in 11 pixels."""
    labels = re.findall(r'<text style="font-size: 11px[^>]*>([^<]+)</text>', page.source)
    assert labels
    for label in labels:
        assert UNITS.search(label) or label in ("new token", "after / before, log scale", "prompts at once"), label


def test_charts_are_described_for_those_who_do_not_see_them(page: Document) -> None:
    for tag, attributes in page.elements:
        if tag == "svg" and attributes.get("class") == "chart":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 8


@pytest.mark.parametrize("name", ["evaluation", "profile", "comparison"])
def test_every_strategy_is_named_in_its_first_section(pages: dict[str, Document], name: str) -> None:
    words = pages[name].text(SECTIONS[name][0])
    for strategy in FEW:
        assert strategy in words


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_the_same_each_time(name: str, tmp_path: Path, pages: dict[str, Document]) -> None:
    """Also under somebody's own settings of matplotlib, which stay as they are."""
    import matplotlib

    path = tmp_path / "again.html"
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.hashsalt": "salt", "lines.linewidth": 9}):
        PAGES[name](path)
        assert matplotlib.rcParams["font.size"] == 30
    assert path.read_text(encoding="utf-8") == pages[name].source


def test_the_evaluation_escapes_prompts_and_answers(pages: dict[str, Document]) -> None:
    words = pages["evaluation"].text("samples")
    assert words.count(EVIL) >= 3  # the answer, what was said, the end of the prompt
    assert "\x00" not in pages["evaluation"].source
    assert "The grass is green.\ufffd" in words


def test_wrong_samples_come_first_and_the_surest_loss_before_them(pages: dict[str, Document]) -> None:
    rows = [attributes.get("class") for tag, attributes in pages["evaluation"].elements if tag == "tr"]
    samples = rows[-len(TASKS) * 2 * 2 * len(FEW) :]
    wrong = samples.count("wrong")
    assert 0 < wrong < len(samples)
    assert samples[:wrong] == ["wrong"] * wrong
    words = pages["evaluation"].sections["samples"]
    assert words[words.index("texts") + 1] == "niah_single_1"  # where the evil answer costs 8 nats


def test_the_verdict_names_the_worst_task(tmp_path: Path) -> None:
    results = evaluation(FEW[:2], (1024, 2048), 1, layers=2)
    for row in results["scores"]:
        row["score"] = 0.9 if row["strategy"] == "dense" else 0.85
        if (row["strategy"], row["task"], row["length"]) == (FEW[1], "cwe", 2048):
            row["score"] = 0.4
    evaluation_page(results, tmp_path / "report.html")
    document = Document(tmp_path / "report.html")
    verdict = document.sections["verdict"]
    assert "cwe at 2k" in verdict
    assert "−50 points" in verdict
    table = [text for text in document.sections["tasks"] if text in TASKS]
    assert table[0] == "cwe"


def test_a_task_that_dense_cannot_do_is_said_to_be_noise(pages: dict[str, Document]) -> None:
    assert "Dense attention itself scores under 50 % on: vt at 1k, 4k." in pages["evaluation"].text("tasks")


def test_ratios_against_dense_are_those_of_the_medians(tmp_path: Path) -> None:
    results = profile(FEW[:2], (2048,), (1,))
    dense, sparse = results["cells"]
    dense["ttft_ms"]["median"], sparse["ttft_ms"]["median"] = 800.0, 200.0
    dense["tpot_ms"]["median"], sparse["tpot_ms"]["median"] = 20.0, 30.0
    profile_page(results, tmp_path / "report.html")
    words = Document(tmp_path / "report.html").sections["cells"]
    assert [word for word in words if word.endswith("×")] == ["0.25×", "1.50×"]


def test_a_disturbed_cell_is_marked(pages: dict[str, Document]) -> None:
    assert "disturbed" in pages["profile"].sections["cells"]
    assert "A hollow mark is a disturbed measurement." in pages["profile"].text("latency")


def test_a_comparison_tells_what_differs(pages: dict[str, Document]) -> None:
    words = pages["comparison"].sections["differences"]
    assert words[words.index("commit") + 1 : words.index("commit") + 3] == ["650df88", "0123abc"]
    assert "processor" not in words
    assert "Left out are cells that only one profile has: before 6, after 0." in pages["comparison"].text("ratios")


def test_comparing_a_profile_with_itself_shows_no_change(tmp_path: Path) -> None:
    results = profile(FEW[:2], (1024, 2048), (1,))
    write_comparison(results, copy.deepcopy(results), tmp_path / "report.html")
    words = Document(tmp_path / "report.html").sections["ratios"]
    assert [word for word in words if re.fullmatch(r"\d\.\d\d×", word)] == ["1.00×"] * 12


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    results = {**evaluation(FEW[:2], (1024,), 1, layers=2), "finished": False}
    evaluation_page(results, tmp_path / "report.html")
    assert "did not come to its end" in Document(tmp_path / "report.html").source


@pytest.mark.parametrize(("texts", "charts"), [(("all", "manual"), 2), (("manual",), 2), (("manual", "letters"), 0)])
def test_kl_is_drawn_against_length_where_one_curve_tells_it(
    texts: tuple[str, ...], charts: int, tmp_path: Path
) -> None:
    """One text alone, as by default, has no row of all texts."""
    results = evaluation(FEW[:2], (1024, 4096), 1, layers=2)
    rows = [row for row in results["agreement"] if row["source"] == "tasks" or row["name"] == "manual"]
    along = [row for row in rows if row["source"] == "text"]
    results["agreement"] = rows + [{**row, "name": name} for row in along for name in texts if name != "manual"]
    evaluation_page(results, tmp_path / "report.html")
    assert Document(tmp_path / "report.html").text("agreement").count("the mean KL as the context grows") == charts


@pytest.mark.parametrize("missing", ["summary", "scores", "agreement", "heads", "samples", "settings", "environment"])
def test_a_section_without_data_is_left_out(missing: str, tmp_path: Path) -> None:
    results = evaluation(FEW[:2], (1024, 2048), 1, layers=2)
    if missing in ("heads", "environment"):
        results[missing] = None
    else:
        del results[missing]
    evaluation_page(results, tmp_path / "report.html")
    gone = {"scores": "tasks"}.get(missing, missing)
    assert list(Document(tmp_path / "report.html").sections) == [
        name for name in SECTIONS["evaluation"] if name != gone
    ]


@pytest.mark.parametrize("strategies", [("dense",), ("sift",), STRATEGIES])
@pytest.mark.parametrize("lengths", [(1024,), (1000, 1100, 6000)])
def test_few_and_many(strategies: tuple[str, ...], lengths: tuple[int, ...], tmp_path: Path) -> None:
    """One strategy or eight, one length or several, dense or not."""
    path = tmp_path / "report.html"
    profile_page(profile(strategies, lengths, (1,)), path)
    assert all(name in Document(path).text("cells") for name in strategies)


def test_numbers_that_are_missing_are_dashes(tmp_path: Path) -> None:
    """Every number of every row taken out: the pages still come, and nothing reads `None` or `nan`."""
    path = tmp_path / "report.html"
    keep = {"task", "length", "strategy", "index", "source", "name", "phase", "input_len", "batch_size"}
    for results, write in ((evaluation(FEW[:2], (1024,), 1, 2), evaluation_page), (profile(FEW[:2]), profile_page)):
        for key in ("scores", "summary", "agreement", "samples", "cells"):
            rows = results.get(key, [])
            results[key] = [{name: value if name in keep else None for name, value in row.items()} for row in rows]
        write(results, path)
        words = [word for section in Document(path).sections.values() for word in section]
        assert "–" in words
        assert not {"None", "nan", "inf"} & set(words)


def test_results_read_back_from_a_file_make_the_same_page(tmp_path: Path) -> None:
    """Also where a number is not one: json writes NaN and Infinity, and the page shows a dash."""
    results: Json = profile(FEW[:2], (1024,), (1,))
    results["cells"][0]["coverage"] = float("nan")
    results["cells"][1]["kv_bytes"] = float("inf")
    profile_page(results, tmp_path / "a.html")
    profile_page(json.loads(json.dumps(results)), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_results_without_anything_still_make_a_page(tmp_path: Path) -> None:
    for write in (evaluation_page, profile_page):
        write({}, tmp_path / "report.html")
        assert list(Document(tmp_path / "report.html").sections) == ["run", "terms"]


def test_importing_the_reports_is_light() -> None:
    """The command line imports them early: what is heavy waits for the first page."""
    code = (
        "import sys, keysift.engine.measure.evaluation.report, keysift.engine.measure.profiling.report;"
        "print(sorted({'transformers', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_writing_replaces_the_page_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    for _ in range(2):
        profile_page(load(), path)
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]


def test_half_a_character_does_not_stop_the_page(tmp_path: Path) -> None:
    results = load()
    results["load"]["errors"] = ["broken \ud83d off"]
    profile_page(results, tmp_path / "report.html")
    assert "broken ? off" in Document(tmp_path / "report.html").text("load")
