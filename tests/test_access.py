"""Proves whose job server we talk to, and where the token is found, against a server of sockets."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import access
from pipeline.errors import ConfigError

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*AUTH, "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@contextmanager
def answering(
    status: int, body: bytes = b'{"version": "4"}', accepts: str | None = None
) -> Iterator[str]:
    """A server that answers everybody alike, but for who shows the token that it accepts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown = self.headers["Authorization"]
            assert status == 401 or shown is None  # nothing is told to a stranger
            welcome = accepts is not None and shown == f"Bearer {accepts}"
            self.send_response(200 if welcome else 403 if shown else status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://localhost:8265/", True),
        ("https://[::1]:8265", True),
        ("127.8.9.1:6379", True),
        ("0.0.0.0:8265", False),
        ("10.0.0.7:6379", False),
        ("http://localhost.example.org", False),
        ("http://head.internal:8265", False),
        ("", False),
    ],
)
def test_is_loopback(address: str, own: bool) -> None:
    assert access.is_loopback(address) is own


def test_server_address__the_option_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert access.server_address(None) == access.DEFAULT_SERVER
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1/")
    assert access.server_address(None) == "http://a:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://b:2")
    assert access.server_address(None) == "https://b:2"
    assert access.server_address("http://c:3") == "http://c:3"


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "ray://h:10001", "http://me:S3cret@h:8265"])
def test_server_address__of_something_else(address: str) -> None:
    with pytest.raises(ConfigError, match="expected http") as error:
        access.server_address(address)
    assert "S3cret" not in str(error.value)


def test_token__in_the_order_of_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert access.token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("third\n")
    assert access.token() == "third"
    (tmp_path / "file").write_text("second")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert access.token() == "second"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first")
    assert access.token() == "first"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert access.token() is None


def test_refusal__a_guarded_server_wants_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(401, accepts="held") as server:
        assert access.wants_token(server) is True
        assert "wants a token" in str(access.refusal(server))
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        assert "does not accept the token" in str(access.refusal(server))
        monkeypatch.setenv("RAY_AUTH_TOKEN", "held")
        assert access.refusal(server) is None


def test_refusal__an_open_server_on_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200) as server:
        assert access.wants_token(server) is False
        assert access.refusal(server) is None
        monkeypatch.setattr(access, "is_loopback", lambda _: False)
        assert "of everybody who reaches it" in str(access.refusal(server))


def test_refusal__nobody_or_somebody_else() -> None:
    with answering(200, b"<html>a printer</html>") as server:
        assert str(access.refusal(server)) == f"no job server answers at {server}"
    assert access.wants_token(server) is None  # it is gone


def test_refusal__a_port_that_speaks_no_http() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        def greet() -> None:
            with other.accept()[0] as line:
                line.recv(1024)
                line.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        assert "no job server answers" in str(access.refusal(f"http://127.0.0.1:{port}"))
        thread.join()


def test_refusal__an_open_server_that_others_reach_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200) as server:
        port = int(server.rpartition(":")[2])
        monkeypatch.setattr(access, "listens_outside", lambda asked: asked == port)
        assert "of everybody who reaches it" in str(access.refusal(server))


@pytest.mark.parametrize(
    ("host", "outside"),
    [
        ("00000000", True),  # 0.0.0.0
        ("0500000A", True),  # 10.0.0.5
        ("0100007F", False),  # 127.0.0.1
        ("00000000000000000000000000000000", True),  # ::
        ("00000000000000000000000001000000", False),  # ::1
        ("0000000000000000FFFF00000100007F", False),  # ::ffff:127.0.0.1
    ],
)
def test_listens_outside__in_the_lists_of_linux(tmp_path: Path, host: str, outside: bool) -> None:
    table = tmp_path / "tcp"
    row = "   0: {}:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000"
    table.write_text("\n".join(["  sl  local_address", row.format(host, 8265, "0A")]))
    assert access.listens_outside(8265, [table, tmp_path / "gone"]) is outside
    assert not access.listens_outside(8266, [table])
    table.write_text("\n".join(["  sl  local_address", row.format(host, 8265, "01")]))
    assert not access.listens_outside(8265, [table])  # a connection, not a listener


@pytest.mark.skipif(not access.SOCKETS[0].exists(), reason="Linux lists its sockets")
@pytest.mark.parametrize(("host", "outside"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_listens_outside__of_a_real_socket(host: str, outside: bool) -> None:
    with socket.socket() as server:
        server.bind((host, 0))
        server.listen()
        assert access.listens_outside(server.getsockname()[1]) is outside
