"""Proves that every module has its test file and every test file its module."""

from pathlib import Path

ROOT = Path(__file__).parents[1]

ELSEWHERE = {
    "stages.py": "tests/flow",
    "commits.py": "tests/test_ledger.py",
    "schema.py": "vocabulary, used by every test",
    "errors.py": "vocabulary, used by every test",
    "placement.py": "tests/test_streaming.py",
    "policy.py": "tests/test_selection.py",
    "posix.py": "tests/test_storage.py",
    "threshold_config.py": "tests/test_adaptive.py",
    "verbs.py": "tests/test_cli.py, and the test files of what each verb calls",
    "s3.py": "tests/chaos/test_s3_faults.py",
    "labeled/files.py": "the readers of sets of files, tests/labeled/test_expw.py first",
    "labeled/records.py": "tests/labeled/test_folder.py, tests/labeled/test_table.py",
    "labeled/synthetic.py": "tests/test_synthetic.py, tests/sources/test_synthetic.py",
    "sources/rows.py": "tests/sources/test_index.py",
    "opening.py": "tests/test_tracking.py",
    "registering.py": "tests/test_tracking.py",
    "tracing.py": "tests/test_forgetting.py",
    "training/distilling.py": "tests/training/test_distill.py",
    "training/from_distilled.py": "tests/training/test_distilled.py runs it",
    "training/studying.py": "tests/training/test_student.py, tests/training/test_semi.py",
    "report/decided.py": "tests/report/test_collect.py",
    "report/facts.py": "plain values, filled by tests/report/invented.py",
    "report/figures.py": "tests/report/test_page.py",
    "report/galleries.py": "tests/report/test_page.py",
}
"""Modules that may lack a test file of their own, and where they are tested."""

WITHOUT_MODULE = {
    "test_browser.py": "the report in a headless Chromium",
    "test_bad_input.py": "one line for every fault of a person",
    "test_mirror.py": "this folder",
    "test_readme.py": "the README",
}
"""Test files that prove something of no single module."""


def modules() -> set[str]:
    """Modules below pipeline/, less the packages' own files."""
    found = (ROOT / "pipeline").rglob("*.py")
    return {str(at.relative_to(ROOT / "pipeline")) for at in found if at.name != "__init__.py"}


def mirrored(module: str) -> Path:
    folder, _, name = module.rpartition("/")
    return ROOT / "tests" / folder / f"test_{name}"


def test_modules__have_a_test_file() -> None:
    missing = {module for module in modules() if not mirrored(module).exists()}
    assert missing - ELSEWHERE.keys() == set()
    assert ELSEWHERE.keys() <= modules()


def test_files__belong_to_a_module() -> None:
    tested = {mirrored(module) for module in modules()}
    files = {at for folder in {at.parent for at in tested} for at in folder.glob("test_*.py")}
    assert {at.name for at in files - tested} <= WITHOUT_MODULE.keys()
