"""Proves that a distilled set on storage is complete: labels, origin, statement, script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SourceError
from pipeline.storage import location
from pipeline.tables import read_table
from pipeline.training.distill import Distilled, distill, embed
from pipeline.training.distilled import load_distilled, provenance, save_distilled
from training.test_distill import NAMES, chosen, here, judge, toy


@pytest.fixture
def made() -> Distilled:
    return distill(chosen("random"), *toy(), NAMES, here(), seed=0, judge=judge)


def test_save_distilled__loads_again_and_shows_a_row_per_class(
    made: Distilled, tmp_path: Path
) -> None:
    at = location(tmp_path / "distilled")
    digest = save_distilled(at, made)
    again = load_distilled(at)
    assert np.array_equal(again.images, made.images)
    assert np.array_equal(again.labels, made.labels)
    assert np.allclose(again.soft, made.soft)
    assert again.label_names == NAMES
    assert (at / "labels.json").read_json()["labels"][:3] == ["neutral", "neutral", "happiness"]
    assert Image.open(tmp_path / "distilled" / "grid.png").size == (2 * 14 + 2, 3 * 14 + 2)
    assert save_distilled(at, made) == digest
    (at / "labels.json").write_json({"label_names": NAMES, "labels": ["neutral"], "rate": None})
    with pytest.raises(SourceError, match=r"6 images in images.safetensors, 1 in labels.json"):
        load_distilled(at)


def test_provenance__a_real_face_is_its_own_nearest(made: Distilled, tmp_path: Path) -> None:
    faces, _ = toy()
    ids = [f"face{i}" for i in range(len(faces))]
    sources = ["labeled"] * 10 + ["pool"] * (len(faces) - 10)
    known = provenance(made, ids, sources, embed(judge, faces, 12), judge(made.images)[0])
    assert known["origin"].to_pylist() == [f"face{i}" for i in made.origin]
    assert known["nearest"].to_pylist() == known["origin"].to_pylist()
    assert np.allclose(known["similarity"].to_numpy(), 1, atol=1e-5)
    expected = ["labeled" if i < 10 else "pool" for i in made.origin]
    assert known["origin_source"].to_pylist() == known["nearest_source"].to_pylist() == expected
    at = location(tmp_path / "distilled")
    save_distilled(at, made, known, {"method": "random", "faces": 60})
    assert read_table(at / "provenance.parquet").equals(known)


def test_provenance__the_nearest_is_that_of_all_pairs(made: Distilled) -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(200, 4)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    own = embeddings[:6] + 0.1 * rng.normal(size=(6, 4)).astype(np.float32)
    known = provenance(made, [str(i) for i in range(200)], ["pool"] * 200, embeddings, own)
    cosines = own @ embeddings.T
    assert known["nearest"].to_pylist() == [str(i) for i in cosines.argmax(1)]
    assert np.allclose(known["similarity"].to_numpy(), cosines.max(1))


def test_save_distilled__the_statement_names_what_and_how_many(
    made: Distilled, tmp_path: Path
) -> None:
    save_distilled(location(tmp_path), made, facts={"method": "random", "faces": 60})
    said = (tmp_path / "STATEMENT.md").read_text()
    assert "6 images of 12 px, 2 for each of 3 perceived expressions" in said
    assert "- method: random" in said
    assert "neutral, happiness, anger" in said


def test_save_distilled__its_script_trains_from_the_folder_alone(
    made: Distilled, tmp_path: Path
) -> None:
    save_distilled(location(tmp_path), made)
    source = (tmp_path / "train.py").read_text()
    assert "pipeline" not in source
    run = [sys.executable, "-I", "train.py", ".", "60"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "100.0% of the images right" in done.stdout
    assert (tmp_path / "trained.safetensors").exists()
