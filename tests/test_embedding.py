"""Padding and slices do not change a face, bad faces are rows, a missing GPU is an error."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.tiny import tiny_teacher
from PIL import Image

from pipeline.artifacts import save_teacher
from pipeline.embedding import Decoder, EmbedConfig, Embedder, Forward, profile, resolve_device
from pipeline.errors import ModelError, ResourceError
from pipeline.images import DECODER, Crop
from pipeline.ledger import Ledger
from pipeline.plan import Slice
from pipeline.schema import READ
from pipeline.storage import location

CROPS = {"pool": (Crop(), "gray")}


def png(seed, size=20, color=False):
    shape = (size, size, 3) if color else (size, size)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def read_table(images, reasons=None):
    n = len(images)
    columns = [
        [f"pool/x#{i}" for i in range(n)],
        list(range(n)),
        [None] * n,
        images,
        [None] * n,
        [None] * n,
        reasons or [None] * n,
        [None] * n,
    ]
    return pa.table(columns, schema=READ)


def unit_of_work(number=0, faces=None):
    return Slice(f"s{number:07d}", 0, "pool", "/x", 0, faces or 0, "print", faces)


@pytest.fixture
def teacher_at(tmp_path):
    at = location(tmp_path / "teacher")
    save_teacher(tiny_teacher(), at)
    return at


def embedder(teacher_at, tmp_path, name, **settings):
    at = location(tmp_path / name)
    return Embedder(teacher_at, at, CROPS, EmbedConfig(**{"batch": 4, **settings})), Ledger(at)


def values(table, name):
    return np.array(table.column(name).to_pylist(), dtype=np.float32)


def test_embedder__commits_unit_embeddings_and_raw_logits(teacher_at, tmp_path):
    embed, ledger = embedder(teacher_at, tmp_path, "a")
    table = embed(unit_of_work(), read_table([png(i) for i in range(6)]))
    assert table.column("status").to_pylist() == ["ok"] * 6
    np.testing.assert_allclose(np.linalg.norm(values(table, "embedding"), axis=1), 1, atol=2e-3)
    assert ledger.read("s0000000").equals(table)
    commit = ledger.find("s0000000")
    assert (commit.rows, commit.quarantined) == (6, 0)
    x = Decoder("gray", 16, 6, 1).batches(read_table([png(i) for i in range(6)]), *CROPS["pool"])
    z, logits = tiny_teacher().represent(torch.from_numpy(next(iter(x))[0]))
    np.testing.assert_allclose(values(table, "embedding"), z.numpy(), atol=1e-3)
    np.testing.assert_allclose(values(table, "logits"), logits.flatten(1).numpy(), atol=1e-5)


def test_embedder__a_repeat_gives_the_same_bytes(teacher_at, tmp_path):
    faces = read_table([png(i) for i in range(7)])
    digests = []
    for name in ("a", "b"):
        embed, ledger = embedder(teacher_at, tmp_path, name)
        embed(unit_of_work(), faces)
        digests.append(ledger.find("s0000000").sha256)
    assert digests[0] == digests[1]


def test_embedder__padding_slice_and_micro_batch_do_not_change_a_face(teacher_at, tmp_path):
    images = [png(i) for i in range(9)]
    whole, _ = embedder(teacher_at, tmp_path, "whole", batch=16)
    want = whole(unit_of_work(), read_table(images))
    cut, _ = embedder(teacher_at, tmp_path, "cut", batch=2, decode_threads=3)
    parts = [
        cut(unit_of_work(1), read_table(images[:1])),
        cut(unit_of_work(2), read_table(images[1:6])),
        cut(unit_of_work(3), read_table(images[6:])),
    ]
    for name, tolerance in (("embedding", 1e-3), ("logits", 1e-5)):
        got = np.concatenate([values(part, name) for part in parts])
        np.testing.assert_allclose(got, values(want, name), atol=tolerance)


def test_embedder__bad_faces_are_rows_in_place_and_do_not_touch_the_others(teacher_at, tmp_path):
    good = [png(i) for i in range(4)]
    images = [good[0], b"", good[1], png(9)[:40], None, good[2], good[3]]
    reasons = [None, None, None, None, "truncated", None, None]
    embed, ledger = embedder(teacher_at, tmp_path, "a")
    table = embed(unit_of_work(), read_table(images, reasons))
    status = ["ok", "quarantined", "ok", "quarantined", "quarantined", "ok", "ok"]
    assert table.column("status").to_pylist() == status
    assert table.column("reason").to_pylist()[1] == "empty"
    assert table.column("reason").to_pylist()[4] == "truncated"
    nulls = [v is None for v in table.column("embedding").to_pylist()]
    assert nulls == [s == "quarantined" for s in status]
    assert ledger.find("s0000000").quarantined == 3
    alone = embed(unit_of_work(1), read_table(good))
    kept = table.filter(pa.array([not null for null in nulls]))
    np.testing.assert_allclose(values(kept, "logits"), values(alone, "logits"), atol=1e-5)


@pytest.mark.parametrize("images", [[], [b"no image", None]])
def test_embedder__a_slice_without_a_good_face_is_a_commit(teacher_at, tmp_path, images):
    embed, ledger = embedder(teacher_at, tmp_path, "a")
    table = embed(unit_of_work(), read_table(images))
    commit = ledger.find("s0000000")
    assert (table.num_rows, commit.rows, commit.quarantined) == (len(images),) * 3


def test_embedder__who_loses_the_commit_goes_on_with_the_winner(teacher_at, tmp_path, monkeypatch):
    embed, ledger = embedder(teacher_at, tmp_path, "a")
    winner = embed(unit_of_work(), read_table([png(1)]))
    late, _ = embedder(teacher_at, tmp_path, "a")
    monkeypatch.setattr(late._ledger, "find", lambda key: None)
    monkeypatch.setattr(late._ledger, "read", ledger.read)
    assert late(unit_of_work(), read_table([png(2)])).equals(winner)
    again, _ = embedder(teacher_at, tmp_path, "a")
    assert again(unit_of_work(), read_table([b"not decoded any more"])).equals(winner)


def test_embedder__values_that_are_not_finite_end_the_run(tmp_path):
    teacher = tiny_teacher(members=1)
    teacher.members[0].net.fc.bias.data[0] = float("nan")
    save_teacher(teacher, location(tmp_path / "t"))
    embed, _ = embedder(location(tmp_path / "t"), tmp_path, "a")
    with pytest.raises(ModelError, match="teacher's logits of a good face is not finite"):
        embed(unit_of_work(), read_table([png(1)]))


def test_decoder__batches_have_one_shape_and_zeros_where_nothing_is():
    decoder = Decoder("gray", 16, 4, 2)
    images = [png(0), b"", *(png(i) for i in range(8))]
    batches = list(decoder.batches(read_table(images), *CROPS["pool"]))
    assert [pixels.shape for pixels, _ in batches] == [(4, 1, 16, 16)] * 3
    assert [len(reasons) for _, reasons in batches] == [4, 4, 2]
    assert batches[0][1] == [None, "empty", None, None]
    assert not batches[0][0][1].any()
    assert not batches[2][0][2:].any()


@pytest.mark.parametrize(
    ("model", "source", "gray"),
    [("gray", "rgb", True), ("rgb", "gray", True), ("rgb", "rgb", False)],
)
def test_decoder__gray_wins_and_fills_the_channels_of_the_model(model, source, gray):
    table = read_table([png(3, color=True)])
    pixels, _ = next(Decoder(model, 16, 1, 1).batches(table, Crop(), source))
    assert pixels.shape[1] == (1 if model == "gray" else 3)
    assert (pixels == pixels[:, :1]).all() == gray


def test_forward__bf16_stays_near_fp32():
    x = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8).numpy()
    full, _ = Forward(tiny_teacher(), EmbedConfig(dtype="fp32"))(x)
    half, logits = Forward(tiny_teacher(), EmbedConfig(dtype="bf16"))(x)
    assert logits.dtype == half.dtype == torch.float32
    assert ((full * half).sum(dim=1) > 0.999).all()


def test_forward__compiled_agrees_with_eager():
    x = np.random.default_rng(0).integers(0, 256, (4, 1, 16, 16), dtype=np.uint8)
    eager, logits = Forward(tiny_teacher(), EmbedConfig(batch=4))(x)
    fused, others = Forward(tiny_teacher(), EmbedConfig(batch=4, compile=True))(x)
    torch.testing.assert_close(fused, eager, atol=1e-5, rtol=0)
    torch.testing.assert_close(others, logits, atol=1e-4, rtol=0)


def test_embedder__streams_side_by_side_give_the_bytes_of_one(teacher_at, tmp_path):
    slices = [unit_of_work(i) for i in range(8)]
    tables = [read_table([png(10 * i + j) for j in range(5)]) for i in range(8)]
    alone, one = embedder(teacher_at, tmp_path, "one", streams=1)
    for slice, table in zip(slices, tables, strict=True):
        alone(slice, table)
    shared, many = embedder(teacher_at, tmp_path, "many", streams=4)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(shared, slices, tables))
    assert [many.find(s.key).sha256 for s in slices] == [one.find(s.key).sha256 for s in slices]


def test_resolve_device__a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(0) == torch.device("cpu")
    with pytest.raises(ResourceError, match=r"num_gpus=0.5 was asked for"):
        resolve_device(0.5)


def test_profile__names_what_changes_bits_and_nothing_else():
    base = profile(EmbedConfig())
    assert base["decoder"] == DECODER
    assert base["device"] == "cpu"
    for change in (
        {"batch": 8},
        {"dtype": "bf16"},
        {"flip": False},
        {"compile": True},
        {"threads": 2},
        {"num_gpus": 1},
    ):
        assert profile(EmbedConfig(**change)) != base, change
    for change in (
        {"decode_threads": 4},
        {"pool": (2, 4)},
        {"num_cpus": 2},
        {"streams": 4},
        {"read_in": "task"},
    ):
        assert profile(EmbedConfig(**change)) == base, change


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_forward__gpu_agrees_with_cpu():
    x = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8).numpy()
    cpu, _ = Forward(tiny_teacher(), EmbedConfig())(x)
    for dtype in ("fp32", "bf16"):
        gpu, _ = Forward(tiny_teacher(), EmbedConfig(dtype=dtype, num_gpus=1))(x)
        assert ((cpu * gpu.cpu()).sum(dim=1) > 0.999).all()
