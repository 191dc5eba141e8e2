"""Exports open without the package and say what the model says; what differs is never written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import NAMES, TINY, faces, tiny_model, tiny_teacher

from pipeline import exporting
from pipeline.artifacts import load_model, save_model, save_teacher
from pipeline.errors import ConfigError, ModelError
from pipeline.exporting import export, load_ensemble
from pipeline.models import ModelConfig
from pipeline.storage import location

CONVNET = ModelConfig(name="convnet", size=16, color="rgb", args={"width": 4, "depth": 2})
TIMM = ModelConfig(name="resnet10t", size=32, color="rgb", args={"stem_width": 8})
WITHOUT = "import sys; sys.modules['pipeline'] = None\n"  # importing it is an error from here on


def saved(tmp_path: Path, config: ModelConfig = TINY, temperature: float = 1.5):
    at = location(tmp_path / "model")
    save_model(tiny_model(config=config), at, {"temperature": temperature})
    return at


def expected(at, x: torch.Tensor) -> np.ndarray:
    """Probabilities by hand: softmax of logits over the temperature."""
    with torch.inference_mode():
        return torch.softmax(load_model(at)(x) / 1.5, -1).numpy()


def alone(folder: Path, code: str) -> str:
    """What a fresh process prints that works in a folder and has no package of ours."""
    call = [sys.executable, "-c", WITHOUT + code]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("config", [TINY, CONVNET], ids=lambda config: config.name)
def test_export__onnx_runs_with_any_batch_and_carries_what_is_needed(tmp_path, config) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    at = saved(tmp_path, config)
    parity = export(at, "onnx", location(tmp_path / "out"))
    assert parity.difference < 1e-5
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    session = ReferenceEvaluator(graph)
    for count in (1, 5):
        x = faces(count, channels=config.channels) / 255
        logits, probs = session.run(["logits", "probs"], {"input": x.numpy()})
        np.testing.assert_allclose(probs, expected(at, x), atol=1e-5)
        scaled = np.exp(logits - logits.max(1, keepdims=True))
        np.testing.assert_allclose(scaled / scaled.sum(1, keepdims=True), probs, atol=1e-5)
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    assert json.loads(facts["label_names"]) == list(NAMES)
    assert json.loads(facts["temperature"]) == [1.5]
    assert json.loads(facts["mean"]) == [0.5] * len(json.loads(facts["mean"]))
    assert (json.loads(facts["size"]), facts["color"]) == (16, config.color)
    assert facts["crop"] == facts["protocol"] == "null"  # the folder lies in no run


def test_export__a_teacher_is_one_graph_of_mean_calibrated_probabilities(tmp_path) -> None:
    pytest.importorskip("onnx")
    teacher = tiny_teacher(members=3)
    save_teacher(teacher, location(tmp_path / "teacher"))
    export(location(tmp_path / "teacher"), "onnx", location(tmp_path / "out"))
    run, _ = exporting.runner((tmp_path / "out" / "model.onnx").read_bytes())
    x = faces(4) / 255
    with torch.inference_mode():
        each = [torch.softmax(m(x) / teacher.temperature, -1) for m in teacher.members]
    np.testing.assert_allclose(run(x.numpy()), sum(each).numpy() / 3, atol=1e-5)


def test_export__opens_where_the_package_is_not(tmp_path) -> None:
    """One process for all, since importing torch takes seconds."""
    own, theirs, teacher = (location(tmp_path / name) for name in ("own", "theirs", "teacher"))
    save_model(tiny_model(), own, {"temperature": 1.5})
    save_model(tiny_model(config=TIMM), theirs, {"temperature": 1.5})
    save_teacher(tiny_teacher(2), teacher)
    export(own, "hf", location(tmp_path / "own-hf"))
    export(teacher, "hf", location(tmp_path / "teacher-hf"))
    export(theirs, "timm", location(tmp_path / "theirs-timm"))
    gray, rgb = faces(3) / 255, faces(2, channels=3, size=32) / 255
    np.savez(tmp_path / "x.npz", gray=gray.numpy(), rgb=rgb.numpy())
    told = alone(
        tmp_path,
        "import json, numpy, timm, torch\n"
        "sys.path.insert(0, 'own-hf')\n"
        "import modeling\n"
        "gray, rgb = (torch.from_numpy(numpy.load('x.npz')[k]) for k in ('gray', 'rgb'))\n"
        "said = {}\n"
        "for name in ('own-hf', 'teacher-hf'):\n"
        "    model = modeling.load(name)\n"
        "    said[name] = [model.label_names, model(gray).tolist()]\n"
        "net = timm.create_model('local-dir:theirs-timm', pretrained=True).eval()\n"
        "known, own = net.pretrained_cfg, json.load(open('theirs-timm/config.json'))\n"
        "mean, std = (torch.tensor(known[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))\n"
        "logits = net((rgb - mean) / std) / own['temperature'][0]\n"
        "said['theirs-timm'] = [known['label_names'], logits.softmax(-1).tolist()]\n"
        "print(json.dumps(said))\n",
    )
    said = json.loads(told)
    assert all(names == list(NAMES) for names, _ in said.values())
    np.testing.assert_allclose(said["own-hf"][1], expected(own, gray), atol=1e-5)
    np.testing.assert_allclose(said["theirs-timm"][1], expected(theirs, rgb), atol=1e-5)
    with torch.inference_mode():
        both = load_ensemble(teacher)(gray)[1]
    np.testing.assert_allclose(said["teacher-hf"][1], both, atol=1e-5)


def test_export__timm_refuses_what_it_cannot_build(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"compact_resnet is this package's own .* --format hf"):
        export(saved(tmp_path), "timm", location(tmp_path / "out"))
    save_teacher(tiny_teacher(2), location(tmp_path / "teacher"))
    with pytest.raises(ModelError, match="holds one network, this is 2"):
        export(location(tmp_path / "teacher"), "timm", location(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_export__tuned_members_keep_their_temperatures(tmp_path) -> None:
    for number, temperature in enumerate((1.0, 3.0)):
        meta = {"temperature": temperature}
        save_model(tiny_model(number), location(tmp_path / "model" / str(number)), meta)
    both = load_ensemble(location(tmp_path / "model"))
    x = faces(2) / 255
    with torch.inference_mode():
        each = [torch.softmax(tiny_model(n)(x) / t, -1) for n, t in enumerate((1.0, 3.0))]
        torch.testing.assert_close(both(x)[1], sum(each) / 2)


def test_export__a_different_export_is_refused_and_nothing_is_left(tmp_path, monkeypatch) -> None:
    def wrong(folder: str):
        return lambda x: load_ensemble(location(folder))(x)[1] + 2e-3

    monkeypatch.setattr(exporting.modeling, "load", wrong)
    with pytest.raises(ModelError, match=r"max abs difference 2.0e-03 .* at most 0.001"):
        export(saved(tmp_path), "hf", location(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    nan = exporting.load_ensemble(location(tmp_path / "model"))
    with pytest.raises(ModelError, match="difference inf"):
        exporting.check(nan, lambda x: torch.full((len(x), 3), float("nan")), "none")


def test_export__faults_of_a_person_are_one_line(tmp_path) -> None:
    at, out = saved(tmp_path), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--format 'tf': expected timm, onnx, hf"):
        export(at, "tf", location(out))
    with pytest.raises(ModelError, match="expected a run folder, a model or teacher folder"):
        export(location(tmp_path / "nowhere"), "hf", location(out))
    (tmp_path / "model" / "old.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"holds old.pt, a pickle"):
        export(at, "hf", location(out))
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="not there or empty"):
        export(at, "hf", location(out))
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_export__no_file_is_a_pickle(tmp_path) -> None:
    pytest.importorskip("onnx")
    at = saved(tmp_path)
    for kind in ("onnx", "hf"):
        export(at, kind, location(tmp_path / kind))
        files = [p for p in (tmp_path / kind).rglob("*") if p.is_file()]
        assert files
        for file in files:
            assert file.suffix in (".onnx", ".json", ".safetensors", ".md", ".py")
            assert file.read_bytes()[:1] != b"\x80"


def test_export__a_student_of_a_run_brings_crop_protocol_and_card(tiny_run, tmp_path) -> None:
    pytest.importorskip("onnx")
    export(location(tiny_run), "hf", location(tmp_path / "hf"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    assert "perceived expressions" in card
    assert "prohibited in the European Union" in card
    assert str(tiny_run) not in card
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    metrics = json.loads(next(tiny_run.glob("evaluate/*/metrics.json")).read_text())
    assert config["protocol"] == metrics["protocol"]
    assert config["crop"]["fraction"] is None
    accuracy = metrics["models"]["student"]["accuracy"]["value"]
    assert f"| accuracy | {accuracy:.3f} |" in card
    export(location(tiny_run / "teach"), "onnx", location(tmp_path / "onnx"))
