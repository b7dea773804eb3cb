"""The kernel against the oracle: hard routing on 1, 2, 4 and 8 virtual ranks, poisoned memory, odd
shapes.
"""

from __future__ import annotations

import pytest
import torch

from megamoe import reference
from tests.gpu.configs import EDGE, SCALED, SHARED, SMALL
from tests.gpu.harness import (
    assert_at_rest,
    assert_correct,
    forward,
    inputs_of,
    make_moe,
    poison,
    shared_moe,
)
from tests.routing import ROUTINGS, seed_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", [*SMALL, *EDGE, *SCALED, *SHARED])
def test_forward_matches_the_oracle(name, routing):
    moe = shared_moe(name)
    poison(moe)
    inputs = inputs_of(moe, routing, seed=seed_of(name, routing))
    assert_correct(moe, forward(moe, *inputs), *inputs)
    assert_at_rest(moe)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 127, 128, 129, 255])
@pytest.mark.parametrize(
    "name",
    [*SMALL, "block4", "channel4", "mxfp44", "mxfp4_token4", "int44", "shared4", "shared_block4"],
)
def test_token_counts(name, tokens):
    moe = shared_moe(name)
    poison(moe)
    inputs = inputs_of(moe, "uniform", seed=tokens, tokens=tokens)
    assert_correct(moe, forward(moe, *inputs), *inputs)
    assert_at_rest(moe)


@pytest.mark.parametrize(
    "name",
    [
        "small1",
        "small8",
        "tiny_ring",
        "block4",
        "channel_ring",
        "mxfp4_ring",
        "mxfp4_token_ring",
        "int4_ring",
        "shared4",
        "shared_ring",
    ],
)
def test_two_runs_are_bit_identical(name):
    moe = shared_moe(name)
    inputs = inputs_of(moe, "skewed", seed=11)
    first = forward(moe, *inputs)
    for _ in range(5):
        poison(moe)
        assert all(torch.equal(a, b) for a, b in zip(first, forward(moe, *inputs), strict=True))


def test_int32_and_int64_indices_agree():
    moe = shared_moe("small2")
    xs, ids, weights = inputs_of(moe, "masked", seed=3)
    wide = forward(moe, xs, ids, weights)
    narrow = forward(moe, xs, [idx.int() for idx in ids], weights)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


@pytest.mark.parametrize(
    "name,num_sms", [("small4", 1), ("small4", 2), ("small4", 13), ("small4", 33), ("block4", 13)]
)
def test_any_number_of_sms_gives_the_same_bits(name, num_sms):
    moe = shared_moe(name)
    inputs = inputs_of(moe, "uniform", seed=5)
    expected = forward(moe, *inputs)
    few = make_moe(name, num_sms=num_sms)
    assert all(torch.equal(a, b) for a, b in zip(expected, forward(few, *inputs), strict=True))


def test_input_buffer_needs_no_copy():
    moe = shared_moe("small2")
    xs, ids, weights = inputs_of(moe, "uniform", seed=8)
    expected = forward(moe, xs, ids, weights)
    poison(moe)
    staged = [moe.input_buffer(rank)[: x.shape[0]].copy_(x) for rank, x in enumerate(xs)]
    assert all(
        torch.equal(a, b) for a, b in zip(expected, forward(moe, staged, ids, weights), strict=True)
    )


@pytest.mark.parametrize(
    "name",
    ["small1", "small4", "block4", "channel4", "mxfp44", "mxfp4_token4", "int44", "shared4"],
)
def test_received_rows_are_added_to_expert_counts(name):
    moe = shared_moe(name)
    xs, ids, weights = inputs_of(moe, "masked", seed=9)
    local = moe.config.experts_per_rank
    counts = [
        torch.full((local,), rank, dtype=torch.int32, device="cuda") for rank in range(len(xs))
    ]
    for _ in range(2):
        forward(moe, xs, ids, weights, expert_counts=counts)
    flat = torch.cat([idx.flatten() for idx in ids])
    rows = torch.bincount(flat[flat >= 0], minlength=moe.config.num_experts).view(moe.num_ranks, -1)
    for rank, count in enumerate(counts):
        assert torch.equal(count, (rank + 2 * rows[rank]).int())
    forward(moe, xs, ids, weights)  # without them nothing is written
    assert torch.equal(counts[0], (2 * rows[0]).int())


@pytest.mark.parametrize("name", ["small4", "block4", "channel1", "mxfp41"])
def test_a_clamped_activation(name):
    moe = make_moe(name, activation_clamp=0.4)
    inputs = inputs_of(moe, "uniform", seed=10)
    outputs = forward(moe, *inputs)
    assert_correct(moe, outputs, *inputs)
    free = forward(shared_moe(name), *inputs)
    assert all(reference.relative_error(a, b) > 0.1 for a, b in zip(outputs, free, strict=True))


@pytest.mark.parametrize("name", ["shared1", "shared_block4", "shared_mxfp44"])
def test_shared_experts_have_a_factor(name):
    moe = make_moe(name, shared_weight=-0.5)
    inputs = inputs_of(moe, "masked", seed=12)
    assert_correct(moe, forward(moe, *inputs), *inputs)
