"""Folders give back the very model and teacher; timm opens them; pickles and damage are refused."""

import json
import tempfile

import pytest
import torch
from helpers.tiny import NAMES, TINY, faces, tiny_model, tiny_teacher

from pipeline.artifacts import (
    load_any,
    load_model,
    load_teacher,
    on_node,
    read_meta,
    save_model,
    save_teacher,
)
from pipeline.errors import ModelError
from pipeline.exporting import load_ensemble
from pipeline.models import ModelConfig
from pipeline.storage import Location, location


def test_save_model__round_trip_is_bit_equal(tmp_path):
    at, model = location(tmp_path / "m"), tiny_model()
    sha256 = save_model(model, at, {"temperature": 1.5})
    again = load_model(at)
    x = faces(5) / 255
    assert torch.equal(again(x), model(x))
    assert again.label_names == NAMES
    assert again.config == TINY
    assert not again.training
    assert read_meta(at) == {"temperature": 1.5}
    assert save_model(again, location(tmp_path / "n"), {}) == sha256


def test_save_model__timm_opens_the_folder_and_gives_equal_logits(tmp_path):
    timm = pytest.importorskip("timm")
    config = ModelConfig(name="resnet10t", size=32, color="rgb", args={"stem_width": 8})
    model = tiny_model(config=config)
    save_model(model, location(tmp_path), {})
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    facts = theirs.pretrained_cfg
    x = faces(3, channels=3, size=32) / 255
    mean, std = (torch.tensor(facts[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(theirs((x - mean) / std), model(x), rtol=1e-5, atol=1e-5)
    assert facts["input_size"] == (3, 32, 32) or list(facts["input_size"]) == [3, 32, 32]
    assert tuple(facts["label_names"]) == NAMES


def test_load_model__normalization_comes_from_the_folder(tmp_path):
    save_model(tiny_model(), location(tmp_path), {})
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.25]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(location(tmp_path)).mean.item() == 0.25


@pytest.mark.parametrize(
    "name", ["model.pkl", "pytorch_model.bin", "last.PT", "w.joblib", "sub/w.pt"]
)
@pytest.mark.parametrize("beside", [True, False])
def test_load_model__folder_with_a_pickle_is_refused(tmp_path, name, beside):
    if beside:
        save_model(tiny_model(), location(tmp_path), {})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=f"holds {name}, a pickle, which is never opened"):
        load_model(location(tmp_path))


def test_load_model__damage_and_foreign_folders_are_named(tmp_path):
    at = location(tmp_path)
    with pytest.raises(ModelError, match=r"expected model.safetensors; not there"):
        load_model(at)
    save_model(tiny_model(), at, {})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="damaged or mixed"):
        load_model(at)
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ModelError, match="no block 'omnifer'"):
        load_model(at)


def test_save_teacher__round_trip_is_bit_equal(tmp_path):
    teacher, at = tiny_teacher(), location(tmp_path)
    sha256 = save_teacher(teacher, at, {"seen": 0.4})
    again = load_teacher(at)
    for name in ("prototypes", "prototype_labels", "bank", "bank_labels"):
        assert torch.equal(getattr(again, name), getattr(teacher, name)), name
    assert (again.bank_ids, again.label_names) == (teacher.bank_ids, NAMES)
    assert again.temperature == teacher.temperature
    assert again.sha256 == sha256 == teacher.sha256
    x = faces(4)
    for ours, theirs in zip(teacher.represent(x), again.represent(x), strict=True):
        assert torch.equal(ours, theirs)
    assert read_meta(at) == {"seen": 0.4}
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix == ".pkl") == []


def test_save_teacher__digest_tells_weights_from_prototypes(tmp_path):
    teacher = tiny_teacher()
    first = save_teacher(teacher, location(tmp_path / "a"))
    weights = teacher.weights_sha256
    teacher.prototypes = teacher.prototypes.flip(0)
    assert save_teacher(teacher, location(tmp_path / "b"), {"note": 1}) != first
    assert teacher.weights_sha256 == weights
    teacher.members = teacher.members[::-1]
    save_teacher(teacher, location(tmp_path / "c"))
    assert teacher.weights_sha256 != weights


def test_load_teacher__a_changed_file_is_named(tmp_path):
    save_teacher(tiny_teacher(), location(tmp_path))
    ids = tmp_path / "bank_ids.json"
    ids.write_text(ids.read_text().replace("train/3", "train/x"))
    with pytest.raises(ModelError, match=r"bank_ids.json: not the ids"):
        load_teacher(location(tmp_path))
    with pytest.raises(ModelError, match=r"expected a teacher folder with calibration.json"):
        load_teacher(location(tmp_path / "members" / "0"))


