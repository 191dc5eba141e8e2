"""The script that travels with a model is the network it was trained as."""

import pytest
import torch
from helpers.tiny import TINY, faces, tiny_model

from pipeline import modeling
from pipeline.artifacts import save_model
from pipeline.exporting import export
from pipeline.models import ModelConfig
from pipeline.storage import location
from pipeline.synthetic import draw, encode


def test_own_networks__have_the_names_and_shapes_of_what_was_trained() -> None:
    deep = ModelConfig(size=16, args={"widths": [8, 16], "stem": [3, 1], "blocks": 2})
    small = ModelConfig(name="convnet", size=16, args={"width": 4, "depth": 2})
    for config in (TINY, deep, small):
        trained = tiny_model(config=config).net.state_dict()
        if config.name == "convnet":
            net = modeling.ConvNet(3, 1, 16, **config.args)
        else:
            net = modeling.CompactResNet(3, 1, **config.args)
        carried = net.state_dict()
        assert {k: v.shape for k, v in carried.items()} == {k: v.shape for k, v in trained.items()}


@pytest.mark.parametrize("more", [{}, {"stem": [3, 1], "blocks": 2}])
def test_member__gives_the_logits_of_the_model(tmp_path, more) -> None:
    model = tiny_model(config=TINY.model_copy(update={"args": {**TINY.args, **more}}))
    save_model(model, location(tmp_path), {})
    x = faces(3) / 255
    with torch.inference_mode():
        torch.testing.assert_close(modeling.Member(str(tmp_path)).eval()(x), model(x))


def test_main__prints_the_classes_of_a_crop(tmp_path, capsys) -> None:
    save_model(tiny_model(), location(tmp_path / "model"), {"temperature": 2.0})
    export(location(tmp_path / "model"), "hf", location(tmp_path / "out"))
    face = tmp_path / "face.png"
    face.write_bytes(encode(draw(0, [0], 16)[0]))  # as large as the network's input
    modeling.main(str(tmp_path / "out"), str(face))
    x = torch.from_numpy(draw(0, [0], 16))[:, None] / 255
    with torch.inference_mode():
        probs = torch.softmax(tiny_model()(x) / 2.0, -1)[0]
    best = int(probs.argmax())
    name = ("neutral", "happiness", "sadness")[best]
    assert capsys.readouterr().out.startswith(f"{face}: {name} {probs[best]:.3f}, ")
