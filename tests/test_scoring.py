"""Scores equal a slow reference face by face, bad faces stay rows, commits name their input."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.tiny import NAMES, tiny_teacher

from pipeline.artifacts import save_teacher
from pipeline.embedding import spread
from pipeline.errors import LedgerError, ModelError
from pipeline.ledger import Ledger
from pipeline.plan import Slice
from pipeline.schema import embeddings_schema, label_names_of, scores_schema
from pipeline.scoring import ScoreConfig, Scorer, score_table
from pipeline.similarity import Neighbors
from pipeline.storage import location

SLICE = Slice("s0000000", 0, "pool", "/x", 0, 5, "print", 5)


def embeddings(teacher, n=5, bad=(), seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, teacher.width)).astype(np.float32)
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16)
    logits = rng.normal(scale=3, size=(n, len(teacher.members) * 3)).astype(np.float32)
    good = np.array([i not in bad for i in range(n)], dtype=bool)
    schema = embeddings_schema(teacher.width, len(teacher.members), 3)
    columns = [
        pa.array([f"pool/x#{i}" for i in range(n)]),
        pa.array(["quarantined" if i in bad else "ok" for i in range(n)]),
        pa.array(["truncated" if i in bad else None for i in range(n)], pa.string()),
        spread(z[good], good, schema.field("embedding").type),
        spread(logits[good], good, schema.field("logits").type),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def score(teacher, table, k=4, tau=0.1):
    return score_table(table, teacher, Neighbors(teacher.bank.numpy(), teacher.bank_ids), k, tau)


def softmax(values):
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def reference(teacher, z, logits, k, tau):
    """One face in plain Python, from the definitions."""
    members = [softmax([v / teacher.temperature for v in row]) for row in logits]
    probs = [sum(p) / len(members) for p in zip(*members, strict=True)]

    def entropy(p):
        return -sum(v * math.log(v) for v in p if v > 0)

    z = z / np.linalg.norm(z)
    best = {}
    for vector, label in zip(teacher.prototypes.numpy(), teacher.prototype_labels, strict=True):
        best[int(label)] = max(best.get(int(label), -1), float(z @ vector))
    ranked = sorted(best, key=lambda c: -best[c])
    near = sorted(
        (-round(float(z.astype(np.float64) @ face.astype(np.float64)), 6), face_id, int(label))
        for face, face_id, label in zip(
            teacher.bank.numpy(), teacher.bank_ids, teacher.bank_labels, strict=True
        )
    )[:k]
    votes = [sum(math.exp(-s / tau) for s, _, label in near if label == c) for c in range(3)]
    top = sorted(probs)
    return {
        "probs": probs,
        "pseudo_label": NAMES[probs.index(max(probs))],
        "confidence": top[-1],
        "margin": top[-1] - top[-2],
        "disagreement": entropy(probs) - sum(map(entropy, members)) / len(members),
        "prototype_label": NAMES[ranked[0]],
        "prototype_similarity": best[ranked[0]],
        "prototype_margin": best[ranked[0]] - best[ranked[1]],
        "neighbor_label": NAMES[votes.index(max(votes))],
        "neighbor_agreement": max(votes) / sum(votes),
        "neighbor_similarity": -near[0][0],
        "neighbor_ids": [face_id for _, face_id, _ in near],
    }


def test_score_table__equals_the_reference_for_every_face():
    teacher = tiny_teacher()
    table = embeddings(teacher, n=20)
    rows = score(teacher, table).to_pylist()
    for row, given in zip(rows, table.to_pylist(), strict=True):
        logits = np.array(given["logits"]).reshape(2, 3)
        want = reference(teacher, np.array(given["embedding"], np.float32), logits, 4, 0.1)
        assert row["id"] == given["id"]
        for name, value in want.items():
            if isinstance(value, str) or name == "neighbor_ids":
                assert row[name] == value, name
            else:
                assert row[name] == pytest.approx(value, abs=2e-6), name


def test_score_table__probs_sum_to_one_and_disagreement_is_bounded():
    table = score(tiny_teacher(), embeddings(tiny_teacher(), n=50))
    probs = np.array(table.column("probs").to_pylist())
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-6)
    disagreement = table.column("disagreement").to_numpy()
    assert (disagreement >= 0).all()
    assert (disagreement <= math.log(2) + 1e-6).all()


def test_score_table__members_that_agree_do_not_disagree():
    teacher = tiny_teacher()
    table = embeddings(teacher, n=3)
    same = np.tile(np.array(table.column("logits").to_pylist(), np.float32)[:, :3], 2)
    column = spread(same, np.ones(3, bool), table.schema.field("logits").type)
    table = table.set_column(4, table.schema.field("logits"), column)
    np.testing.assert_allclose(score(teacher, table).column("disagreement"), 0, atol=1e-6)


def test_score_table__bad_faces_keep_their_row_with_nulls():
    teacher = tiny_teacher()
    whole, holes = embeddings(teacher, n=6), embeddings(teacher, n=6, bad=(0, 3))
    want, got = score(teacher, whole).to_pylist(), score(teacher, holes).to_pylist()
    for i, (row, other) in enumerate(zip(got, want, strict=True)):
        if i in (0, 3):
            assert (row["status"], row["reason"]) == ("quarantined", "truncated")
            assert all(row[name] is None for name in list(row)[3:]), row
        else:
            assert row["neighbor_ids"] == other["neighbor_ids"]
            assert row["probs"] == pytest.approx(other["probs"])


@pytest.mark.parametrize("bad", [(), (0, 1, 2)])
def test_score_table__schema_holds_for_no_face_and_for_no_good_face(bad):
    teacher = tiny_teacher()
    table = score(teacher, embeddings(teacher, n=len(bad), bad=bad))
    assert table.num_rows == len(bad)
    assert table.schema.equals(scores_schema(3, 4))
    assert label_names_of(table.schema) == NAMES


def test_score_table__more_neighbors_than_labeled_faces_gives_null_ids():
    row = score(tiny_teacher(), embeddings(tiny_teacher(), n=1), k=9).to_pylist()[0]
    assert row["neighbor_ids"][7:] == [None, None]
    assert None not in row["neighbor_ids"][:7]


def test_score_table__slices_do_not_change_a_face():
    teacher = tiny_teacher()
    table = embeddings(teacher, n=12)
    want = score(teacher, table).to_pylist()
    cut = [row for i in range(0, 12, 5) for row in score(teacher, table.slice(i, 5)).to_pylist()]
    for row, other in zip(cut, want, strict=True):
        assert row["neighbor_ids"] == other["neighbor_ids"]
        assert row["prototype_similarity"] == pytest.approx(other["prototype_similarity"], abs=1e-6)
        assert row["probs"] == other["probs"]


def test_score_table__other_prototypes_move_prototype_columns_only():
    teacher = tiny_teacher()
    table = embeddings(teacher, n=8)
    before = score(teacher, table)
    teacher.prototypes = torch.nn.functional.normalize(torch.randn(3, teacher.width), dim=-1)
    after = score(teacher, table)
    moved = {n for n in before.column_names if not before.column(n).equals(after.column(n))}
    assert moved
    assert all(name.startswith("prototype") for name in moved)


@pytest.fixture
def ledgers(tmp_path):
    teacher = tiny_teacher()
    save_teacher(teacher, location(tmp_path / "teacher"))
    places = [location(tmp_path / name) for name in ("teacher", "scores", "embeddings")]
    return teacher, places


def test_scorer__chained_and_alone_commit_the_same_and_name_the_embeddings(ledgers, tmp_path):
    teacher, (teacher_at, scores_at, embed_at) = ledgers
    table = embeddings(teacher, bad=(2,))
    embedded = Ledger(embed_at).commit(SLICE, table)
    config = ScoreConfig(neighbors=4, neighbor_tau=0.1)
    yields = Scorer(teacher_at, scores_at, embed_at, config)(SLICE, table)
    commit = Ledger(scores_at).find(SLICE.key)
    assert commit.reads == {"embed": embedded.sha256}
    assert (commit.rows, commit.quarantined) == (5, 1)
    for nothing in (None, pa.table({"key": [SLICE.key]})):
        alone_at = location(tmp_path / f"alone {nothing is None}")
        Scorer(teacher_at, alone_at, embed_at, config)(SLICE, nothing)
        assert Ledger(alone_at).find(SLICE.key).sha256 == commit.sha256
    counts = yields.to_pylist()[0]
    assert (counts.pop("rows"), counts.pop("quarantined")) == (5, 1)
    assert set(counts) == set(NAMES)
    assert sum(counts.values()) == 4


def test_scorer__needs_embeddings_prototypes_and_a_bank(ledgers, tmp_path):
    teacher, (teacher_at, scores_at, embed_at) = ledgers
    scorer = Scorer(teacher_at, scores_at, embed_at, ScoreConfig())
    with pytest.raises(LedgerError, match="s0000000 has no committed embeddings"):
        scorer(SLICE, None)
    teacher.bank, teacher.bank_labels = teacher.bank[:0], teacher.bank_labels[:0]
    teacher.bank_ids = ()
    save_teacher(teacher, location(tmp_path / "poor"))
    with pytest.raises(ModelError, match="3 prototypes and 0 labeled faces"):
        Scorer(location(tmp_path / "poor"), scores_at, embed_at, ScoreConfig())
