"""The weight layout of the kernel, and refusals of weights that do not fit."""

from __future__ import annotations

import pytest
import torch

from megamoe.config import MoEConfig
from megamoe.weights import INTERLEAVE, check_tensor, check_weights, interleave_gate_up

CPU = torch.device("cpu")
CONFIG = MoEConfig(8, 2, 384, 128, 16, num_ranks=2)


@pytest.mark.parametrize("hidden", [1, 3, 16])
@pytest.mark.parametrize("intermediate", [8, 16, 128, 384])
@pytest.mark.parametrize("experts", [1, 3])
def test_interleave_row_formula(experts, intermediate, hidden):
    """Row 16 i + r is gate row 8 i + r for r < 8, and up row 8 i + r - 8 above."""
    w13 = torch.arange(experts * 2 * intermediate * hidden).view(experts, 2 * intermediate, hidden)
    out = interleave_gate_up(w13)
    gate, up = w13[:, :intermediate], w13[:, intermediate:]
    assert out.shape == w13.shape and out.is_contiguous()
    for row in range(2 * intermediate):
        i, r = divmod(row, 2 * INTERLEAVE)
        half = gate if r < INTERLEAVE else up
        expected = half[:, INTERLEAVE * i + r % INTERLEAVE]
        assert torch.equal(out[:, row], expected)


def test_interleave_is_a_permutation_into_new_memory():
    w13 = torch.randn(2, 256, 4)
    out = interleave_gate_up(w13)
    assert {tuple(row.tolist()) for row in out[0]} == {tuple(row.tolist()) for row in w13[0]}
    kept = w13.clone()
    out.zero_()
    assert torch.equal(w13, kept)


def test_interleaved_product_keeps_the_pairs_eight_apart():
    """The FC1 epilogue relies on it: column 16 i + r + 8 is the up of the gate in 16 i + r."""
    w13 = torch.randn(1, 64, 5, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    gate, up = (x @ w13[0].T).chunk(2, dim=1)
    product = (x @ interleave_gate_up(w13)[0].T).view(3, -1, 2, INTERLEAVE)
    torch.testing.assert_close(product[:, :, 0].reshape(3, -1), gate)
    torch.testing.assert_close(product[:, :, 1].reshape(3, -1), up)


def weights(experts=4, hidden=384, intermediate=128, dtype=torch.bfloat16):
    w13 = torch.zeros(experts, 2 * intermediate, hidden, dtype=dtype)
    return w13, torch.zeros(experts, hidden, intermediate, dtype=dtype)


def test_good_weights_pass():
    check_weights(CONFIG, 4, CPU, *weights())


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
        check_weights(CONFIG, 4, CPU, *tensors)
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
