"""Proves that writes are whole or absent, creates exclusive, and S3 behaves like a local folder."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.s3 import s3_bucket

from pipeline import posix, s3
from pipeline.errors import RunError, SourceError
from pipeline.storage import Location, location


@pytest.fixture(scope="module")
def bucket() -> Iterator[Location]:
    with s3_bucket() as at:
        yield at


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A fresh folder, once on disk and once on S3: both must pass the same tests."""
    if request.param == "local":
        return location(tmp_path)
    bucket: Location = request.getfixturevalue("bucket")
    return bucket / request.node.name.replace("[", "-").replace("]", "")


def test_write_and_read__roundtrip(root: Location) -> None:
    at = root / "a/b.json"
    at.write_json({"b": 1, "a": [1, 2]})
    assert at.read_json() == {"b": 1, "a": [1, 2]}
    at.write_text("abcdef")
    assert (at.read_text(), at.size(), at.exists(), at.is_dir()) == ("abcdef", 6, True, False)
    assert (root / "a").is_dir()
    with at.open() as file:
        assert file.read(2) == b"ab"
    with (root / "streamed").open("wb") as file:
        file.write(b"xyz")
    assert (root / "streamed").read_bytes() == b"xyz"


def test_read_range__clips_at_the_end(root: Location) -> None:
    at = root / "f"
    at.write_bytes(b"0123456789")
    assert at.read_range(2, 5) == b"234"
    assert at.read_range(8, 99) == b"89"
    assert at.read_range(99, 120) == at.read_range(5, 5) == b""


def test_missing__is_one_line_naming_the_place(root: Location) -> None:
    at = root / "nothing.json"
    for ask in (at.read_bytes, at.size, at.stamp, at.open):
        with pytest.raises(SourceError, match=r"nothing\.json: no such file"):
            ask()  # type: ignore[operator]
    assert at.find_bytes() is None
    assert not at.exists()
    assert (root / "nowhere").children() == []
    assert list((root / "nowhere").files([""])) == []
    at.remove_tree()


def test_no_credentials__is_one_line_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import NoCredentialsError

    def refuse() -> None:
        raise NoCredentialsError

    at = location("s3://bucket/key")
    monkeypatch.setattr(s3, "filesystem", refuse)
    asks = (at.exists, at.is_dir, at.size, at.stamp, at.children, at.read_bytes, at.remove)
    writes = (at.remove_tree, lambda: at.create(b"x"), lambda: at.write_bytes(b"x"), at.open)
    for ask in (*asks, *writes, lambda: list(at.files([""]))):
        with pytest.raises(SourceError, match=r"^s3://bucket/key: Unable to locate cred.*AWS env"):
            ask()  # type: ignore[operator]


def test_stamp__of_a_folder_changes_with_what_is_in_it(root: Location) -> None:
    at = root / "set"
    (at / "a").write_text("1")
    before = at.stamp()
    assert at.stamp() == before
    (at / "b").write_text("2")
    with_b = at.stamp()
    assert with_b != before
    (at / "deep" / "c").write_text("3")
    with_c = at.stamp()
    (at / "deep" / "c").write_text("four")
    assert len({with_b, with_c, at.stamp()}) == 3


def test_stamp__of_a_local_folder_counts_names_sizes_and_times(tmp_path: Path) -> None:
    at, file = location(tmp_path), tmp_path / "train" / "1" / "a.png"
    (at / "train" / "1" / "a.png").write_text("one")
    stamps = [at.stamp()]
    state, folder = file.stat(), file.parent.stat()
    file.write_text("two")  # the folders above stay as they were
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert file.parent.stat().st_mtime_ns == folder.st_mtime_ns
    stamps.append(at.stamp())
    file.rename(file.with_name("b.png"))
    stamps.append(at.stamp())
    assert len(set(stamps)) == 3
    (file.parent / ".DS_Store").write_text("looked at")
    (file.parent / "gone.png").symlink_to(tmp_path / "nowhere")
    (file.parent / "around").symlink_to(tmp_path)
    assert at.stamp() == stamps[-1]


def test_stamp__changes_with_content(root: Location) -> None:
    at = root / "f"
    at.write_bytes(b"one")
    before = at.stamp()
    assert at.stamp() == before
    at.write_bytes(b"two")
    assert at.stamp() != before


def test_create__never_overwrites(root: Location) -> None:
    at = root / "x/once"
    assert at.create(b"first")
    assert not at.create(b"second")
    assert at.read_bytes() == b"first"
    assert [c.name for c in at.parent.children()] == ["once"]


