"""The report says what the artifacts hold: counted by hand on a pool of eight faces."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import sealing
from pipeline.errors import RunError
from pipeline.evaluation import evaluate
from pipeline.ledger import Ledger
from pipeline.plan import Plan, Slice
from pipeline.report import ReportConfig, collect
from pipeline.report.page import render
from pipeline.run import Run
from pipeline.schema import MINED, TRUTH, with_label_names
from pipeline.storage import Location, location
from pipeline.tables import write_table

NAMES = ("neutral", "happiness")

FACES: list[dict[str, Any]] = [
    # slice 0
    {"id": "p/a#0", "label": "neutral", "confidence": 0.97, "reason": "selected",
     "near": "l#0"},
    {"id": "p/a#1", "label": "neutral", "confidence": 0.85, "reason": "selected"},
    {"id": "p/a#2", "label": "happiness", "confidence": 0.55, "reason": "below_confidence"},
    {"id": "p/a#3", "status": "quarantined", "fault": "truncated", "reason": "quarantined"},
    # slice 1
    {"id": "p/b#0", "label": "happiness", "confidence": 0.92, "reason": "selected", "near": "l#9"},
    {"id": "p/b#1", "label": "happiness", "confidence": 0.92, "reason": "duplicate",
     "duplicate_group": "p/b#0"},
    {"id": "p/b#2", "label": "neutral", "confidence": 0.75, "reason": "twin_of_test",
     "twin_of": "t#9", "twin_kind": "pixels", "twin_role": "test"},
    {"id": "p/b#3", "label": "neutral", "confidence": 0.65, "reason": "below_confidence"},
]  # fmt: skip
FACES[4]["duplicate_group"] = "p/b#0"

TRUE = {"p/a#0": "neutral", "p/a#1": "happiness", "p/a#2": "happiness", "p/b#3": None}


def _png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _column(rows: list[dict[str, Any]], name: str, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([row.get(name) for row in rows], kind or pa.string())


def _tables(rows: list[dict[str, Any]]) -> dict[str, pa.Table]:
    ids = _column(rows, "id")
    status = pa.array([row.get("status", "ok") for row in rows])
    thumbnails = [None if "fault" in row else bytes([i] * 256) for i, row in enumerate(rows)]
    kept = [row for row in rows if row["reason"] == "selected"]
    mined = [
        {
            "id": row["id"], "image": _png(200), "label": row["label"], "soft": [0.5, 0.5],
            "weight": 1.0, "confidence": row["confidence"], "source": "p", "shard": "a",
            "position": 0, "sha256": bytes(32), "teacher": "t", "rule": "r",
        }
        for row in kept
    ]  # fmt: skip
    neighbors = [[row["near"]] if "near" in row else None for row in rows]
    return {
        "survey": pa.table(
            {
                "id": ids,
                "status": status,
                "reason": _column(rows, "fault"),
                "thumbnail": pa.array(thumbnails, pa.binary(256)),
            }
        ),
        "guard": pa.table(
            {"id": ids}
            | {n: _column(rows, n) for n in ("twin_of", "twin_kind", "twin_role")}
            | {"duplicate_group": _column(rows, "duplicate_group")}
        ),
        "score": pa.table(
            {
                "id": ids,
                "status": status,
                "pseudo_label": _column(rows, "label"),
                "confidence": _column(rows, "confidence", pa.float32()),
                "neighbor_ids": pa.array(neighbors, pa.list_(pa.string())),
                "neighbor_similarity": pa.array([0.91] * len(rows), pa.float32()),
            }
        ),
        "select": pa.table(
            {"id": ids, "reason": _column(rows, "reason"), "label": _column(rows, "label")}
        ),
        "mine": pa.Table.from_pylist(mined, schema=with_label_names(MINED, NAMES)),
    }


def _finish(run: Run, name: str, **facts: Any) -> Location:
    stage = run.open(name, {"name": name})
    stage.finish("d" * 64, **facts)
    return stage.dir


FOLDS = (  # id, label, logits, brightness of the picture
    ("l#0", "neutral", (2.0, 0.0), 10),
    ("l#1", "neutral", (0.0, 3.0), 20),
    ("l#2", "happiness", (0.0, 2.0), 30),
    ("l#3", "happiness", (1.0, 0.0), 40),
)


def _labeled(run: Run) -> None:
    """Labeled faces, the teacher's folds, and what score says of them out of fold."""
    ids, labels, logits, grays = (list(column) for column in zip(*FOLDS, strict=True))
    roles, images = ["train"] * len(ids), [_png(gray) for gray in grays]
    rows = pa.table({"id": ids, "role": roles, "label": labels, "image": images})
    named = pa.schema(rows.schema, metadata={"label_names": ",".join(NAMES)})
    at = _finish(run, "labeled")
    write_table(at / "labeled.parquet", rows.cast(named))
    thumbnails = pa.array([bytes([gray] * 256) for gray in grays], pa.binary(256))
    write_table(at / "faces.parquet", pa.table({"id": ids, "thumbnail": thumbnails}))
    teach = _finish(run, "teach", temperature=2.0)
    folds = {"id": ids, "label": labels, "logits": pa.array(logits, pa.list_(pa.float32()))}
    write_table(teach / "folds.parquet", pa.table(folds))
    probs = [np.exp(np.array(z) / 2) / np.exp(np.array(z) / 2).sum() for z in logits]
    points = {
        "pseudo_label": [NAMES[p.argmax()] for p in probs],
        "confidence": pa.array([p.max() for p in probs], pa.float32()),
        "label": labels,
    }
    at = run.artifact("score").dir / "labeled.parquet"
    write_table(at, pa.table(points).replace_schema_metadata({"label_names": ",".join(NAMES)}))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has everything up to evaluate."""
    run = Run(location(tmp_path / "run"))
    slices = [
        Slice(f"s{n:07d}", 0, "p", f"/pool/{name}", 0, 4, "f" * 8, 4) for n, name in enumerate("ab")
    ]
    tables = [_tables(FACES[:4]), _tables(FACES[4:])]
    for name in ("survey", "guard", "score", "select", "mine"):
        at = _finish(run, name, seconds=2.0)
        plan = Plan.write(at / "plan.parquet", slices)
        for slice, parts in zip(slices, tables, strict=True):
            Ledger(at).commit(slice, parts[name])
        sealing.seal(Ledger(at), plan)
    survey = run.artifact("survey").dir
    (survey / "plan.json").write_json({"file": "plan.parquet"})
    truth = pa.table({"id": list(TRUE), "label": list(TRUE.values())}, schema=TRUTH)
    write_table(survey / "truth.parquet", truth)
    _labeled(run)
    (run.artifact("select").dir / "operating_point.json").write_json(
        {"label_names": NAMES, "confidence": 0.6, "cuts": {"neutral": 0.7}, "trials": [{"a": 1}]}
    )
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])
    card = {"split": "test", "seeds": [0], "sampler": "all", "crop": "none"}
    passes = {"teacher": 10, "control_a": 20, "control_b": 30, "student": 30}
    models = dict.fromkeys(passes, probs) | {"student": np.eye(2)[labels]}
    card |= {"passes": passes, "pretraining_data": None}
    (_finish(run, "evaluate") / "metrics.json").write_json(evaluate(models, labels, NAMES, card))
    (_finish(run, "distill", ipc=1, size=20) / "grid.png").write_bytes(_png(90))
    return run


def test_collect__pool_counts(run: Run) -> None:
    facts = collect(run, "demo", "omnifer run demo.yaml", False)
    assert facts.pool == {"faces": 8, "usable": 7, "kept": 3}
    assert facts.utilization == 3 / 8
    assert facts.reasons == {
        "selected": 3, "below_confidence": 2, "duplicate": 1, "twin_of_test": 1, "quarantined": 1,
    }  # fmt: skip
    assert facts.guard == {"pixels": {"test": 1}}
    assert facts.duplicates == 1
    assert facts.quarantine == {"truncated": 1}


def test_collect__purity_counts_only_kept_faces_with_a_truth(run: Run) -> None:
    facts = collect(run, "demo", "c", False)
    assert facts.purity_known == 2  # a#0 right, a#1 wrong, b#0 unknown
    assert facts.purity == 0.5
    neutral, happiness = facts.yields
    assert (neutral.label, neutral.pool, neutral.kept) == ("neutral", 4, 2)
    assert (neutral.purity, neutral.known, neutral.threshold) == (0.5, 2, 0.7)
    assert (happiness.pool, happiness.kept, happiness.known) == (3, 1, 0)
    assert (happiness.purity, happiness.threshold) == (None, 0.6)


def test_collect__course_of_an_online_student(run: Run) -> None:
    assert collect(run, "demo", "c", False).course is None
    rows = [
        {"step": 50.0, "loss": 1.0, "used": 0.2, "cut_neutral": 0.8, "cut_happiness": 0.7},
        {"step": 80.0, "loss": 0.5, "used": 0.6, "cut_neutral": 0.9, "cut_happiness": 0.75},
    ]
    (_finish(run, "student") / "model" / "history.json").write_json(rows)
    course = collect(run, "demo", "c", False).course
    assert course is not None
    assert (course.steps, course.used) == ((50, 80), (0.2, 0.6))
    assert course.cuts == {"neutral": (0.8, 0.9), "happiness": (0.7, 0.75)}
    assert (course.purity, course.known) == ((None, None), 0)

    # Truth: a#0 neutral, a#1 and a#2 happiness; of b#3 and of x nothing is known.
    said = {"id": ["p/a#0", "p/a#1", "p/b#3", "x", "p/a#2"]}
    said |= {"label": ["neutral"] * 5, "weight": [1.0, 0.5, 1.0, 1.0, 0.0]}
    at = run.artifact("student").dir / "model" / "guesses" / "step-000080.parquet"
    write_table(at, pa.table(said))
    course = collect(run, "demo", "c", False).course
    assert course is not None
    assert course.purity == (None, pytest.approx(1 / 1.5))
    assert course.known == 3
    page = render(collect(run, "demo", "c", False))
    assert "among 3 watched faces" in page


def test_collect__levels(run: Run) -> None:
    levels = {v.threshold: v for v in collect(run, "demo", "c", False).levels}
    assert [levels[t].kept for t in (0.5, 0.6, 0.9, 0.95, 0.99)] == [7, 6, 3, 1, 0]
    assert levels[0.5].purity == pytest.approx(2 / 3)  # a#0 and a#2 right, a#1 wrong
    assert levels[0.95].purity == 1.0
    assert levels[0.99].purity is None
    assert levels[0.5].share == 7 / 8


def test_collect__galleries_show_mined_pixels_for_kept_and_thumbnails_for_rejected(
    run: Run,
) -> None:
    galleries = {(g.reason, g.label): g for g in collect(run, "demo", "c", True).galleries}
    kept = galleries["selected", "neutral"]
    assert [f.id for f in kept.faces] == ["p/a#0", "p/a#1"]
    assert [f.pixels.shape for f in kept.faces] == [(20, 20), (20, 20)]
    assert [f.note for f in kept.faces] == ["near neutral 0.91", ""]
    rejected = galleries["below_confidence", "neutral"]
    assert rejected.faces[0].pixels.tolist() == np.full((16, 16), 3).tolist()
    assert galleries["quarantined", "no label"].faces == ()
    assert galleries["quarantined", "no label"].total == 1
    blurred = collect(run, "demo", "c", False).galleries[1]
    assert (blurred.label, blurred.faces[0].pixels.shape) == ("neutral", (16, 16))


def test_collect__evaluation_gives_models_gain_and_protocol(run: Run) -> None:
    facts = collect(run, "demo", "c", False)
    assert [m.key for m in facts.models] == ["teacher", "control_a", "control_b", "student"]
    assert [m.accuracy for m in facts.models] == [0.75, 0.75, 0.75, 1.0]
    assert facts.models[3].recall == {"neutral": 1.0, "happiness": 1.0}
    assert facts.gain is not None
    assert (facts.gain.value, facts.gain.n, facts.gain.seeds) == (0.25, 4, 1)
    assert not facts.gain.real
    assert facts.protocol["n"] == 4
    assert set(facts.confusion) == {facts.gain.against, "student"}
    assert facts.confusion["student"].tolist() == [[1, 0], [0, 3]]
    assert facts.trials == ({"a": 1},)
    assert facts.distilled_grid is not None
    assert facts.distilled["ipc"] == 1
    assert facts.seconds["mine"] == 2.0
    assert set(facts.lineage) >= {"survey", "evaluate", "labeled"}


def test_collect__votes_reach_the_page_where_there_are_any(run: Run) -> None:
    assert "KL to votes" not in render(collect(run, "demo", "c", False))
    at = run.artifact("evaluate").dir / "metrics.json"
    found = at.read_json()
    for number, name in enumerate(("teacher", "control_a", "control_b", "student")):
        values, model = {"kl": 0.25 + number, "brier": 0.5}, found["models"][name]
        model["votes"] = {k: {"value": v, "low": v, "high": v} for k, v in values.items()}
    at.write_json(found)
    facts = collect(run, "demo", "c", False)
    assert [m.kl for m in facts.models] == [0.25, 1.25, 2.25, 3.25]
    text = render(facts)
    assert "KL to votes" in text
    assert '<td class="n">3.250</td><td class="n">0.500</td>' in text


def test_collect__its_facts_make_a_page(run: Run) -> None:
    text = render(collect(run, "demo", "omnifer run demo.yaml", True, ReportConfig(gallery=2)))
    assert text.count("<section") == 15
    assert text.count("before calibration") == 1
    assert "--show-faces was given" in text


def test_collect__explorer_estimates_purity_on_labeled_faces_in_the_pools_proportions(
    run: Run,
) -> None:
    explorer = collect(run, "demo", "c", False).explorer
    assert explorer is not None
    assert (explorer.classes, explorer.start) == (NAMES, 0.6)
    assert [level.threshold for level in explorer.levels] == [i / 100 for i in range(101)]
    # Out of fold: l#0 neutral 0.73 right, l#1 happiness 0.82 wrong, l#2 happiness 0.73 right,
    # l#3 neutral 0.62 wrong. Pool at 0.7: neutral 0.97, 0.85, 0.75 and happiness 0.92, 0.92.
    at = explorer.levels[70]
    assert (at.kept, at.labeled) == (5, 3)
    overall, prior = 2 / 3, 20
    neutral = (1 + prior * overall) / (1 + prior)
    happiness = (1 + prior * overall) / (2 + prior)
    assert at.by_class == ((3, pytest.approx(neutral)), (2, pytest.approx(happiness)))
    assert at.estimated == pytest.approx((3 * neutral + 2 * happiness) / 5)
    above = explorer.levels[90]  # no labeled face is that sure: nothing is estimated
    assert (above.kept, above.labeled, above.estimated) == (3, 0, None)
    assert [f.id for f in explorer.faces[:2]] == ["p/a#2", "p/b#3"]
    assert [f.note for f in explorer.faces[:2]] == ["happiness", "neutral"]
    assert len(explorer.faces) == 7


def test_collect__time_holds_controls_and_tuning(run: Run) -> None:
    for name, seconds in (("control_a", 5.0), ("control_b", 7.0), ("tuned", 3.0), ("test", 9.0)):
        _finish(run, name, seconds=seconds)
    spent = collect(run, "demo", "c", False).seconds
    assert "test" not in spent  # its clock is that of labeled
    assert {name: spent[name] for name in ("control_a", "control_b", "tuned")} == {
        "control_a": 5.0, "control_b": 7.0, "tuned": 3.0
    }  # fmt: skip


def test_collect__noise_is_of_the_labeled_faces(run: Run) -> None:
    for show, size in ((False, 16), (True, 20)):
        found = collect(run, "demo", "c", show).noise
        assert found is not None
        assert (found.faces, found.agreement) == (4, 0.5)
        # Mean belief: neutral (0.73 + 0.18) / 2, happiness (0.73 + 0.38) / 2. l#3 is neutral 0.62.
        assert found.counts.tolist() == [[1, 1], [1, 1]]
        assert [f.id for f in found.suspects] == ["l#1", "l#3"]
        assert found.suspects[0].note == "labeled neutral, seems happiness 0.82"
        assert found.suspects[0].confidence == pytest.approx(1 / (1 + np.exp(1.5)))
        assert found.suspects[0].pixels.tolist() == np.full((size, size), 20).tolist()


def test_collect__calibration_is_of_the_labeled_faces(run: Run) -> None:
    found = collect(run, "demo", "c", False).calibration
    assert found is not None
    assert (found.temperature, found.faces) == (2.0, 4)
    # Logits are 2, 3, 2 and 1 apart; right are the first and the third face.
    for temperature, ece in ((1.0, found.ece_before), (2.0, found.ece_after)):
        sure = {gap: 1 / (1 + np.exp(-gap / temperature)) for gap in (1, 2, 3)}
        assert ece == pytest.approx((abs(2 * sure[2] - 2) + sure[3] + sure[1]) / 4)
    assert [b.accuracy for b in found.after] == [0.0, 1.0, 0.0]
    assert [b.n for b in found.after] == [1, 2, 1]
    (run.artifact("teach").dir / "folds.parquet").remove()
    without = collect(run, "demo", "c", False)
    assert (without.calibration, without.noise) == (None, None)


def test_collect__twins_found_by_embedding_count(run: Run) -> None:
    plan = Plan(run.artifact("survey").dir / "plan.parquet")
    at = _finish(run, "twins")
    for slice, first in zip(plan, (0, 4), strict=True):
        rows = [dict(face) for face in FACES[first : first + 4]]
        if first == 0:
            rows[0] |= {"twin_of": "t#1", "twin_kind": "embedding", "twin_role": "validation"}
        Ledger(at).commit(slice, _tables(rows)["guard"])
    sealing.seal(Ledger(at), plan)
    assert collect(run, "demo", "c", False).guard == {
        "embedding": {"validation": 1}, "pixels": {"test": 1}
    }  # fmt: skip


def test_collect__an_empty_run_has_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished stage to report; run `omnifer run` first"):
        collect(Run(location(tmp_path / "new")), "demo", "c", False)


def test_collect__without_truth_purity_is_unknown(run: Run) -> None:
    (run.artifact("survey").dir / "truth.parquet").remove_tree()
    facts = collect(run, "demo", "c", False)
    assert facts.purity is None
    assert all(level.purity is None for level in facts.levels)


def test_collect__a_mined_face_that_is_gone_shows_its_thumbnail(run: Run) -> None:
    (run.root / "mine").remove_tree()
    galleries = {(g.reason, g.label): g for g in collect(run, "demo", "c", True).galleries}
    assert galleries["selected", "neutral"].faces[0].pixels.shape == (16, 16)
