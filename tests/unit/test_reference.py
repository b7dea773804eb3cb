"""The oracle against a naive loop in float64, and that each of its rounding points is there."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megamoe import reference
from megamoe.precision import PRECISIONS
from tests.routing import ROUTINGS, make_routing

H, INTERMEDIATE, EXPERTS, K, T = 24, 10, 5, 3, 11
HALF_ULP = 2.0**-9  # of bfloat16: largest relative error of one rounding


def make_case(seed, tokens=T, experts=EXPERTS, hidden=H, intermediate=INTERMEDIATE):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=rng).bfloat16()
    w13 = (torch.randn(experts, 2 * intermediate, hidden, generator=rng) / hidden**0.5).bfloat16()
    w2 = torch.randn(experts, hidden, intermediate, generator=rng) / intermediate**0.5
    return x, w13, w2.bfloat16()


def naive(x, idx, weights, w13, w2):
    """One token and one slot at a time, in float64, with scalar functions."""
    x, weights, w13, w2 = x.double(), weights.double(), w13.double(), w2.double()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(idx.shape[1]):
            expert = int(idx[t, k])
            if expert == -1:
                continue
            rows = [float(torch.dot(row, x[t])) for row in w13[expert]]
            gates, ups = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            hidden = [g / (1.0 + math.exp(-g)) * u for g, u in zip(gates, ups, strict=True)]
            y[t] += float(weights[t, k]) * (w2[expert] @ torch.tensor(hidden, dtype=torch.float64))
    return y


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("routing", ROUTINGS)
def test_exact_form_equals_the_naive_loop(routing, seed):
    x, w13, w2 = make_case(seed)
    [idx], [weights] = make_routing(routing, 1, T, K, EXPERTS, seed)
    y = reference.moe_forward(x, idx, weights, w13, w2, rounding=False)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, naive(x, idx, weights, w13, w2), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("routing", ROUTINGS)
def test_rounded_form_is_near_the_exact_one(routing, seed):
    """Three roundings of bfloat16 (hidden, slot, sum) cost a few half-ulps in norm, not more."""
    x, w13, w2 = make_case(seed, hidden=128, intermediate=64)
    [idx], [weights] = make_routing(routing, 1, T, K, EXPERTS, seed)
    y = reference.moe_forward(x, idx, weights, w13, w2)
    exact = reference.moe_forward(x, idx, weights, w13, w2, rounding=False)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    assert reference.relative_error(y, exact) <= 2 * HALF_ULP


@pytest.mark.parametrize("seed", range(5))
def test_rounding_points_are_exactly_these(seed):
    """Stage by stage: round the weighted hidden row, each slot and the sum; nothing else."""
    x, w13, w2 = make_case(seed)
    [idx], [weights] = make_routing("masked", 1, T, K, EXPERTS, seed)
    y = reference.moe_forward(x, idx, weights, w13, w2)
    expected = torch.zeros(T, H)
    for t in range(T):
        for k in range(K):
            if idx[t, k] < 0:
                continue
            expert = int(idx[t, k])
            gate, up = (w13[expert].float() @ x[t].float()).chunk(2)
            hidden = (gate * torch.sigmoid(gate) * up * weights[t, k]).bfloat16()
            expected[t] += (w2[expert].float() @ hidden.float()).bfloat16().float()
    # Only the order of float32 sums differs, which flips few roundings by one ulp.
    torch.testing.assert_close(y.float(), expected.bfloat16().float(), rtol=2**-6, atol=2**-6)
    assert (y.float() == expected.bfloat16().float()).float().mean() > 0.9


def recipe_with(monkeypatch, **fields):
    changed = dataclasses.replace(PRECISIONS["bf16"], **fields)
    monkeypatch.setitem(PRECISIONS, "bf16", changed)


@pytest.mark.parametrize("stage", ["hidden", "slot", "sum order", "weight after FC2"])
def test_each_rounding_point_matters(monkeypatch, stage):
    """Take one rounding point away, or move it, and the result differs."""
    x, w13, w2 = make_case(1, tokens=64, hidden=64, intermediate=64)
    [idx], [weights] = make_routing("uniform", 1, 64, 4, EXPERTS, 1)
    args = (x, idx, weights, w13, w2)
    y = reference.moe_forward(*args)
    if stage == "hidden":
        recipe_with(monkeypatch, token="float32")
    elif stage == "slot":
        recipe_with(monkeypatch, output="float32")
    elif stage == "sum order":
        original = reference.combine
        monkeypatch.setattr(reference, "combine", lambda s, i, a: original(s, i, torch.bfloat16))
    else:
        rows = reference.expert_rows

        def weight_last(values, router_R, *rest):
            out = rows(values, torch.ones_like(router_R), *rest)
            return (out * router_R[:, None]).to(out.dtype)

        monkeypatch.setattr(reference, "expert_rows", weight_last)
    other = reference.moe_forward(*args).to(torch.bfloat16)
    assert not torch.equal(other, y)
    assert reference.relative_error(other, y) < 4 * HALF_ULP


@pytest.mark.parametrize("rounding", [True, False])
def test_zero_tokens(rounding):
    x, w13, w2 = make_case(0, tokens=0)
    idx, weights = torch.empty(0, K, dtype=torch.int64), torch.empty(0, K)
    y = reference.moe_forward(x, idx, weights, w13, w2, rounding=rounding)
    assert y.shape == (0, H)
    assert y.dtype == (torch.bfloat16 if rounding else torch.float64)


def test_masked_token_is_zero_and_masked_weight_is_not_read():
    x, w13, w2 = make_case(2)
    [idx], [weights] = make_routing("masked", 1, T, K, EXPERTS, 2)
    assert weights[idx < 0].isnan().all() and (idx < 0).any()
    y = reference.moe_forward(x, idx, weights, w13, w2)
    assert y.isfinite().all()
    assert (y[(idx < 0).all(dim=1)] == 0).all()


def test_masking_a_slot_equals_removing_it():
    x, w13, w2 = make_case(3)
    [idx], [weights] = make_routing("uniform", 1, T, K, EXPERTS, 3)
    masked = idx.clone()
    masked[:, 1] = -1
    y = reference.moe_forward(x, masked, weights, w13, w2)
    keep = [0, 2]
    assert torch.equal(y, reference.moe_forward(x, idx[:, keep], weights[:, keep], w13, w2))
    assert not torch.equal(y, reference.moe_forward(x, idx, weights, w13, w2))


def test_expert_named_in_two_slots_counts_twice():
    x, w13, w2 = make_case(4)
    idx = torch.full((T, 2), 3)
    weights = torch.rand(T, 2) + 0.1
    twice = reference.moe_forward(x, idx, weights, w13, w2, rounding=False)
    once = reference.moe_forward(x, idx[:, :1], weights.sum(1, True), w13, w2, rounding=False)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-9)


def test_unused_experts_are_not_read():
    x, w13, w2 = make_case(5)
    [idx], [weights] = make_routing("all_to_one_expert", 1, T, K, EXPERTS, 5)
    w13[: EXPERTS - 1] = float("nan")
    w2[: EXPERTS - 1] = float("nan")
    assert reference.moe_forward(x, idx, weights, w13, w2).isfinite().all()


def test_token_order_does_not_matter():
    x, w13, w2 = make_case(6)
    [idx], [weights] = make_routing("skewed", 1, T, K, EXPERTS, 6)
    y = reference.moe_forward(x, idx, weights, w13, w2, rounding=False)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    shuffled = reference.moe_forward(x[order], idx[order], weights[order], w13, w2, rounding=False)
    torch.testing.assert_close(shuffled, y[order], rtol=1e-12, atol=1e-12)


# --- stages


def test_swiglu_takes_gate_first():
    gate_up = torch.tensor([[0.0, 1.0, -2.0, 5.0, 7.0, 3.0]], dtype=torch.float64)
    silu = [g / (1 + math.exp(-g)) for g in (0.0, 1.0, -2.0)]
    expected = torch.tensor([[silu[0] * 5, silu[1] * 7, silu[2] * 3]], dtype=torch.float64)
    torch.testing.assert_close(reference.swiglu(gate_up), expected, rtol=1e-14, atol=0)


def test_products_contract_the_last_dimension():
    x, w13 = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    assert torch.equal(reference.product(x, w13), torch.einsum("th,ih->ti", x, w13))


def test_combine_adds_in_slot_order_in_float32():
    """1 + 2^-24 + 2^-24 is 1 in this order and more than 1 from the other end."""
    slots = torch.tensor([1.0, 2.0**-24, 2.0**-24]).view(1, 3, 1)
    idx = torch.tensor([[0, 1, 2]])
    assert reference.combine(slots, idx).item() == 1.0
    assert reference.combine(slots.flip(1), idx).item() == 1.0 + 2.0**-23
    assert reference.combine(slots, idx, torch.float64).item() == 1.0 + 2.0**-23


def test_combine_does_not_read_masked_slots():
    slots = torch.full((2, 3, 4), float("nan"))
    slots[:, 1] = 2.0
    idx = torch.tensor([[-1, 0, -1], [-1, 5, -1]])
    assert torch.equal(reference.combine(slots, idx), torch.full((2, 4), 2.0))


def test_unknown_precision():
    x, w13, w2 = make_case(0)
    [idx], [weights] = make_routing("uniform", 1, T, K, EXPERTS)
    with pytest.raises(ValueError, match="precision='fp3'"):
        reference.moe_forward(x, idx, weights, w13, w2, precision="fp3")


# --- relative_error


def test_relative_error():
    a = torch.tensor([3.0, 4.0])
    assert reference.relative_error(a, a) == 0.0
    assert reference.relative_error(a * 1.5, a) == pytest.approx(0.5)
    assert reference.relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert reference.relative_error(torch.empty(0), torch.empty(0)) == 0.0
    assert reference.relative_error(a, torch.zeros(2)) == math.inf


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_relative_error_of_a_bad_value_is_infinite(bad):
    """A NaN must fail a comparison against a bound, whichever way it is written."""
    out = torch.tensor([1.0, bad])
    assert reference.relative_error(out, torch.ones(2)) == math.inf
