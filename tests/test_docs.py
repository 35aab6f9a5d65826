"""Tests of README, docs/ and the site: commands, links, code, generated tables, and the strategy package."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import logging
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from keysift.attention import StrategyError, known, make, parse, registry
from keysift.engine import LLM, EngineConfig, SamplingParams
from keysift.engine.engine import Engine
from keysift.engine.measure.profiling.profiler import Profiler
from keysift.engine.measure.profiling.settings import Profile
from keysift.engine.support import UNSUPPORTED
from keysift.server.commands.load.report import report as load_report
from keysift.server.commands.load.run import Load
from keysift.server.commands.load.run import _settings as load_settings
from tests.models import llama, save
from tests.pages import PAGES, ROOT, blocks, inline, split, undocumented, written_commands

README_LINES = 130
LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FILE = re.compile(r"(kvcache|attention|engine|server|benchmarks|tests|tools|requirements|docs|examples)/[\w/.-]*\w")


def named(program: str) -> list[Any]:
    found = [(page, words) for page, words in written_commands() if words[0] == program]
    assert found
    return [pytest.param(words, id=f"{page}: {shlex.join(words)}") for page, words in found]


@cache
def generate() -> Any:
    """docs/generate.py as a module."""
    specification = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", named("keysift"))
def test_commands_parse(words: list[str]) -> None:
    """Parse with the command line's own parser, and strategies with the registry, without running anything."""
    command = generate().commands()[words[1]]
    context = command.context_class(command, info_name=words[1])
    options, rest, _ = command.make_parser(context).parse_args(words[2:])
    assert not rest, f"unexpected arguments {rest}"
    for parameter in command.params:
        if parameter.callback is None:  # that of --config reads the file
            parameter.process_value(context, options.get(parameter.name))
    check_strategies(options)


def check_strategies(options: dict[str, Any]) -> None:
    wanted = options.get("strategy") or options.get("strategies") or "sift+retrieval"
    arguments = options.get("strategy_args") or []
    for label in [wanted] if isinstance(wanted, str) else wanted:
        name, *own = label.split(",")
        parse(name, [*own, *(each for each in arguments if each.partition(".")[0] in name.split("+"))])


def test_wrong_commands_are_found() -> None:
    wrong = {
        "keysift serve --no-such-flag": "No such option",
        "keysift serve a b": "unexpected arguments",
        "keysift serve --port many": "valid integer",
        "keysift serve --strategy shift": "unknown 'shift'",
        "keysift serve --strategy-arg sift.look=4": "no such option",
    }
    for line, problem in wrong.items():
        with pytest.raises(Exception, match=problem):
            test_commands_parse(next(split(line)))


