"""Experts of checkpoints on a GPU: the bits that a CPU has, and how much memory that takes."""

from __future__ import annotations

import pytest
import torch

from megamoe.checkpoint import Checkpoint
from tests.unit.checkpoints import (
    FORMATS,
    LAYER,
    H,
    Holder,
    I,
    filled,
    fused,
    same,
    tensors_of,
    write,
)

pytest.importorskip("safetensors")
pytestmark = pytest.mark.gpu

PAIRS = [
    *((name, form.precision) for name, form in FORMATS.items()),
    *(("qwen3_moe", name) for name in ("fp8_block", "fp8_channel", "fp8_mxfp4", "fp8_int4")),
    ("deepseek_v4", "fp8_mxfp4_token"),
    ("deepseek_v4", "fp8_block"),
]


@pytest.mark.parametrize("name,precision", PAIRS)
def test_a_gpu_holds_what_a_cpu_holds(tmp_path, cuda, name, precision):
    path = write(tmp_path, tensors_of(FORMATS[name]), shards=2)
    held, loads = [], []
    for device in ("cpu", cuda):
        moe = Holder(precision, device=device)
        loads.append(Checkpoint(path).load(moe, LAYER))
        held.append([(n, tensor.cpu()) for n, tensor in moe.kernel_tensors()])
    assert loads[0] == loads[1]
    for (n, tensor), (_, other) in zip(*held, strict=True):
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), n


def test_tensors_of_all_experts(tmp_path, cuda):
    given = filled("fp8_block")
    moe = Holder("fp8_block", device=cuda)
    Checkpoint(write(tmp_path, fused(given))).load(moe, LAYER)
    assert same(moe._held().__class__._make(t.cpu() for t in moe._held()), given)


@pytest.mark.parametrize("name,precision", PAIRS)
def test_beside_the_weights_one_expert_is_on_the_gpu(tmp_path, cuda, name, precision):
    """Of 32: conversions have it in float32, with their intermediate values."""
    experts = 32
    path = write(tmp_path, tensors_of(FORMATS[name], experts=experts))
    moe = Holder(precision, experts=experts, device=cuda)
    Checkpoint(path).load(moe, LAYER)
    places = [tensor.data_ptr() for _, tensor in moe.kernel_tensors()]
    before = torch.cuda.memory_allocated(cuda)
    torch.cuda.reset_peak_memory_stats(cuda)
    Checkpoint(path).load(moe, LAYER)
    one = 3 * H * I * 4
    assert torch.cuda.max_memory_allocated(cuda) - before <= 6 * one
    assert [tensor.data_ptr() for _, tensor in moe.kernel_tensors()] == places
