"""FP8 input: what the launch quantises is what `reference.quantize` says, bit for bit, and what a
caller has quantised is taken as it is.
"""

from __future__ import annotations

import pytest
import torch

from megamoe import reference
from megamoe.backends import in_places
from tests.gpu.configs import SCALED
from tests.gpu.harness import (
    assert_at_rest,
    assert_correct,
    forward,
    inputs_of,
    poison,
    quantized,
    shared_moe,
)

pytestmark = pytest.mark.gpu


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def buffers(moe, rank: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that peers pull, and their scales."""
    return moe.input_buffer(rank)[:tokens], moe.input_scale_buffer(rank)[:tokens]


@pytest.mark.parametrize("name", SCALED)
def test_the_launch_quantises_as_the_reference_does(name):
    """Also rows of zeros, of values near the ends of bfloat16, and with one large value."""
    moe = shared_moe(name)
    xs, ids, weights = inputs_of(moe, "uniform", seed=21)
    for x in xs:
        x[0] = 0
        x[1] *= 1e37
        x[2] *= 1e-30
        x[3, 5] = 3e4
        x[4, :128] = 0
        x[5] = 448.0
    poison(moe)
    forward(moe, xs, ids, weights)
    for rank, (row, scale) in enumerate(zip(*quantized(moe, xs), strict=True)):
        stored, scales = buffers(moe, rank, len(row))
        assert bits_equal(scales, scale), rank
        packed = moe.config.recipe.weights.packed
        assert bits_equal(stored, in_places(row) if packed else row), rank
    assert_at_rest(moe)


@pytest.mark.parametrize("routing", ["uniform", "ragged"])
@pytest.mark.parametrize("name", SCALED)
def test_quantised_input_gives_the_same_bits(name, routing):
    """Copied from anywhere, or already in the buffers that peers read."""
    moe = shared_moe(name)
    xs, ids, weights = inputs_of(moe, routing, seed=22)
    expected = forward(moe, xs, ids, weights)
    assert_correct(moe, expected, xs, ids, weights)
    rows, scales = quantized(moe, xs)
    poison(moe)
    copied = forward(moe, rows, ids, weights, scales)
    assert all(torch.equal(a, b) for a, b in zip(expected, copied, strict=True))
    poison(moe)
    places = [buffers(moe, rank, len(row)) for rank, row in enumerate(rows)]
    for place, row, scale in zip(places, rows, scales, strict=True):
        place[0].copy_(row)
        place[1].copy_(scale)
    placed = forward(moe, [p[0] for p in places], ids, weights, [p[1] for p in places])
    assert all(torch.equal(a, b) for a, b in zip(expected, placed, strict=True))
    assert_at_rest(moe)


@pytest.mark.parametrize("block", [128, -1])
def test_the_reference_quantises_the_same_on_both_devices(block):
    values = torch.randn(64, 1024) * torch.logspace(-9, 9, 64).unsqueeze(1)
    here, there = reference.quantize(values, block), reference.quantize(values.cuda(), block)
    assert all(bits_equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