@pytest.mark.parametrize("words", named("python"))
def test_programs_exist(words: list[str]) -> None:
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file()
        return
    if words[2].startswith("keysift."):
        assert importlib.util.find_spec(words[2])
        return
    path = ROOT.joinpath(*words[2].split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.is_file()
    known_flags = set(re.findall(r"--[a-z][a-z-]*", sources(file)))
    assert {word for word in words[3:] if word.startswith("--")} <= known_flags


def sources(file: Path) -> str:
    """The program's source, with that of its neighbours and of what programs share."""
    shared = [*file.parent.glob("*.py"), *(ROOT / "benchmarks" / "lib").glob("*.py")]
    return "\n".join(path.read_text() for path in {file, *shared})


@pytest.mark.parametrize("words", named("make"))
def test_targets_exist(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words[1:] if "=" not in word and not word.startswith("-")} <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = [slug(heading) for heading in HEADING.findall(path.read_text())]
            assert anchor in headings, f"{target}#{anchor}"


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    names = [code for code in inline(page) if FILE.fullmatch(code)]
    assert not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_its_imports_exist(page: Path) -> None:
    for _, text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keysift"):
                module = importlib.import_module(str(node.module))
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_the_readme_is_short_and_claims_no_gpu() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    assert "not run or measured on a GPU yet" in " ".join(text.split()).replace("**", "")


def test_the_strategies_page_names_every_strategy_and_option() -> None:
    made, written = generate().strategies(), (ROOT / "docs" / "strategies.md").read_text()
    readme = (ROOT / "README.md").read_text()
    sections = dict(zip(*[iter(re.split(r"^### `(.+)`$", made, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert set(sections) == set(known())
    for name, kind in known().items():
        assert f"`{name}`" in written
        assert f"`{name}`" in readme
        rows = [line.split(" | ") for line in sections[name].splitlines() if line.startswith("| `")]
        assert [row[0] for row in rows] == [f"| `{option.name}`" for option in registry.options(kind)]
        assert all(row[-1].strip(" |") for row in rows), f"an option of {name} has no description"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_options_exist(page: Path) -> None:
    """`sift.looks=16`, `tail=mean` and the like; those of the engine have flags."""
    for code in inline(page):
        if option := re.fullmatch(r"(?:--strategy-arg )?(?:([a-z]+)\.)?([a-z_]+)=([\w.]+)", code):
            names = [option[1]] if option[1] else [name for name in known() if registry.has_option(name, option[2])]
            assert any(accepts(name, f"{option[2]}={option[3]}") for name in names), code


def accepts(name: str, option: str) -> bool:
    try:
        parse(name, [option])
    except StrategyError:
        return False
    return True


def test_the_flag_tables_name_every_flag() -> None:
    for name, command in generate().commands().items():
        table = generate().flags(name)
        shown = [each for each in command.params if each.name != "help" and not getattr(each, "hidden", False)]
        flags = [flag for each in shown for flag in each.opts if flag.startswith("--")]
        assert not [flag for flag in flags if f"`{flag}`" not in table], name


def test_the_table_of_combinations_is_whole() -> None:
    table = generate().combinations()
    assert len(table.splitlines()) == 2 + len(UNSUPPORTED)
    assert all(f"`--{limit.option.replace('_', '-')}`" in table for limit in UNSUPPORTED)


def test_every_command_is_described() -> None:
    """Tables of flags for all but the two commands that take nothing but --json."""
    pages = "".join(page.read_text() for page in PAGES)
    flags = set(re.findall(r"generated: flags (\w+)", pages))
    assert set(generate().commands()) - flags == {"doctor", "strategies"}
    assert all(f"`keysift {name}" in pages for name in generate().commands())


def test_the_module_tables_name_every_module() -> None:
    table = generate().modules()
    for package in generate().PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            shown = path.parent if path.name == "__init__.py" else path
            name = f"{shown.relative_to(ROOT)}" + "/" * (shown is not path)
            assert f"| `{name}` |" in table or "_pb2" in name, f"{name} has no docstring"


def test_the_site_builds_without_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    commands = pytest.importorskip("mkdocs.commands.build")
    config = pytest.importorskip("mkdocs.config").load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        commands.build(config)
    assert not [record.message for record in caplog.records if record.name.startswith("mkdocs")]
    pages = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.html")}
    remote = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert not [
        (path, found) for path, text in pages.items() for found in remote.findall(text) if "canonical" not in found
    ]
    assert all("generated:" not in text for text in pages.values())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package of the page, installed as far as `importlib.metadata` looks."""
    for attributes, text in blocks(ROOT / "docs" / "adding-a-strategy.md", "toml", "python"):
        (tmp_path / attributes.partition('"')[2].rstrip('"')).write_text(text)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    information = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    entries = [
        f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in each.items())
        for group, each in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(entries))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("keysift_newest", None)


def test_the_package_of_the_page_works(package: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    strategy = make("newest", window="32")
    assert strategy.name == "newest"
    with pytest.raises(StrategyError, match=r"newest.window: .*got '-5'"):
        make("newest", window=-5)
    assert "newest" in known()
    for _, text in blocks(ROOT / "docs" / "adding-a-strategy.md", "text"):
        for words in split(text):
            test_commands_parse(words)
    llm = LLM(
        str(save(llama(), tmp_path_factory.mktemp("tiny"))), strategy="newest", strategy_args=("newest.window=32",)
    )
    [completion] = llm.generate([[7] * 400], SamplingParams(max_new_tokens=4, ignore_eos=True), progress=False)
    assert completion.finish is not None
    assert completion.finish.sparsity.strategy == "newest"
    assert 0 < completion.finish.sparsity.prefill_density < 0.5
    assert 0 < completion.finish.sparsity.decode_density < 0.5


def test_the_schema_page_names_every_field_of_a_profile(tmp_path: Path) -> None:
    model = save(llama(), tmp_path / "tiny")
    settings = Profile(
        strategies=("dense",), input_lens=(64,), output_len=2, runs=1, warmup=0, attempts=1, output_dir=tmp_path / "out"
    )
    engine = Engine(EngineConfig(model=str(model), kv_memory=2**22))
    found = Profiler(settings, engine).go(lambda *_: None)
    names = {*found, *found["environment"], *found["model"], *found["cells"][0]}
    assert not undocumented(names)


def test_the_schema_page_names_every_field_of_a_load() -> None:
    facts = {"date", "backend", "model_id", "interrupted", *load_settings(Load(address="localhost:1"))}
    assert not undocumented(facts | set(load_report([], {}, 1.0)))


def test_json_lines_of_the_examples_are_valid() -> None:
    lines = (ROOT / "examples" / "own_evaluation.jsonl").read_text().splitlines()
    assert all({"answer"} <= set(json.loads(line)) for line in lines)
