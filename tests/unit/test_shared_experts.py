"""Shared experts: every token goes to them, on its own rank, in slots behind the routed ones."""

from __future__ import annotations

import pytest
import torch

from megamoe import MegaMoE, MoEConfig, quantize_weights, reference, split_shared
from megamoe.config import KernelConfig, max_pool_blocks
from tests.machine import max_relative_error
from tests.nights import at_night
from tests.unit.layers import E, H, I, K, T, W, inputs, make

S = 2


def all_experts(precision: str, seed: int = 1) -> reference.Weights:
    """Routed experts, then shared ones, as the oracle numbers them."""
    rng = torch.Generator().manual_seed(seed)
    w13 = (torch.randn(E + S, 2 * I, H, generator=rng) * H**-0.5).bfloat16()
    w2 = (torch.randn(E + S, H, I, generator=rng) * I**-0.5).bfloat16()
    if precision == "bf16":
        return reference.Weights(w13, w2)
    return quantize_weights(w13, w2, precision)


def of_ranks(moe: MegaMoE, weights: reference.Weights) -> reference.Weights:
    """What the ranks hold: each its routed experts, then the shared ones."""
    return weights.of([e for rank in range(moe.num_ranks) for e in moe.config.experts_of(rank)])


def loaded(precision: str, world: int = W, **changes) -> MegaMoE:
    moe = make(precision=precision, world=world, num_shared_experts=S, **changes)
    moe.load_weights(*of_ranks(moe, all_experts(precision)))
    return moe


def check(ys, xs, ids, router, precision: str, factor: float = 1.0, clamp=None) -> None:
    for y, x, idx, weight in zip(ys, xs, ids, router, strict=True):
        slots = reference.with_shared(idx, weight.nan_to_num(), E, S, factor)
        expected = reference.moe_forward(
            x, *slots, *all_experts(precision), precision=precision, clamp=clamp
        )
        assert reference.relative_error(y, expected) <= max_relative_error(precision)


PRECISIONS = ["bf16", "fp8_block", at_night("fp8_channel"), at_night("fp8_mxfp4")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checks", [False, True])
def test_a_layer_with_shared_experts_equals_the_oracle(precision, checks):
    moe = loaded(precision, shared_weight=0.75, activation_clamp=2.0)
    moe.backend.settings = {"checks": checks, "seed": 5}
    for seed in (0, 1):
        xs, ids, router = inputs(seed=seed)
        xs[1], ids[1], router[1] = xs[1][:7], ids[1][:7], router[1][:7]
        counts = [torch.zeros(E // W, dtype=torch.int32) for _ in range(W)]
        ys = moe(xs, ids, router, expert_counts=counts)
        check(ys, xs, ids, router, precision, 0.75, 2.0)
        chosen = torch.cat([idx.flatten() for idx in ids])
        received = torch.bincount(chosen[chosen >= 0], minlength=E)
        assert torch.equal(torch.cat(counts).long(), received), "of routed experts only"


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_tokens_without_a_choice_go_to_shared_experts_alone(precision):
    moe = loaded(precision)
    xs, ids, router = inputs(seed=3)
    ids = [torch.full_like(ids[0], -1), ids[1]]
    check(moe(xs, ids, router), xs, ids, router, precision)
    empty = [xs[0][:0], xs[1]], [ids[0][:0], ids[1]], [router[0][:0], router[1]]
    check(moe(*empty), *empty, precision)


def test_a_shared_expert_may_be_split():
    """S experts of I are one of S * I columns, for the sum of their outputs."""
    gate_up, down = torch.randn(2 * S * I, H) / H**0.5, torch.randn(H, S * I)
    w13, w2 = split_shared(gate_up, down, I)
    x = torch.randn(5, H)
    parts = sum(reference.swiglu(x @ w13[s].T) @ w2[s].T for s in range(S))
    whole = reference.swiglu(x @ gate_up.T) @ down.T
    assert reference.relative_error(parts, whole) < 1e-5
    for wrong in (3 * I, 2 * S * I):
        with pytest.raises(ValueError, match=f"intermediate_size={wrong} columns"):
            split_shared(gate_up, down, wrong)
    with pytest.raises(ValueError, match="are no shared expert"):
        split_shared(gate_up[:-1], down, I)


def test_numbers_of_experts_and_slots():
    config = MoEConfig(E, K, H, I, T, W, num_shared_experts=S)
    assert (config.experts_per_rank, config.local_experts) == (E // W, E // W + S)
    assert (config.slots_per_token, config.max_slots_per_rank) == (K + S, T * (K + S))
    assert config.experts_of(1) == [4, 5, 6, 7, 8, 9]
    assert max_pool_blocks(config, KernelConfig()) == W * T * K // 128 + E // W + S


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shared_experts": -1}, "num_shared_experts=-1 must be in 0..16"),
        ({"num_shared_experts": 1.5}, "num_shared_experts=1.5 must be an integer"),
        ({"shared_weight": float("nan")}, "shared_weight=nan must be a finite float32 number"),
        ({"shared_weight": "1"}, "shared_weight='1' must be a finite float32 number"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_weights_without_the_shared_ones_are_refused():
    moe = make(num_shared_experts=S)
    given = all_experts("bf16").of(slice(E))
    with pytest.raises(ValueError, match=rf"w13 has shape .*, expected \[{E + W * S}, "):
        moe.load_weights(*given)
