"""doctor names every package and tells a stopper from a remark."""

import http.server
import socket
import threading
import time

import pytest

from pipeline import access, doctor


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No cluster and no token of whoever runs the tests."""
    ray = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    for name in (*ray, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))


def test_checks__lists_every_required_package():
    findings = {f.name: f for f in doctor.checks()}
    assert set(doctor.PACKAGES) <= set(findings)
    assert all(findings[name].ok for name in doctor.PACKAGES)


def test_package__missing_one_is_a_stopper():
    assert doctor._package("no-such-package-here") == doctor.Finding(
        "no-such-package-here", False, "not installed"
    )


def test_space__too_little_is_a_stopper(tmp_path):
    assert doctor._space("disk", tmp_path, 1).ok
    assert not doctor._space("disk", tmp_path, 1 << 62).ok


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379", "localhost:6379"])
def test_address__of_this_machine(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert doctor._address().ok


def test_address__of_another_machine_needs_a_token(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    assert "no token here" in doctor._address().detail
    assert not doctor._address().ok
    monkeypatch.setenv("RAY_AUTH_TOKEN", "held")
    assert doctor._address().ok
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not doctor._address().ok


def test_address__a_job_server_is_asked(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")  # the port of nobody
    found = doctor._address()
    assert (found.ok, found.detail) == (False, "no job server answers at http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("outside", "wants", "ok"),
    [(False, False, True), (True, True, True), (True, None, True), (True, False, False)],
)
def test_dashboard__open_to_others_without_a_token(monkeypatch, outside, wants, ok):
    monkeypatch.setattr(access, "listens_outside", lambda port: outside and port == 8265)
    monkeypatch.setattr(access, "wants_token", lambda server: wants)
    assert doctor._dashboard().ok is ok


class Health(http.server.BaseHTTPRequestHandler):
    """A tracking server that answers `code` to /health, and 404 to all else."""

    code = 200

    def do_GET(self):
        self.send_response(self.code if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://person:secret@127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


@pytest.mark.parametrize(("code", "ok"), [(200, True), (401, True), (500, False)])
def test_tracking__a_server_is_asked(server, monkeypatch, code, ok):
    monkeypatch.setattr(Health, "code", code)
    plain = server.replace("person:secret@", "")
    for uri, named in ((plain, None), (None, plain)):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named or "")
        found = doctor._tracking(uri)
        assert found.ok is ok, found
        assert found.detail.startswith(plain)
    assert "secret" not in doctor._tracking(server).detail


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_tracking__a_closed_port_and_a_silent_server_take_seconds(monkeypatch, scheme):
    monkeypatch.setattr(doctor, "TRACKING_PATIENCE", 0.5)
    closed = doctor._tracking(f"{scheme}://127.0.0.1:9/x")
    assert (closed.ok, closed.detail.count("\n")) == (False, 0)
    assert "does not answer within 0.5 s" in closed.detail
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        found = doctor._tracking(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 5
        assert found.ok is (scheme == "postgresql")  # a database that listens is there


def test_tracking__files_and_off_are_not_asked():
    assert doctor._tracking(None).detail.startswith("SQLite in the run folder")
    assert doctor._tracking("sqlite:///a.db").detail == "sqlite:///a.db"
    assert doctor._tracking("off").detail == "off"
