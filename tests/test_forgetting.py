"""Forgotten faces are nowhere in the run, the rest is as it was, and nothing learns them again."""

import json
import shlex
import shutil
import sqlite3
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers import flow
from helpers.s3 import s3_bucket
from safetensors.numpy import load_file

from pipeline import annotated, conduct, forgetting, journal, pool, report, s3
from pipeline.errors import IdentityError, RunError
from pipeline.forgetting import forget
from pipeline.journal import interrupted
from pipeline.ledger import Ledger
from pipeline.lineage import lineage
from pipeline.packs import content_digest
from pipeline.parquet import Reader
from pipeline.plan import Plan
from pipeline.purging import POINTERS
from pipeline.rounds import ANSWERS
from pipeline.storage import location
from pipeline.tables import read_table, write_table

SLICED = ("survey", "guard", "twins", "embed", "score", "select", "mine")


def opened(root: Path) -> flow.LoggedJob:
    return flow.start(flow.tiny(flow.UNTRACKED), root)


def rows(job: flow.LoggedJob, stage: str) -> pa.Table:
    plan = pool.pool_plan(job)
    return pa.concat_tables(table for _, table in pool.ledger(job, stage).tables(plan))


def labeled(root: Path, stage: str = "labeled") -> pa.Table:
    at = location(next(root.glob(f"{stage}/g*")))
    table, faces = read_table(at / "labeled.parquet"), read_table(at / "faces.parquet")
    return table.append_column("sha256", faces["sha256"])


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> Iterator[None]:
    """The page of a tiny run takes a second; one test makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forgetting, "write_report", lambda *_: None)
        patch.setattr(forgetting, "collect", lambda *_: None)
        patch.setattr("pipeline.posix.os.fsync", lambda _: None)  # nothing dies for real here
        yield


@pytest.fixture
def root(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def chosen(root: Path) -> dict[str, str]:
    """A labeled training face, a mined face, one that was rejected, a test face."""
    job = opened(root)
    train = labeled(root).filter(pc.equal(labeled(root)["role"], "train"))
    decided = rows(job, "select")
    neighbors = rows(job, "score")["neighbor_ids"].combine_chunks().flatten().to_pylist()
    known = [face for face in train["id"].to_pylist() if face in set(neighbors)]
    return {
        "labeled": known[0],
        "mined": decided.filter(decided["selected"])["id"][3].as_py(),
        "rejected": decided.filter(pc.invert(decided["selected"]))["id"][2].as_py(),
        "test": labeled(root, "test")["id"][5].as_py(),
    }


def traces(root: Path, ids: list[str]) -> dict[str, list[bytes]]:
    """What would betray each face: id, sha256 (raw and hex), encoded bytes, embeddings."""
    job = opened(root)
    found: dict[str, list[bytes]] = {face: [face.encode()] for face in ids}
    sources = [rows(job, "survey"), rows(job, "mine"), labeled(root), labeled(root, "test")]
    for table in sources:
        for row in table.filter(pc.is_in(table["id"], pa.array(ids))).to_pylist():
            found[row["id"]] += [row["sha256"], row["sha256"].hex().encode()]
            if row.get("image"):
                found[row["id"]].append(row["image"])
    embedded = rows(job, "embed")
    for row in embedded.filter(pc.is_in(embedded["id"], pa.array(ids))).to_pylist():
        vector = np.asarray(row["embedding"])
        found[row["id"]] += [vector.astype(np.float16).tobytes(), vector.astype("<f4").tobytes()]
    teacher = next(root.glob("teach/g*/teacher"))
    bank = load_file(teacher / "bank.safetensors")["vectors"]
    for face, vector in zip(json.loads((teacher / "bank_ids.json").read_text()), bank, strict=True):
        if face in found:
            found[face] += [vector.tobytes(), vector.astype(np.float16).tobytes()]
    return found


def everything(root: Path) -> Iterator[tuple[str, bytes]]:
    """All bytes of a run: files as they are, tables decoded, databases dumped."""
    for at in sorted(p for p in root.rglob("*") if p.is_file()):
        yield str(at), at.read_bytes()
        if at.suffix == ".parquet":
            with Reader(str(at), str(at)) as file:
                table = file.read()
            for name in table.column_names:
                for chunk in table[name].chunks:
                    for buffer in _buffers(chunk):
                        yield f"{at}:{name}", buffer
        if at.suffix == ".db":
            with sqlite3.connect(at) as db:
                yield f"{at}:dump", "\n".join(db.iterdump()).encode()


def _buffers(chunk: pa.Array) -> Iterator[bytes]:
    for buffer in chunk.buffers():
        if buffer is not None:
            yield buffer.to_pybytes()


def _goes_on(data: bytes, end: int) -> bool:
    return data[end : end + 1].isdigit()


def where(root: Path, wanted: dict[str, list[bytes]]) -> set[str]:
    """Faces that something in the run still betrays; ids count where no digit follows them."""
    left = set()
    for place, data in everything(root):
        for face, secrets in wanted.items():
            for secret in secrets:
                at = data.find(secret)
                while at >= 0 and secret == face.encode() and _goes_on(data, at + len(secret)):
                    at = data.find(secret, at + 1)
                if at >= 0:
                    left.add(f"{face} in {place}")
    return left


def listed(tmp_path: Path, *faces: str):
    (tmp_path / "ids.txt").write_text("\n".join(faces) + "\n")
    return location(tmp_path / "ids.txt")


def test_forget__leaves_no_trace_and_the_rest_as_it_was(root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(forgetting, "write_report", report.write_report)
    monkeypatch.setattr(forgetting, "collect", report.collect)
    faces = chosen(root)
    secrets = traces(root, list(faces.values()))
    assert [len(s) for s in secrets.values()] == [6, 8, 5, 4]
    assert {line.split(" in ")[0] for line in where(root, secrets)} == set(faces.values())
    before = {stage: rows(opened(root), stage) for stage in SLICED}
    page = (root / "report.html").read_bytes()

    command = ["run", "r.yaml", "--set", "pool=[{kind: synthetic}]"]
    location(root / "command.json").write_json(command)
    told = forget(location(root), listed(tmp_path, *faces.values()))
    assert (told.faces, told.same_bytes) == (4, 0)
    assert shlex.join(["omnifer", *command]) in unescape((root / "report.html").read_text())
    assert where(root, secrets) == set()
    assert not (root / "forgetting").exists()
    assert (root / "report.html").read_bytes() != page

    job = opened(root)
    for stage, was in before.items():
        now = rows(job, stage)
        kept = was.filter(pc.invert(pc.is_in(was["id"], pa.array(list(faces.values())))))
        assert now["id"].equals(kept["id"]), stage
        same = [n for n in was.column_names if n not in POINTERS]
        assert now.select(same).equals(kept.select(same)), stage


def remains(root: Path, faces: dict[str, str]) -> dict[str, Path]:
    """What active learning and killed processes leave: rounds, models, hidden staged files."""
    home = root / "rounds" / "g001-00000000"
    image = next(r["image"] for r in rows(opened(root), "mine").to_pylist()
                 if r["id"] == faces["mined"])  # fmt: skip
    left = {
        "identity": (home / "identity.json", b'{"inputs": {}}'),
        "round": (home / "random-scratch-s0" / "round-00.json",
                  json.dumps({"chosen": [faces["labeled"]]}).encode()),
        "model": (home / "first-scratch-s0" / "model.safetensors", b"weights"),
        "active": (root / "active" / "g001-00000000" / "done.json",
                   b'{"digest": "d", "facts": {}}'),
        "checkpoint": (root / "student" / "g009-00000000" / "checkpoints" / "step-1", b"weights"),
        "staged": (root / "mine" / "g001-x" / "parts" / ".a.parquet.0123456789abcdef.tmp", image),
        "top": (root / ".report.html.0123456789abcdef.tmp", image),
    }  # fmt: skip
    for at, data in left.values():
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(data)
    return {name: at for name, (at, _) in left.items()}


def test_forget__sweeps_what_active_learning_and_killed_writers_left(root, tmp_path) -> None:
    faces = chosen(root)
    secrets = traces(root, list(faces.values()))
    left = remains(root, faces)
    told = forget(location(root), listed(tmp_path, *faces.values()))
    assert where(root, secrets) == set()
    gone = {name for name, at in left.items() if not at.exists()}
    assert gone == {"round", "model", "checkpoint", "staged", "top"}
    for stage in ("rounds", "active"):
        assert told.saw[f"{stage} g001-00000000"] == {"labeled": 1}
        assert (root / stage / "g001-00000000" / "forgotten.json").exists()
    assert [n.split(": ")[1] for n in told.notes[:2]] == [
        "rounds, models and checkpoints removed"
    ] * 2


def test_forget__a_pool_face_costs_no_training_on_labels(root, tmp_path) -> None:
    faces = chosen(root)
    left = remains(root, faces)
    begun = root / "teach" / "g009-00000000"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "identity.json").write_text('{"inputs": {}}')
    (root / "student" / "g009-00000000" / "identity.json").write_text('{"inputs": {}}')
    told = forget(location(root), listed(tmp_path, faces["rejected"]))
    assert told.saw == {}
    assert left["round"].exists()
    assert (begun / "checkpoints").exists()
    assert not left["checkpoint"].exists()  # of a student: it may have seen the pool
    assert not left["staged"].exists()


def test_forget__rounds_that_start_from_a_backbone_which_saw_the_face(root, tmp_path) -> None:
    faces = chosen(root)
    left = remains(root, faces)
    left["identity"].write_text('{"inputs": {"pretrain": "b"}}')
    folder = root / "pretrain" / "g001-00000000"
    folder.mkdir(parents=True)
    job = opened(root)
    inputs = {name: job.run.artifact(name).digest for name in ("survey", "guard")}
    (folder / "identity.json").write_text(json.dumps({"inputs": inputs}))
    (done,) = {at.name for at in root.glob("guard/g*/done*.json")}  # of the same plan
    (folder / done).write_text('{"digest": "b", "facts": {}}')
    told = forget(location(root), listed(tmp_path, faces["rejected"]))
    assert told.saw["pretrain g001-00000000"] == {"pool": 1}
    assert told.saw["rounds g001-00000000"]["pool"] == 1
    assert not left["round"].exists()


@pytest.mark.slow
def test_forget__leaves_no_trace_on_s3(root, tmp_path) -> None:
    faces = chosen(root)
    secrets = traces(root, list(faces.values()))
    remains(root, faces)["top"].unlink()
    for at in root.rglob(".*.tmp"):
        at.unlink()  # S3 shows no unfinished object
    with s3_bucket() as bucket:
        there = bucket / "run"
        disk = s3.filesystem()
        disk.put(str(root), there.uri, recursive=True)
        told = forget(there, listed(tmp_path, *faces.values()))
        disk.get(there.uri, str(tmp_path / "back"), recursive=True)
    assert told.faces == 4
    assert set(told.saw) >= {"rounds g001-00000000", "active g001-00000000"}
    assert len(list((tmp_path / "back").rglob("*.parquet"))) > 10
    assert where(tmp_path / "back", secrets) == set()


def test_forget__manifests_and_digests_are_those_of_what_is_there(root, tmp_path) -> None:
    faces = chosen(root)
    old = {stage: opened(root).run.artifact(stage).digest for stage in (*SLICED, "labeled", "test")}
    forget(location(root), listed(tmp_path, *faces.values()))
    job = opened(root)
    plan = pool.pool_plan(job)
    for stage in SLICED:
        made, ledger = job.run.artifact(stage), pool.ledger(job, stage)
        assert ledger.digest(plan) == made.digest, stage
        assert made.digest != old[stage], stage
        assert made.facts["rows"] == rows(job, stage).num_rows
        assert made.facts["forgotten"] == (1 if stage == "mine" else 2), stage
        noted = (made.dir / "manifest.json").read_json()
        assert noted["forgotten"] == made.facts["forgotten"]
        for slice, table in ledger.tables(plan):
            assert ledger.winner(slice.key).sha256 == content_digest(table)
    for stage in ("labeled", "test"):
        made = job.run.artifact(stage)
        assert made.digest == content_digest(read_table(made.dir / "labeled.parquet"))
        roles = made.facts["roles"]["train" if stage == "labeled" else "test"]
        table = labeled(root, stage)
        role = "train" if stage == "labeled" else "test"
        assert sum(roles.values()) == table["role"].to_pylist().count(role)
    decided = rows(job, "select")
    counts = job.run.artifact("select").facts["per_class"]
    assert sum(n for reasons in counts.values() for n in reasons.values()) == decided.num_rows


def test_forget__what_nobody_learned_from_costs_no_training_and_no_reading(
    root, tmp_path, monkeypatch
) -> None:
    faces = chosen(root)
    told = forget(location(root), listed(tmp_path, faces["rejected"], faces["test"]))
    assert told.saw == {}
    before = flow.finished(root)
    job = opened(root)
    conduct.run_all(job, None)
    assert flow.finished(root) == before
    assert flow.reads(job) == []


def test_forget__what_learned_from_them_is_marked_and_never_trained_again_unasked(
    root, tmp_path
) -> None:
    faces = chosen(root)
    told = forget(location(root), listed(tmp_path, faces["mined"]))
    assert {name.split()[0]: n for name, n in told.saw.items()} == {
        stage: {"mined": 1} for stage in ("distill", "student", "tuned")
    }
    found = lineage(location(root))
    assert found.facts["forgotten since"] == 1
    job = opened(root)
    conduct.run_all(job, "mine")  # nobody up to here has learned from it
    with pytest.raises(IdentityError, match=r"distill: .* learned from 1 faces .* --fresh"):
        conduct.run_all(job, None)
    assert flow.reads(job) == []

    told = forget(location(root), listed(tmp_path, faces["labeled"]))
    saw = {name.split()[0]: n for name, n in told.saw.items()}
    assert set(saw) == {"teach", "control_a", "control_b", "distill", "student", "tuned"}
    assert saw["teach"] == {"labeled": 1}
    with pytest.raises(IdentityError, match=r"teach: .* learned from 1 faces"):
        conduct.run_all(opened(root), None)
    assert lineage(location(root)).facts["forgotten since"] == 2


def test_forget__readers_keep_them_out(root, tmp_path) -> None:
    faces = chosen(root)
    by_bytes = dict(zip(*(rows(opened(root), "survey")[n].to_pylist() for n in ("id", "sha256")),
                        strict=True))[faces["mined"]]  # fmt: skip
    forget(location(root), listed(tmp_path, by_bytes.hex()))
    removals = opened(root).removals
    told = pa.table(
        {
            "id": [faces["mined"], "other", "third"],
            "group": pa.array([None] * 3, pa.string()),
            "sha256": pa.array([b"1" * 32, by_bytes, b"2" * 32], pa.binary(32)),
        }
    )
    assert removals.hits(told).tolist() == [True, True, False]


@pytest.mark.parametrize("after", [0, 30])
def test_forget__killed_between_any_two_files_it_finishes_when_called_again(
    root, tmp_path, monkeypatch, after
) -> None:
    faces = chosen(root)
    secrets = traces(root, list(faces.values()))
    calls, place = [], journal._place

    def dies(root_at, path):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(path)
        place(root_at, path)

    monkeypatch.setattr(journal, "_place", dies)
    with pytest.raises(KeyboardInterrupt):
        forget(location(root), listed(tmp_path, *faces.values()))
    monkeypatch.undo()
    assert interrupted(location(root))
    with pytest.raises(RunError, match=r"was interrupted; call it again"):
        opened(root)
    again = forget(location(root), listed(tmp_path, *faces.values()))
    assert again.faces == 0  # the first call's journal had them all
    assert where(root, secrets) == set()
    job = opened(root)
    for stage in SLICED:
        assert pool.ledger(job, stage).digest(pool.pool_plan(job)) == job.run.artifact(stage).digest
    with pytest.raises(IdentityError, match="teach"):
        conduct.run_all(job, None)


def test_forget__killed_before_the_journal_nothing_has_happened(
    root, tmp_path, monkeypatch
) -> None:
    faces = chosen(root)

    def dies(step: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "_fault", dies)
    with pytest.raises(KeyboardInterrupt):
        forget(location(root), listed(tmp_path, *faces.values()))
    monkeypatch.undo()
    assert not interrupted(location(root))
    before = flow.finished(root)
    conduct.run_all(opened(root), None)
    assert flow.finished(root) == before
    assert forget(location(root), listed(tmp_path, *faces.values())).faces == 4


def test_forget__rounds_of_annotation_lose_their_rows(root, tmp_path) -> None:
    face, other = chosen(root)["rejected"], chosen(root)["mined"]
    home = root / "annotate" / "round-001"
    home.mkdir(parents=True)
    (home / "sheet.csv").write_text(f"id,label\n{face},fear\n{other},anger\n")
    (home / "sheet.html").write_text(f"<p>{face}</p>")
    at = location(home / "queries.parquet")
    with at.replacing() as sink:
        pq.write_table(pa.table({"id": [face, other], "rank": [1, 2]}), sink)
    forget(location(root), listed(tmp_path, face))
    assert (home / "sheet.csv").read_text() == f"id,label\n{other},anger\n"
    assert not (home / "sheet.html").exists()
    assert read_table(at)["id"].to_pylist() == [other]


def test_forget__faces_that_a_person_labeled_leave_without_a_new_generation(root, tmp_path) -> None:
    mined = rows(opened(root), "mine").slice(0, 2).to_pylist()
    answers = [
        {
            **{n: row[n] for n in ("id", "label", "image", "group", "box", "landmarks", "source")},
            "when": "2026-01-01T00:00:00+00:00",
        }
        for row in mined
    ]
    home = location(root / "annotate" / "round-001")
    write_table(home / "queries.parquet", pa.table({"id": [row["id"] for row in mined]}))
    write_table(home / "labels.parquet", pa.Table.from_pylist(answers, schema=ANSWERS))
    made = annotated.join(opened(root))
    assert made is not None
    forget(location(root), listed(tmp_path, mined[0]["id"]))
    again = annotated.join(opened(root))
    assert again is not None
    assert again.dir == made.dir
    assert again.digest != made.digest
    assert (again.facts["faces"], again.facts["forgotten"]) == (1, 1)
    assert annotated.labeled_ids(opened(root)) == {mined[1]["id"]}


def test_forget__an_unknown_face_is_kept_out_all_the_same(root, tmp_path) -> None:
    before = flow.finished(root)
    told = forget(location(root), listed(tmp_path, "pool/never-seen"))
    assert (told.faces, told.saw) == (0, {})
    assert "1 of the list are no face and no group of this run" in told.lines()[-1]
    assert "pool/never-seen" in told.lines()[-1]
    assert forget(location(root), listed(tmp_path, "pool/never-seen")).notes == []  # known by now
    assert flow.finished(root) == before
    assert b"never-seen" not in b"".join(p.read_bytes() for p in root.glob("*.json") if p.is_file())
    table = pa.table({"id": ["pool/never-seen"], "group": [None], "sha256": [None]})
    assert opened(root).removals.hits(table).tolist() == [True]


def test_forget__needs_a_run(tmp_path) -> None:
    with pytest.raises(RunError, match="expected a run folder"):
        forget(location(tmp_path / "nothing"), listed(tmp_path, "a"))


def test_plan__slices_keep_their_keys(root, tmp_path) -> None:
    faces = chosen(root)
    survey = next(root.glob("survey/g*"))
    keys = [s.key for s in pool.pool_plan(opened(root)).slices()]
    forget(location(root), listed(tmp_path, faces["mined"]))
    job = opened(root)
    conduct.run_all(job, "survey")
    now = Plan(location(survey / json.loads((survey / "plan.json").read_text())["file"]))
    assert [s.key for s in now.slices()] == keys
    assert list(Ledger(location(survey)).pending(now)) == []
