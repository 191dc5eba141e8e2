"""doctor names every package and tells a stopper from a remark."""

from pipeline import doctor


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
