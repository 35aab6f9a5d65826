"""Plug-ins that do not load, or whose methods raise: told apart, clear to who names them, harmless to all others."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from keysift.attention import Dense, Split, StrategyError, find, known, make, parse
from keysift.attention.registry import BUILT_IN, broken, has_option
from keysift.server.commands import strategies

Install = Callable[..., str]
HEAD = """
from dataclasses import dataclass, field
from typing import Annotated
from pydantic import Field
from keysift.attention import Dense, Strategy
from keysift.kvcache import Phase

"""
CLASS = """
@dataclass(frozen=True, slots=True, kw_only=True)
class Plug(Strategy):
    \"\"\"A plug-in.\"\"\"

"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package with one module and one entry point; returns the module's name, another one each time."""

    def install(code: str, name: str = "plug", attribute: str = "Plug") -> str:
        module = f"plug_{abs(hash((str(tmp_path), code, name))):x}"
        folder = tmp_path / module
        package = folder / f"{module}-1.dist-info"
        package.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
        (package / "entry_points.txt").write_text(f"[keysift.strategies]\n{name} = {module}:{attribute}\n")
        monkeypatch.syspath_prepend(folder)
        return module

    return install


BROKEN = {
    "import": ("import nowhere_at_all", "does not load: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "raise": ("raise RuntimeError('old\\ntorch')", "does not load: RuntimeError: old torch"),
    "exit": ("import sys; sys.exit(3)", "does not load: SystemExit: 3"),
    "panic": ("class Panic(BaseException): pass\nraise Panic('rust')", "does not load: Panic: rust"),
    "syntax": ("def", "does not load: SyntaxError"),
    "nothing": ("", "does not load: AttributeError"),
    "number": ("Plug = 3", "is no class derived from keysift.attention.Strategy, but int"),
    "another class": ("class Plug: pass", "is no class derived from keysift.attention.Strategy, but type"),
    "an instance": (HEAD + "Plug = Dense()", "is no class derived from keysift.attention.Strategy, but Dense"),
    "a type unknown": (HEAD + CLASS + "    x: 'Nowhere' = 3", "options of .* cannot be read: NameError"),
    "a type unchecked": (HEAD + "class A: pass\n" + CLASS + "    x: A = None", "cannot be read: Pydantic"),
    "a bound of no number": (HEAD + CLASS + "    x: Annotated[int, Field(ge='a')] = 3", "cannot be read: "),
    "a default that raises": (HEAD + CLASS + "    x: int = field(default_factory=lambda: 1 // 0)", "ZeroDivisionError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_that_does_not_load_is_listed_and_breaks_nothing(
    case: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    code, problem = BROKEN[case]
    install(code)
    assert set(known()) == set(BUILT_IN)
    assert make("sift").name == "sift"
    assert list(broken()) == ["plug"]
    for name in ("plug", "sift+plug", "plug+retrieval"):
        with pytest.raises(StrategyError, match=rf"strategy: 'plug' is broken: .*{problem}"):
            make(name)
    with pytest.raises(StrategyError, match=r"known: .*dense, .*plug"):
        find("plugg")
    strategies.print_table(None)
    assert "broken: plug: " in capsys.readouterr().out
    strategies.print_json(None)
    assert set(json.loads(capsys.readouterr().out)["plug"]) == {"broken"}


def test_one_is_imported_once_whether_it_loads_or_not(install: Install, tmp_path: Path) -> None:
    count = tmp_path / "count"
    install(f"open({str(count)!r}, 'a').write('.'); raise ValueError('no')")
    for _ in range(3):
        with pytest.raises(StrategyError, match="is broken"):
            find("plug")
    assert count.read_text() == "."


def test_one_that_is_not_named_is_not_imported(install: Install, tmp_path: Path) -> None:
    install(f"open({str(tmp_path / 'imported')!r}, 'w')")
    make("sift+retrieval", **{"sift.looks": 2})
    with pytest.raises(StrategyError, match="unknown"):
        make("plugg")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["sift", "a+b", "a.b"])
def test_one_cannot_take_a_name_that_is_taken_or_that_nobody_can_write(name: str, install: Install) -> None:
    module = install(HEAD + CLASS, name)
    assert set(known()) == set(BUILT_IN)
    assert make("sift") == make("sift", looks=4)
    assert list(broken()) == [f"{name} ({module}:Plug)"]


def test_of_two_with_one_name_one_counts(install: Install) -> None:
    first, second = install(HEAD + CLASS + "    a: int = 1"), install(HEAD + CLASS + "    b: int = 1")
    used = inspect.getmodule(find("plug"))
    assert used is not None
    assert used.__name__ in (first, second)
    (left,) = broken()
    assert used.__name__ not in left


METHODS = {
    "__hash__": "    def __hash__(self): raise KeyError('k')",
    "__eq__": "    def __eq__(self, other): raise KeyError('k')\n    __hash__ = object.__hash__",
    "__repr__": "    def __repr__(self): raise KeyError('k')",
    "name": "    @property\n    def name(self): raise KeyError('k')",
    "part": "    def part(self, phase): raise KeyError('k')",
    "index_spec": "    def index_spec(self): raise KeyError('k')",
    "remembers": "    @property\n    def remembers(self): raise KeyError('k')",
    "rows_at_the_end": "    @property\n    def rows_at_the_end(self): raise KeyError('k')",
    "scans": "    @property\n    def scans(self): raise KeyError('k')",
}
RETURNS = {
    "name": "    name = 3",
    "part": "    def part(self, phase): return None",
    "part ": "    def at(self, phase, context_len, queries): return 'dense'",
    "index_spec": "    def index_spec(self): return []",
    "rows_at_the_end": "    rows_at_the_end = 0.5",
}


@pytest.mark.parametrize("name", ["plug", "plug+dense", "dense+plug"])
@pytest.mark.parametrize(
    ("method", "code", "problem"),
    [(method, code, "KeyError: 'k'") for method, code in METHODS.items()]
    + [(method, code, "(TypeError|AttributeError)") for method, code in RETURNS.items()],
)
def test_a_method_that_fails_is_told_to_who_names_it(
    name: str, method: str, code: str, problem: str, install: Install
) -> None:
    install(HEAD + CLASS.replace("slots=True", "eq=False, repr=False") + code)
    assert "plug" in known()
    with pytest.raises(StrategyError, match=rf"strategy plug: {method.strip()} failed: {problem}"):
        make(name)


@pytest.mark.parametrize("error", ["KeyError('k')", "SystemExit(2)", "AssertionError"])
def test_a_plugin_that_cannot_be_made_is_told_to_who_names_it(error: str, install: Install) -> None:
    install(HEAD + CLASS + f"    def __post_init__(self): raise {error}")
    with pytest.raises(StrategyError, match=rf"strategy plug: {error.partition('(')[0]}"):
        make("plug")


def test_a_plugin_takes_no_nan(install: Install) -> None:
    install(HEAD + CLASS + "    x: float = 0.5")
    assert make("plug", x="inf") != make("plug")
    with pytest.raises(StrategyError, match=r"plug\.x: a number, got nan"):
        parse("plug", ["x=nan"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("retrieval+sift", r"retrieval chooses for generated tokens only; write sift\+retrieval"),
        ("quest+flexprefill", r"quest chooses for generated tokens only; write flexprefill\+quest"),
        ("retrieval+streaming", r"retrieval chooses for generated tokens only; write streaming\+retrieval"),
        ("topk+topk", r"topk chooses for generated tokens only; write dense\+topk"),
        ("retrieval+dense", r"retrieval chooses for generated tokens only; write dense\+retrieval"),
        ("dense+sift", r"sift chooses for prompts only; write sift\+dense"),
        ("streaming+sift", r"sift chooses for prompts only; write sift\+streaming"),
        ("sift+xattention", r"xattention chooses for prompts only; write xattention\+dense"),
    ],
)
def test_parts_in_the_wrong_place_are_refused(name: str, message: str) -> None:
    with pytest.raises(StrategyError, match=f"strategy: {message}"):
        make(name)
    make(message.rpartition("write ")[2].replace("\\", ""))


@pytest.mark.parametrize(
    "name", ["dense+dense", "dense+retrieval", "sift+dense", "streaming+streaming", "streaming+nosa"]
)
def test_parts_in_their_place_are_taken(name: str) -> None:
    assert isinstance(make(name), Split)
    assert make("dense+retrieval") == Split(prompt=Dense(), token=make("retrieval"))


HUGE = "a" * 4_000_000


@pytest.mark.parametrize(
    "call",
    [
        lambda: find(HUGE),
        lambda: make(HUGE),
        lambda: make(f"sift+{HUGE}"),
        lambda: make("+" * 4_000_000),
        lambda: make("dense+" * 600_000),
        lambda: parse("sift", [HUGE]),
        lambda: parse("sift", [f"{HUGE}=1"]),
        lambda: parse("sift", [f"{HUGE}.looks=1"]),
        lambda: parse("sift", [f"looks={HUGE}"]),
        lambda: parse("sift", ["looks=" + "9" * 4_000_000]),
        lambda: parse("retrieval", [f"index={HUGE}"]),
        lambda: has_option("dense+" * 600_000, "looks"),
        lambda: has_option(HUGE, "looks"),
    ],
)
def test_huge_texts_are_refused_at_once_in_a_short_line(call: Callable[[], object]) -> None:
    began = time.thread_time()
    with pytest.raises(StrategyError) as caught:
        call()
    assert time.thread_time() - began < 0.1
    assert len(str(caught.value)) < 600
