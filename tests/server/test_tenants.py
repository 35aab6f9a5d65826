"""Tenants: the file of tokens, and that one tenant meets nothing of another one."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from keysift.engine import Engine, EngineConfig, Finish, InvalidRequest, Output, PromptInfo, SamplingParams
from keysift.server import inference_pb2 as pb
from keysift.server import reloading
from keysift.server.client import Client
from keysift.server.errors import DuplicateRequest, Unauthenticated
from keysift.server.inference_pb2_grpc import InferenceStub
from keysift.server.reloading import Reloaded
from keysift.server.tenants import ANYONE, GREATEST, LEAST, Tenant, TokenFile, read_tokens, single

from .conftest import Running, SlowEngine

TOKENS = """
# name  token  limits
alice   token-of-alice   streams=3 queue=2 priority=0..10
bob     token-of-bob     priority=-5..-1

carol   token-of-carol
"""
ONE = SamplingParams(max_new_tokens=1)
LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(TOKENS)
    return path


def test_lines_are_tenants(file: Path) -> None:
    tokens = read_tokens(file)
    assert tokens.find(b"token-of-alice") == Tenant(name="alice", streams=3, queue=2, priority=(0, 10))
    assert tokens.find(b"token-of-bob") == Tenant(name="bob", priority=(-5, -1))
    assert tokens.find(b"token-of-carol") == Tenant(name="carol", priority=(0, GREATEST))
    assert tokens.find(b"token-of-dave") is None
    assert tokens.find(b"") is None


def test_a_word_alone_is_the_token_of_all(tmp_path: Path) -> None:
    (path := tmp_path / "tokens").write_text("  sesame \n\n")
    assert read_tokens(path).find(b"sesame") == single("sesame").find(b"sesame") == ANYONE
    assert ANYONE.priority == (LEAST, GREATEST)


FAULTS = {
    "empty": (b"\n# nothing\n", "a file with a token, got an empty one"),
    "binary": (b"\xff\xfe\x00secret", "text, got other bytes at byte 0"),
    "alone": (b"alice secret-a\nsecret-b\n", "line 2: NAME TOKEN, got one word"),
    "name": (b"a/b secret-a\n", "line 1: a name of 1 to 64 letters, digits, '_', '.' and '-'"),
    "twin name": (b"a secret-a\nb secret-b\na secret-c\n", "line 3: the name 'a' is that of line 1"),
    "twin token": (b"a secret-a\nb secret-a\n", "line 2: the token is that of line 1"),
    "token": ("a secret-ä\n".encode(), "line 1: a token of printable ASCII characters"),
    "sole token": (b"secret\x07\n", "line 1: a token of printable ASCII characters"),
    "unknown setting": (b"a secret-a speed=9\n", "line 1: after name and token only priority, queue, streams, each"),
    "no value": (b"a secret-a queue\n", "line 1: after name and token only"),
    "bad value": (b"a secret-a queue=0\n", "line 1: queue: Input should be greater than or equal to 1, got '0'"),
    "bad range": (b"a secret-a priority=10..0\n", "line 1: priority: LEAST..GREATEST, such as 0..10, got '10..0'"),
    "no token": (b"alice streams=8\n", "line 1: a token, got a setting in its place"),
    "setting alone": (b"priority=0..1\n", "line 1: a token, got a setting in its place"),
    "huge": (b"a" * 2**21, "at most 1048576 bytes, got 2097152"),
}


@pytest.mark.parametrize(("content", "problem"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_names_file_and_line_but_no_token(tmp_path: Path, content: bytes, problem: str) -> None:
    (path := tmp_path / "tokens").write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        read_tokens(path)
    assert caught.value.field == "api_key_file"
    assert caught.value.problem.startswith(f"{str(path)!r}: {problem}")
    assert "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InvalidRequest, match=rf"api_key_file: .*a readable file \({problem}"):
            read_tokens(path)


def test_a_token_that_no_call_could_carry() -> None:
    for token in ("", " ", "a\nb", "ä"):
        with pytest.raises(InvalidRequest, match="api_key: a token of printable ASCII"):
            single(token)


def test_a_new_file_counts_and_a_broken_one_does_not(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = itertools.count(0, reloading.CHECK_S)
    caplog.set_level("INFO", "keysift")
    tokens = Reloaded((file,), lambda: read_tokens(file), lambda: next(now))
    assert tokens().find(b"token-of-alice")
    replace(file, "alice new-token\n")
    assert tokens().find(b"new-token")
    assert tokens().find(b"token-of-alice") is None
    replace(file, "alice\nbob\n")
    for _ in range(3):
        assert tokens().find(b"new-token")
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]
    assert "stays in force" in caplog.text
    file.unlink()
    assert tokens().find(b"new-token")
    replace(file, TOKENS)
    assert tokens().find(b"token-of-alice")


def test_a_name_alone_does_not_become_the_token_of_all(file: Path) -> None:
    """As when the file is read while it is being written."""
    tokens = TokenFile(file)
    assert tokens().find(b"token-of-alice")
    replace(file, "alice")
    with pytest.raises(InvalidRequest, match="lines NAME TOKEN as before, got one word"):
        tokens()


def test_a_file_that_changes_while_it_is_read_is_read_again(file: Path) -> None:
    now, writes = itertools.count(0, reloading.CHECK_S), ["bob half-written\n", "bob whole\n"]

    def read() -> Any:
        tokens = read_tokens(file)
        if len(writes) == 1:
            replace(file, writes.pop())
        return tokens

    tokens = Reloaded((file,), read, lambda: next(now))
    replace(file, writes.pop(0))
    assert tokens().find(b"half-written") is None
    assert tokens().find(b"whole")


def test_a_fault_of_any_kind_leaves_what_was_read_and_is_tried_again(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now, faults = itertools.count(0, reloading.CHECK_S), list[Exception]()

    def read() -> Any:
        if faults:
            raise faults.pop()
        return read_tokens(file)

    tokens = Reloaded((file,), read, lambda: next(now))
    faults += [OSError("too many open files")] * 2
    replace(file, "bob new-token\n")
    assert tokens().find(b"token-of-alice")
    assert tokens().find(b"token-of-alice")
    assert tokens().find(b"new-token")
    assert caplog.text.count("too many open files") == 1


def test_a_change_that_keeps_time_and_size_counts(file: Path) -> None:
    now = itertools.count(0, reloading.CHECK_S)
    tokens = Reloaded((file,), lambda: read_tokens(file), lambda: next(now))
    before = file.stat()
    file.write_text(TOKENS.replace("token-of-alice", "token-of-alicE"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tokens().find(b"token-of-alicE")


def replace(path: Path, content: str) -> None:
    """Exchange a file as editors and orchestrators do."""
    other = path.with_name("other")
    other.write_text(content)
    os.replace(other, path)


def test_files_are_looked_at_once_a_second(file: Path) -> None:
    now = 0.0
    tokens = Reloaded((file,), lambda: read_tokens(file), lambda: now)
    replace(file, "alice new-token\n")
    now = reloading.CHECK_S / 2
    assert tokens().find(b"new-token") is None
    now = reloading.CHECK_S
    assert tokens().find(b"new-token")


@pytest.fixture(scope="module")
def shared(start: Callable[..., Running], engine_config: EngineConfig, tmp_path_factory: Any) -> Running:
    """A slow server for the three tenants."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(TOKENS)
    return start(lambda: SlowEngine(engine_config), api_key_file=path)