def test_represent__cosine_is_the_mean_of_the_members_cosines():
    teacher, x = tiny_teacher(), faces(2)
    z, _ = teacher.represent(x, flip=False)
    cosines = []
    for member in teacher.members:
        with torch.no_grad():
            a, b = member.features(x / 255)[0]
        cosines.append(torch.cosine_similarity(a, b, dim=0))
    torch.testing.assert_close(z[0] @ z[1], sum(cosines) / 2)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))


def test_represent__flip_average_does_not_see_mirrors():
    teacher, x = tiny_teacher(), faces(3)
    z, logits = teacher.represent(x)
    mirrored, mirrored_logits = teacher.represent(x.flip(-1))
    torch.testing.assert_close(z, mirrored)
    torch.testing.assert_close(logits, mirrored_logits)
    plain, other = (teacher.represent(v, flip=False)[1] for v in (x, x.flip(-1)))
    torch.testing.assert_close(logits, (plain + other) / 2)
    assert not torch.allclose(plain, other)


def test_represent__uint8_equals_float_and_shapes_hold():
    teacher, x = tiny_teacher(), faces(4)
    z, logits = teacher.represent(x)
    assert (z.shape, logits.shape) == ((4, teacher.width), (4, 2, 3))
    assert torch.equal(z, teacher.represent(x / 255)[0])


def test_probs__mean_of_calibrated_softmax():
    teacher = tiny_teacher()
    logits = torch.tensor([[[1.7, 0.0, 0.0], [0.0, 3.4, 0.0]]])
    first, second = torch.softmax(torch.tensor([[1.0, 0, 0], [0, 2, 0]]), dim=-1)
    torch.testing.assert_close(teacher.probs(logits)[0], (first + second) / 2)


def test_load_any__a_model_folder_is_a_teacher_of_one(tmp_path):
    model = tiny_model()
    save_model(model, location(tmp_path), {"temperature": 2.0})
    teacher = load_any(location(tmp_path))
    logits = teacher.represent(faces(2), flip=False)[1]
    torch.testing.assert_close(logits[:, 0], model(faces(2) / 255))
    assert (teacher.temperature, len(teacher.bank_ids)) == (2.0, 0)


def test_on_node__a_local_folder_is_itself(tmp_path):
    assert on_node(location(tmp_path)) == location(tmp_path)


class Remote(Location):
    """A folder that counts as remote; its files are local."""

    is_local = False

    def files(self, suffixes):
        return Location(self.uri).files(suffixes)


def test_on_node__a_remote_folder_is_copied_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save_teacher(tiny_teacher(), location(tmp_path / "there"))
    at = Remote(str(tmp_path / "there"))
    copy = on_node(at)
    assert copy.is_local
    assert load_teacher(copy).sha256 == load_teacher(location(at.uri)).sha256
    monkeypatch.setattr(Location, "open", lambda *_: pytest.fail("copied twice"))
    assert on_node(at) == copy
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save_teacher(tiny_teacher(members=1), location(tmp_path / "there"))
    save_teacher(tiny_teacher(), location(tmp_path / "other"))
    other = on_node(Remote(str(tmp_path / "other")))
    newer = on_node(at)
    assert newer != copy
    # What the folder held before is gone from this node; what others hold is not.
    kept = {child.name for child in copy.parent.children() if not child.name.endswith(".lock")}
    assert kept == {newer.name, other.name}
    assert load_teacher(newer).sha256 == load_teacher(location(at.uri)).sha256


@pytest.mark.parametrize("name", ["w.pkl", "members/0/sub/w.ckpt"])
def test_load_teacher__a_pickle_anywhere_is_refused_before_a_copy(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    at = tmp_path / "there"
    save_teacher(tiny_teacher(), location(at))
    (at / name).parent.mkdir(exist_ok=True)
    (at / name).write_bytes(b"")
    for load in (load_teacher, load_any, load_ensemble):
        with pytest.raises(ModelError, match=f"holds {name}, a pickle"):
            load(location(at))
    with pytest.raises(ModelError, match=f"holds {name}, a pickle"):
        on_node(Remote(str(at)))
    assert [child.name for child in tmp_path.iterdir()] == ["there"]


def test_on_node__an_empty_remote_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="expected a model or teacher folder"):
        on_node(Remote(str(tmp_path)))
