"""Proves the precision that a worker runs in and that a lone worker adds up nothing."""

import pytest
import torch

from pipeline.training.worker import local, precision, prepare_cpu


def test_autocast__is_the_workers_precision() -> None:
    x = torch.ones(2, 2)
    with local(dtype=torch.bfloat16).autocast():
        assert (x @ x).dtype == torch.bfloat16
    with local(dtype=torch.float32).autocast():
        assert (x @ x).dtype == torch.float32


def test_all_reduce__alone_is_the_identity() -> None:
    x = torch.arange(3.0)
    assert local().all_reduce(x) is x
    local().barrier()


def test_prepare_cpu__flushes_denormals_and_sets_threads() -> None:
    before = torch.get_num_threads()
    try:
        prepare_cpu(1)
        assert torch.get_num_threads() == 1
        assert (torch.tensor([1e-39]) * 0.5).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def test_precision__follows_the_recipe_and_else_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert precision(True, "cpu") == torch.bfloat16
    assert precision(False, "cuda") == torch.float32
    assert precision(None, "cuda") == torch.bfloat16
    for able, expected in (
        ({"amx_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert precision(None, "cpu") == expected