def test_create__one_of_eight_threads_wins(root: Location) -> None:
    at = root / "race"
    gate = threading.Barrier(8)
    won: list[int] = []

    def writer(i: int) -> None:
        gate.wait()
        if at.create(str(i).encode()):
            won.append(i)

    threads = [threading.Thread(target=writer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [at.read_text()] == [str(i) for i in won]


def test_replacing__error_keeps_the_old_content(root: Location) -> None:
    at = root / "f"
    at.write_bytes(b"old")

    def die_half_way() -> None:
        with at.replacing() as file:
            file.write(b"half of the new")
            raise KeyError

    with pytest.raises(KeyError):
        die_half_way()
    assert at.read_bytes() == b"old"
    assert [c.name for c in root.children()] == ["f"]


def test_files__sorted_by_path_without_hidden_ones(root: Location) -> None:
    for name in ("b/2.jpg", "b/1.JPG", "b.jpg", "a.png", ".hidden.jpg", "b/.cache/3.jpg", "c.txt"):
        (root / name).write_bytes(b"x")
    names = [f.uri.removeprefix(root.uri + "/") for f in root.files([".jpg", ".png"])]
    assert names == ["a.png", "b.jpg", "b/1.JPG", "b/2.jpg"]
    assert [c.name for c in root.children()] == [".hidden.jpg", "a.png", "b", "b.jpg", "c.txt"]


def test_remove__one_file_there_or_not(root: Location) -> None:
    for name in ("a/1", "a/2"):
        (root / name).write_bytes(b"x")
    for _ in range(2):
        (root / "a/1").remove()
    assert [f.name for f in root.files([""])] == ["2"]


def test_remove_tree__takes_all_below_and_nothing_beside(root: Location) -> None:
    for name in ("a/1", "a/b/2", "ab/3"):
        (root / name).write_bytes(b"x")
    (root / "a").remove_tree()
    assert [f.name for f in root.files([""])] == ["3"]
    (root / "ab/3").remove_tree()
    assert list(root.files([""])) == []


def test_location__names_and_parents(root: Location) -> None:
    at = root / "a" / "b"
    assert (at.name, at.parent.name, at.parent.parent) == ("b", "a", root)
    assert pickle.loads(pickle.dumps(at)) == at
    for bad in ("", "/etc", "../x", "a/../../x", "a//b"):
        with pytest.raises(SourceError, match="not a name below"):
            root / bad


def test_local_path__refused_on_s3(tmp_path: Path) -> None:
    assert location(tmp_path).local_path() == tmp_path
    with pytest.raises(SourceError, match="expected a local path"):
        location("s3://bucket/key").local_path()


def test_location__expands_and_makes_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("POOL", "faces")
    assert location("~/x").uri == "/home/someone/x"
    assert location("$POOL/a/../b").uri == f"{tmp_path}/faces/b"
    assert location("file:///data/x").uri == "/data/x"
    assert location("s3://bucket//a/${POOL}/").uri == "s3://bucket/a/faces"
    assert location("s3://bucket").parent.uri == "s3://bucket"
    assert location("/data/who?.png").uri == "/data/who?.png"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://user:hunter2@bucket/key",
        "s3://bucket/key?secret=hunter2",
        "https://user:hunter2@host/x",
        "hunter2 ://x",
        "$HUNTER2_UNSET/x",
        "s3://",
        "",
    ],
)
def test_location__refuses_without_repeating_secrets(uri: str) -> None:
    with pytest.raises(SourceError, match=r"^location: ") as caught:
        location(uri)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_children__hide_torn_writes(tmp_path: Path) -> None:
    """What a kill leaves: a staged file, which no listing shows and no later write meets."""
    at = location(tmp_path) / "f"
    (tmp_path / ".f.0123456789abcdef.tmp").write_bytes(b"torn")
    at.write_bytes(b"whole")
    assert [c.name for c in at.parent.children()] == ["f"]
    assert [c.name for c in at.parent.files([""])] == ["f"]


def test_files__follow_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/1.jpg").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path)
    names = [f.uri.removeprefix(f"{tmp_path}/") for f in location(tmp_path).files([".jpg"])]
    assert names == ["link/1.jpg", "real/1.jpg"]


def test_s3__a_store_that_never_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the client's tries is repeated once, where an object is read twice over."""
    patience = {**s3._CLIENT, "read_timeout": 0.3, "retries": {"total_max_attempts": 1}}
    monkeypatch.setattr(s3, "_CLIENT", patience)
    asked: list[str] = []
    answers = threading.Event()
    answers.set()

    def seen(method: str, path: str) -> None:
        asked.append(method)
        answers.wait(30)

    with s3_bucket(seen) as root:
        (root / "x").write_bytes(b"1")
        for call, most in (((root / "x").read_bytes, 4), ((root / "x").remove, 2)):
            asked.clear()
            answers.clear()
            with pytest.raises(RunError, match=r"s3://faces/runs/x: .*[Tt]imeout") as raised:
                call()
            answers.set()
            assert 1 <= len(asked) <= most
            assert "\n" not in str(raised.value)


def test_cores__those_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert posix.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert posix.cores() == 1
