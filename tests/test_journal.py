"""Many files change at once: before the journal nothing, after it everything, however it ends."""

import pytest

from pipeline import journal
from pipeline.errors import RunError
from pipeline.journal import Rewrite, apply, close, interrupted, require_whole
from pipeline.storage import location


@pytest.fixture
def root(tmp_path):
    for name in ("a", "b/c", "d/e", "kept"):
        (location(tmp_path) / name).write_text(f"old {name}")
    return location(tmp_path)


def prepared(root) -> Rewrite:
    change = Rewrite(root)
    for name in ("a", "b/c", "new"):
        change.staged(root / name).write_text(f"new {name}")
    change.drop(root / "d")
    return change


def text(root) -> dict[str, str]:
    names = ("a", "b/c", "d/e", "kept", "new")
    return {name: (root / name).read_text() for name in names if (root / name).exists()}


DONE = {"a": "new a", "b/c": "new b/c", "kept": "old kept", "new": "new new"}


def test_apply__all_files_and_removals(root) -> None:
    change = prepared(root)
    before = text(root)
    assert not interrupted(root)
    change.ready()
    assert text(root) == before
    apply(root, "new")
    assert text(root) == DONE
    close(root)
    assert not (root / journal.HOME).exists()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_apply__again_after_it_was_killed(root, monkeypatch, after) -> None:
    prepared(root).ready()
    placed, place = [], journal._place

    def dies(at, path):
        if len(placed) == after:
            raise KeyboardInterrupt
        placed.append(path)
        place(at, path)

    monkeypatch.setattr(journal, "_place", dies)
    with pytest.raises(KeyboardInterrupt):
        apply(root, "new")
    assert placed[:1] == ["new"][:after]
    monkeypatch.undo()
    with pytest.raises(RunError, match="call it again to finish"):
        require_whole(root)
    apply(root, "new")
    close(root)
    require_whole(root)
    assert text(root) == DONE


def test_staged__a_file_is_put_once(root) -> None:
    change = prepared(root)
    change.staged(root / "a")
    assert change.put == ["a", "b/c", "new"]
