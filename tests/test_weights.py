"""Foreign weights land where they fit, are counted, and too few of them are an error."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import ModelError
from pipeline.models import ModelConfig, create
from pipeline.storage import location
from pipeline.weights import WeightsReport, load_weights

NAMES = ("neutral", "happiness")


def model(seed, color="gray", names=NAMES, widths=(8, 16)):
    torch.manual_seed(seed)
    return create(ModelConfig(size=16, color=color, args={"widths": list(widths)}), names)


def body(net):
    return {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("fc.")}


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_load_weights__safetensors_with_another_head(tmp_path, prefix):
    theirs, ours = model(1, names=("a", "b", "c")), model(2)
    head = ours.net.fc.weight.clone()
    file = tmp_path / "weights.safetensors"
    save_file({prefix + k: v for k, v in theirs.net.state_dict().items()}, file)
    report = load_weights(ours, location(file))
    assert (report.matched, report.missing, report.unexpected) == (report.total, (), ())
    for key, value in body(theirs.net).items():
        if value.is_floating_point():
            assert torch.equal(ours.net.state_dict()[key], value), key
    assert torch.equal(ours.net.fc.weight, head)


def test_load_weights__torch_file_and_timm_style_folder(tmp_path):
    theirs = model(1)
    torch.save({"epoch": 3, "state_dict": theirs.net.state_dict()}, tmp_path / "pytorch_model.bin")
    ours = model(2)
    from_folder = load_weights(ours, location(tmp_path))
    from_file = load_weights(model(3), location(tmp_path / "pytorch_model.bin"))
    assert from_folder == from_file
    assert torch.equal(ours.net.conv_stem.weight, theirs.net.conv_stem.weight)


def test_load_weights__color_stem_is_summed_for_gray_and_gray_is_spread_over_color(tmp_path):
    rgb, gray = model(1, color="rgb"), model(2)
    save_file(rgb.net.state_dict(), tmp_path / "rgb.safetensors")
    report = load_weights(gray, location(tmp_path / "rgb.safetensors"))
    assert report.adapted == ("conv_stem.weight",)
    stem = rgb.net.conv_stem.weight
    torch.testing.assert_close(gray.net.conv_stem.weight, stem.sum(1, keepdim=True))
    save_file(gray.net.state_dict(), tmp_path / "gray.safetensors")
    other = model(3, color="rgb")
    load_weights(other, location(tmp_path / "gray.safetensors"))
    x = torch.rand(2, 1, 16, 16)
    stems = (other.net.conv_stem(x.expand(-1, 3, -1, -1)), gray.net.conv_stem(x))
    torch.testing.assert_close(*stems, rtol=1e-4, atol=1e-6)


def test_load_weights__below_ninety_percent_refuses_and_changes_nothing(tmp_path):
    theirs, ours = model(1, widths=(8, 12)), model(2)
    save_file({**theirs.net.state_dict(), "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    before = {k: v.clone() for k, v in ours.net.state_dict().items()}
    with pytest.raises(ModelError, match=r"of [\d,]+ values .* match .*90%; missing .*; .* extra"):
        load_weights(ours, location(tmp_path / "w.safetensors"))
    for key, value in ours.net.state_dict().items():
        assert torch.equal(value, before[key])


def test_load_weights__a_small_gap_is_reported(tmp_path):
    state = model(1).net.state_dict()
    state.pop("bn1.bias")
    save_file(state, tmp_path / "w.safetensors")
    report = load_weights(model(2), location(tmp_path / "w.safetensors"))
    assert report.missing == ("bn1.bias",)
    assert report.total - report.matched == 8


class Trap:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_weights_report__says_which_keys_were_left():
    report = WeightsReport(9, 10, ("a.w", "b.w"), (), (), "0123456789abcdef")
    assert str(report) == "9 of 10 values match; missing a.w, b.w; sha256 0123456789ab"


def test_load_weights__a_pickled_object_is_refused_unopened(tmp_path, capsys):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ModelError, match="not a file of plain weights"):
        load_weights(model(1), location(tmp_path / "w.pth"))
    torch.save({"state_dict": {"a": Trap()}}, tmp_path / "z.pth")
    with pytest.raises(ModelError, match="not a file of plain weights"):
        load_weights(model(1), location(tmp_path / "z.pth"))
    assert "unpickled" not in capsys.readouterr().out


def test_load_weights__what_is_not_there_or_holds_no_tensors_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none.safetensors: expected a weights file"):
        load_weights(model(1), location(tmp_path / "none.safetensors"))
    with pytest.raises(ModelError, match=r"expected model.safetensors or pytorch_model.bin"):
        load_weights(model(1), location(tmp_path))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="holds list, expected named tensors"):
        load_weights(model(1), location(tmp_path / "list.pt"))