@pytest.fixture
def clients(shared: Running) -> Iterator[dict[str, Client]]:
    clients = {name: Client(shared.address, api_key=f"token-of-{name}") for name in ("alice", "bob", "carol")}
    yield clients
    for client in clients.values():
        client.close()
    shared.free_pages()


def test_the_scheme_counts_in_lower_case(shared: Running) -> None:
    with grpc.insecure_channel(shared.address) as channel:
        info = InferenceStub(channel).GetServerInfo
        for scheme in ("bearer", "BEARER", "Bearer "):
            metadata = (("authorization", f"{scheme} token-of-alice"),)
            assert info(pb.GetServerInfoRequest(), metadata=metadata, timeout=30).version
        for value in ("basic token-of-alice", "token-of-alice", "bearer", "bearer alice"):
            with pytest.raises(grpc.RpcError) as caught:
                info(pb.GetServerInfoRequest(), metadata=(("authorization", value),), timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_ids_are_each_tenants_own(clients: dict[str, Client]) -> None:
    streams = {name: clients[name].generate("x", LONG, request_id="twin") for name in ("alice", "carol")}
    infos = {name: next(stream) for name, stream in streams.items()}
    assert all(isinstance(info, PromptInfo) and info.request_id == "twin" for info in infos.values())
    assert clients["bob"].abort(["twin"]) == []
    with pytest.raises(DuplicateRequest, match=r"request_id: 'twin'"):
        list(clients["alice"].generate("x", ONE, request_id="twin"))
    assert clients["alice"].abort(["twin", "twin", "carol/twin"]) == ["twin"]
    assert finish(streams["alice"]).reason.value == "cancelled"
    assert clients["carol"].abort(["twin"]) == ["twin"]
    assert finish(streams["carol"]).reason.value == "cancelled"


def finish(outputs: Iterator[Output]) -> Finish:
    *_, last = outputs
    assert isinstance(last, Finish)
    return last


def test_tenants_share_no_prefixes(clients: dict[str, Client]) -> None:
    prompt = "a prompt that fills some pages " * 8

    def cached(name: str, salt: str = "") -> int:
        outputs = clients[name].generate(prompt, ONE, cache_salt=salt, priority=-1 if name == "bob" else 0)
        return finish(outputs).usage.cached_tokens

    assert cached("alice") == 0
    assert cached("alice") > 0
    assert cached("bob") == 0
    assert cached("carol", "alice/") == cached("carol", "alice") == 0


def test_the_operator_may_let_tenants_share_prefixes(start: Callable[..., Running], file: Path) -> None:
    running = start(api_key_file=file, share_prefix_cache=True)
    prompt = "a prompt that fills some pages " * 8
    cached = []
    for name, priority in (("alice", 0), ("bob", -1)):
        with Client(running.address, api_key=f"token-of-{name}") as client:
            cached.append(finish(client.generate(prompt, ONE, priority=priority)).usage.cached_tokens)
    assert cached[0] == 0 < cached[1]


@pytest.mark.parametrize(
    ("name", "priority", "limits"),
    [("alice", 11, "0 to 10"), ("alice", -1, "0 to 10"), ("bob", 0, "-5 to -1"), ("carol", -1, f"0 to {GREATEST}")],
)
def test_priorities_have_a_range(clients: dict[str, Client], name: str, priority: int, limits: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"priority: {limits} with this token, got {priority}"):
        list(clients[name].generate("x", ONE, priority=priority))
    assert list(clients["bob"].generate("x", ONE, priority=-5))


def test_a_tenant_has_places_and_streams_of_its_own(clients: dict[str, Client]) -> None:
    streams = [clients["alice"].generate("x", LONG) for _ in range(2)]
    assert all(isinstance(next(stream), PromptInfo) for stream in streams)
    with pytest.raises(Exception, match=r"queue: 2 requests of this token, at most 2") as caught:
        list(clients["alice"].generate("x", ONE))
    assert caught.value.retry_after_s  # type: ignore[attr-defined]
    assert list(clients["carol"].generate("x", ONE))
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def test_open_calls_of_a_tenant(clients: dict[str, Client]) -> None:
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait(30)
        yield from ()

    alice = clients["alice"]
    call = alice._channel.stream_stream("/keysift.v1.Inference/Generate")
    calls = [call(nothing(), metadata=alice._metadata) for _ in range(3)]
    deadline = time.monotonic() + 20
    message = ""
    while "streams of alice: at most 3 calls are open at once" not in message:
        assert time.monotonic() < deadline
        # One that came before the calls of another test were over has been refused.
        calls = [each if not each.done() else call(nothing(), metadata=alice._metadata) for each in calls]
        try:
            alice.server_info(timeout=30)
        except Exception as error:
            message = str(error)
    assert clients["carol"].server_info(timeout=30).version
    end.set()
    for each in calls:
        each.cancel()


def test_metrics_count_by_tenant(clients: dict[str, Client], shared: Running) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"keysift_tenant_{name}_total", labels) or 0.0

    def counts() -> list[float]:
        refused = value("refusals", tenant="carol", status="INVALID_ARGUMENT")
        strangers = value("refusals", tenant="", status="UNAUTHENTICATED")
        names = ("requests", "prompt_tokens", "generation_tokens")
        return [*(value(name, tenant="carol") for name in names), refused, strangers]

    before = counts()
    usage = finish(clients["carol"].generate("hello", SamplingParams(max_new_tokens=4, ignore_eos=True))).usage
    with pytest.raises(InvalidRequest):
        list(clients["carol"].generate("x", ONE, priority=-1))
    with Client(shared.address, api_key="no-such") as client, pytest.raises(Unauthenticated):
        client.server_info(timeout=30)
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, usage.prompt_tokens, 4, 1, 1]


def test_tokens_change_while_the_server_runs(
    start: Callable[..., Running], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "CHECK_S", 0)
    running = start(api_key_file=file)
    with Client(running.address, api_key="token-of-alice") as client:
        assert client.server_info(timeout=30).version
        replace(file, "alice another-token\n")
        with pytest.raises(Unauthenticated):
            client.server_info(timeout=30)
    with Client(running.address, api_key="another-token") as client:
        assert client.server_info(timeout=30).version


def test_a_broken_file_does_not_start(start: Callable[..., Running], engine_config: EngineConfig, file: Path) -> None:
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidRequest, match="api_key_file"):
        start(lambda: Engine(engine_config), api_key_file=file)
