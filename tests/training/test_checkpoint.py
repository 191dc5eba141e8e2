"""Proves that the newest two checkpoints stay, whole, with every tensor as it was."""

from pathlib import Path

import torch
from helpers.s3 import s3_bucket

from pipeline.training import checkpoint


def test_save__latest_gives_back_values_and_facts(tmp_path: Path) -> None:
    tensors = {
        "last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(3).to(torch.bfloat16),
        "count": torch.tensor(7),
    }
    tensors["shared"] = tensors["last"]
    checkpoint.save(tmp_path / "c", 5, tensors, {"step": 5, "history": [{"loss": 0.25}]})
    found = checkpoint.latest(tmp_path / "c")
    assert found is not None
    assert found[1] == {"step": 5, "history": [{"loss": 0.25}]}
    assert found[0].keys() == tensors.keys()
    assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)


def test_save__two_are_kept_and_nothing_else(tmp_path: Path) -> None:
    for step in (900, 1000, 10, 1100):
        checkpoint.save(tmp_path, step, {"x": torch.tensor([step])}, {"step": step})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-0000001000.safetensors", "step-0000001100.safetensors"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1100


def test_latest__none_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") is None


def test_save__on_s3_the_same() -> None:
    with s3_bucket() as root:
        folder = f"{root.uri}/checkpoints"
        for step in (900, 1000, 1100):
            checkpoint.save(folder, step, {"x": torch.tensor([step])}, {"step": step})
        names = [at.name for at in (root / "checkpoints").children()]
        assert names == ["step-0000001000.safetensors", "step-0000001100.safetensors"]
        found = checkpoint.latest(folder)
        assert found is not None
        assert (found[0]["x"].item(), found[1]) == (1100, {"step": 1100})
        assert checkpoint.latest(f"{root.uri}/missing") is None
