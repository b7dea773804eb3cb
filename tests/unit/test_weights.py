"""Quantised weights, the layout of their scales, and refusals of weights that do not fit."""

from __future__ import annotations

import pytest
import torch

from megamoe.config import MoEConfig
from megamoe.reference import Weights
from megamoe.weights import check_tensor, check_weights

CPU = torch.device("cpu")
CONFIG = MoEConfig(8, 2, 384, 128, 16, num_ranks=2)


def weights(experts=4, hidden=384, intermediate=128, dtype=torch.bfloat16):
    w13 = torch.zeros(experts, 2 * intermediate, hidden, dtype=dtype)
    return w13, torch.zeros(experts, hidden, intermediate, dtype=dtype)


def test_good_weights_pass():
    check_weights(CONFIG, 4, CPU, Weights(*weights()))


@pytest.mark.parametrize(
    "tensors,words",
    [
        (weights(experts=8), ["w13", "[8, 256, 384]", "[4, 256, 384]"]),
        (weights(hidden=128), ["w13", "[4, 256, 128]"]),
        (weights(dtype=torch.float32), ["w13", "float32", "bfloat16"]),
        ((weights()[0], weights()[1].float()), ["w2", "float32", "bfloat16"]),
        ((weights()[0], weights()[1].mT), ["w2", "[4, 128, 384]", "[4, 384, 128]"]),
        ((weights()[0], weights()[1][:3]), ["w2", "[3, 384, 128]"]),
        ((None, weights()[1]), ["w13", "NoneType"]),
        ((weights()[0], [1.0]), ["w2", "list"]),
    ],
)
def test_bad_weights_are_named(tensors, words):
    with pytest.raises(ValueError) as error:
        check_weights(CONFIG, 4, CPU, Weights(*tensors))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "tensor,words",
    [
        (torch.zeros(2, 3, dtype=torch.int32), ["int32", "int64"]),
        (torch.zeros(3, 2, dtype=torch.int64), ["[3, 2]", "[2, 3]"]),
        (torch.zeros(6, dtype=torch.int64), ["[6]", "[2, 3]"]),
        (torch.zeros(3, 2, dtype=torch.int64).T, ["[1, 2]", "contiguous"]),
        (torch.zeros(2, 6, dtype=torch.int64)[:, ::2], ["[6, 2]", "contiguous"]),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), ["meta", "cpu"]),
        ([[0, 0, 0], [0, 0, 0]], ["list"]),
    ],
)
def test_bad_tensor_is_named(tensor, words):
    with pytest.raises(ValueError) as error:
        check_tensor("topk_idx", tensor, (2, 3), torch.int64, CPU)
    for word in ["topk_idx", *words]:
        assert word in str(error.value)


def test_good_tensor_passes():
    check_tensor("topk_idx", torch.zeros(2, 3, dtype=torch.int64), (2, 3), torch.int64, CPU)
    check_tensor("x", torch.zeros(0, 3), (0, 3), torch.float32, CPU)
