"""TLS, mTLS and the bearer token, with certificates made for the test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keysift.engine import InvalidRequest
from keysift.server.client import Client
from keysift.server.errors import Unauthenticated, Unavailable
from keysift.server.options import ServerConfig

from .conftest import Running

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority (ca.pem) and a certificate for localhost signed by it (cert.pem, key.pem)."""
    folder = tmp_path_factory.mktemp("pki")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca, ca_key, request = folder / "ca.pem", folder / "ca.key", folder / "request"
    openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", ca, "-subj", "/CN=authority", "-days", "2")
    openssl("req", *new_key, "-keyout", folder / "key.pem", "-out", request, "-subj", "/CN=localhost")
    sign = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2", "-extfile", folder / "names")
    openssl("x509", "-req", "-in", request, *sign, "-out", folder / "cert.pem")
    return folder


@needs_openssl
def test_tls(start: Callable[..., Running], pki: Path) -> None:
    running = start(ssl_keyfile=pki / "key.pem", ssl_certfile=pki / "cert.pem")
    with Client(running.address, ssl_ca_certs=pki / "ca.pem") as client:
        assert client.info().model == "tiny"
    with Client(running.address) as client, pytest.raises(Unavailable):
        client.info(timeout=5)


@needs_openssl
def test_mtls(start: Callable[..., Running], pki: Path) -> None:
    pair = {"ssl_keyfile": pki / "key.pem", "ssl_certfile": pki / "cert.pem"}
    running = start(**pair, ssl_ca_certs=pki / "ca.pem")
    with Client(running.address, ssl_ca_certs=pki / "ca.pem", **pair) as client:
        assert client.info().model == "tiny"
    with Client(running.address, ssl_ca_certs=pki / "ca.pem") as client, pytest.raises(Unavailable):
        client.info(timeout=5)


@pytest.fixture(scope="module")
def locked(start: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory) -> Running:
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text("open sesame\n")
    return start(api_key_file=file)


def test_the_right_token(locked: Running) -> None:
    with Client(locked.address, api_key="open sesame") as client:
        assert client.info().model == "tiny"
        assert list(client.generate("x"))


@pytest.mark.parametrize("key", [None, "open barley", "open sesam"], ids=["none", "wrong", "cut"])
def test_another_token(locked: Running, key: str | None) -> None:
    with Client(locked.address, api_key=key) as client:
        for call in (client.info, client.server_info, lambda: list(client.generate("x")), lambda: client.abort(["x"])):
            with pytest.raises(Unauthenticated, match="Bearer"):
                call()


def test_probes_need_no_token(locked: Running) -> None:
    with grpc.insecure_channel(locked.address) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
    assert status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"ssl_keyfile": "key.pem"}, "ssl_keyfile"),
        ({"ssl_ca_certs": "ca.pem"}, "ssl_ca_certs"),
        ({"api_key": "a", "api_key_file": "b"}, "api_key_file"),
        ({"api_key": ""}, "api_key"),
        ({"port": 70_000}, "port"),
        ({"max_message_size": "1KiB"}, "max_message_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_setting_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ServerConfig(**fields)
    assert caught.value.field == field


def test_the_token_is_not_shown() -> None:
    assert "sesame" not in repr(ServerConfig(api_key="open sesame"))
