"""doctor names every package and tells a stopper from a remark."""

import pytest

from pipeline import access, doctor


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No cluster and no token of whoever runs the tests."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
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
