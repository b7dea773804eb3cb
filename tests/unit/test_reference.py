"""The oracle against a naive loop in float64, and that each of its rounding points is there."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from megamoe import quantize_weights, reference
from megamoe.precision import FP8_BLOCK, FP8_MIN_AMAX, PRECISIONS, WHOLE_ROW, Operand, e4m3
from tests.routing import ROUTINGS, make_routing

H, INTERMEDIATE, EXPERTS, K, T = 24, 10, 5, 3, 11
FP8_SIZES = {"hidden": 384, "intermediate": 256}
FP8_RECIPES = [name for name, recipe in PRECISIONS.items() if recipe.tokens.has_scales]
FLOAT32 = Operand("float32", 32, "float32")
HALF_ULP = 2.0**-9  # of bfloat16: largest relative error of one rounding
pytestmark = pytest.mark.usefixtures("one_thread")
#: What storing the hidden rows in e4m3 may cost in norm: three bits of mantissa.
FP8_ERROR = 0.032


def make_case(seed, tokens=T, experts=EXPERTS, hidden=H, intermediate=INTERMEDIATE):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=rng).bfloat16()
    w13 = (torch.randn(experts, 2 * intermediate, hidden, generator=rng) / hidden**0.5).bfloat16()
    w2 = torch.randn(experts, hidden, intermediate, generator=rng) / intermediate**0.5
    return x, w13, w2.bfloat16()


def case_of(precision, seed, **sizes):
    """(x, weights) of a recipe."""
    if precision == "bf16":
        x, *weights = make_case(seed, **sizes)
        return x, reference.Weights(*weights)
    x, w13, w2 = make_case(seed, **(FP8_SIZES | sizes))
    return x, quantize_weights(w13, w2, precision)


def spread(scale, channels, columns):
    """Scales of one matrix, one for every weight: [channels, columns] float64."""
    scale = scale.reshape(scale.shape[0], -1).double()
    scale = scale.repeat_interleave(channels // scale.shape[0], 0)
    return scale.repeat_interleave(columns // scale.shape[1], 1)


def naive_e2m1(codes, exponents):
    """Two codes a byte, the first in the low nibble, with 2 ** (exponent - 127) per 32."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
    values = magnitudes[codes & 7] * (1 - 2.0 * (codes >> 3))
    return values * 2.0 ** (exponents.double() - 127).repeat_interleave(32, 1)


def naive_int4(codes, scales):
    """Two codes a byte, the first in the low nibble, two's complement; a scale per 128."""
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).double()
    values = codes - 16.0 * (codes >= 8)
    return values * scales.double().repeat_interleave(128, 1)


@functools.lru_cache(maxsize=64)
def naive_weights(weights, expert):
    """(w13, w2) of one expert, dequantised, in float64."""
    w13, w2 = weights.w13[expert].double(), weights.w2[expert].double()
    if weights.w13_scale is None:
        return w13, w2
    scales = weights.w13_scale[expert], weights.w2_scale[expert]
    if weights.w13.dtype == torch.uint8:  # packed
        values_of = naive_e2m1 if scales[0].dtype == torch.uint8 else naive_int4
        return values_of(weights.w13[expert], scales[0]), values_of(weights.w2[expert], scales[1])
    return w13 * spread(scales[0], *w13.shape), w2 * spread(scales[1], *w2.shape)


def naive(x, idx, router, weights, clamp=math.inf):
    """One token and one slot at a time, in float64, with scalar functions."""
    x, router = x.double(), router.double()
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(idx.shape[1]):
            if idx[t, k] == -1:
                continue
            w13, w2 = naive_weights(weights, int(idx[t, k]))
            gates, ups = (half.tolist() for half in (w13 @ x[t]).chunk(2))
            gates, ups = [min(g, clamp) for g in gates], [max(-clamp, min(u, clamp)) for u in ups]
            hidden = [g / (1.0 + math.exp(-g)) * u for g, u in zip(gates, ups, strict=True)]
            y[t] += float(router[t, k]) * (w2 @ torch.tensor(hidden, dtype=torch.float64))
    return y


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_exact_form_equals_the_naive_loop(precision, routing, seed):
    """On tokens and weights as they are stored."""
    x, weights = case_of(precision, seed)
    [idx], [router] = make_routing(routing, 1, T, K, EXPERTS, seed)
    y = reference.moe_forward(x, idx, router, *weights, precision=precision, rounding=False)
    assert y.dtype == torch.float64
    if precision != "bf16":
        block = PRECISIONS[precision].tokens.scale_columns
        x = reference.dequantize(*reference.quantize(x, block))
    expected = naive(x, idx, router, weights)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("precision", FP8_RECIPES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_rounded_form_of_a_scaled_recipe_is_near_the_exact_one(precision, routing):
    x, weights = case_of(precision, 1)
    [idx], [router] = make_routing(routing, 1, T, K, EXPERTS, 1)
    arguments = (x, idx, router, *weights)
    y = reference.moe_forward(*arguments, precision=precision)
    exact = reference.moe_forward(*arguments, precision=precision, rounding=False)
    finer = reference.moe_forward(*arguments, precision=precision, compute=torch.float64)
    assert y.dtype == finer.dtype == torch.bfloat16
    assert reference.relative_error(y, exact) <= FP8_ERROR
    # Other sums move an e4m3 code here and there, and no more.
    assert reference.relative_error(y, finer) <= FP8_ERROR / 8


@pytest.mark.parametrize("precision", FP8_RECIPES)
@pytest.mark.parametrize("stage", ["input", "hidden", "hidden block", "slot"])
def test_each_rounding_point_of_a_scaled_recipe_matters(monkeypatch, precision, stage):
    x, weights = case_of(precision, 3, tokens=32)
    [idx], [router] = make_routing("uniform", 1, 32, K, EXPERTS, 3)
    arguments = (x, idx, router, *weights)
    y = reference.moe_forward(*arguments, precision=precision)
    changes = {
        "input": {"tokens": FLOAT32},
        "hidden": {"hidden": FLOAT32},
        "hidden block": {"hidden": e4m3(1, WHOLE_ROW)},
        "slot": {"output": "float32"},
    }
    changed = dataclasses.replace(PRECISIONS[precision], **changes[stage])
    monkeypatch.setitem(PRECISIONS, precision, changed)
    other = reference.moe_forward(*arguments, precision=precision)
    error = reference.relative_error(other, y)
    assert (HALF_ULP / 8 if stage == "slot" else 2 * HALF_ULP) < error < 2.5 * FP8_ERROR


# --- quantisation

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


def nearest_e4m3(value):
    """Round to nearest, ties to the even code, saturating; from the table of finite values."""
    distance = np.abs(E4M3 - min(abs(float(value)), 448.0))
    near = np.flatnonzero(distance == distance.min())
    code = near[0] if len(near) == 1 else next(code for code in near if code % 2 == 0)
    return math.copysign(E4M3[code], value)


def naive_quantize(values, block):
    """(stored, scales) of one row, number by number in float32."""
    stored, scales = [], []
    for start in range(0, len(values), block):
        part = values[start : start + block].astype(np.float32)
        amax = max(np.abs(part).max(), np.float32(FP8_MIN_AMAX))
        scale = np.float32(amax / np.float32(448))
        inverse = np.float32(np.float32(1) / scale)
        stored += [nearest_e4m3(np.float32(value * inverse)) for value in part]
        scales.append(scale)
    return np.array(stored), np.array(scales)


def dequantized(row, block):
    """A row in float64 after it was stored, by the loop above."""
    stored, scales = naive_quantize(row.double().numpy(), block)
    return torch.from_numpy(stored) * torch.from_numpy(scales).double().repeat_interleave(block)


@pytest.mark.parametrize("block", [FP8_BLOCK, WHOLE_ROW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize_number_by_number(block, dtype):
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(9, 384, generator=rng)
    values *= torch.logspace(-8, 6, 9).unsqueeze(1)
    values[0, :128] = 0.0
    values[1, 200] = 3e38
    values[2] = -448.0
    values[3, 128:256] = 1e-12
    values = values.to(dtype)
    stored, scale = reference.quantize(values, block)
    width = 384 if block == WHOLE_ROW else block
    assert stored.dtype == torch.float8_e4m3fn and stored.shape == (9, 384)
    assert scale.dtype == torch.float32 and scale.shape == (9, 384 // width)
    for row in range(9):
        expected = naive_quantize(values[row].float().numpy(), width)
        assert np.array_equal(stored[row].double().numpy(), expected[0]), row
        assert np.array_equal(scale[row].numpy(), expected[1]), row
    assert torch.equal(
        reference.dequantize(stored, scale),
        stored.double() * scale.double().repeat_interleave(width, 1),
    )


def test_values_are_multiplied_by_the_rounded_inverse_of_the_scale():
    """5.46875 / 7 lies between two codes and goes to the even one, below; times 1 / 7 it is above
    the middle.
    """
    values = torch.zeros(1, 128)
    values[0, 0], values[0, 1] = 448 * 7, 5.46875
    stored, scale = reference.quantize(values)
    assert scale.item() == 7.0
    assert torch.tensor(5.46875 / 7).to(torch.float8_e4m3fn).float() == 0.75
    assert stored[0, 1].float() == 0.8125


def test_the_largest_value_of_a_block_is_stored_as_the_largest_number():
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    stored, _ = reference.quantize(values)
    assert (stored.float().view(64, 8, 128).abs().amax(-1) == 448.0).all()
    assert stored.float().isfinite().all()


def test_no_rows_are_quantised_to_no_rows():
    stored, scale = reference.quantize(torch.empty(0, 256))
    assert stored.shape == (0, 256) and scale.shape == (0, 2)


@pytest.mark.parametrize("precision", FP8_RECIPES)
def test_quantised_input_gives_the_same_bits(precision):
    x, weights = case_of(precision, 4)
    [idx], [router] = make_routing("uniform", 1, T, K, EXPERTS, 4)
    stored, scale = reference.quantize(x, PRECISIONS[precision].tokens.scale_columns)
    y = reference.moe_forward(x, idx, router, *weights, precision=precision)
    again = reference.moe_forward(stored, idx, router, *weights, precision=precision, x_scale=scale)
    assert torch.equal(y, again)


def test_products_with_scales():
    """A scale per block of columns, one per row, and both together."""
    rng = torch.Generator().manual_seed(5)
    x, w = (torch.randn(rows, 6, generator=rng).double() for rows in (3, 4))
    by_block, of_row = torch.rand(3, 2, generator=rng).double(), torch.rand(3, 1).double()
    channel = torch.rand(4, 1, generator=rng).double()
    spread_x = x * by_block.repeat_interleave(3, 1)
    torch.testing.assert_close(reference.product(x, w, by_block), spread_x @ w.T)
    torch.testing.assert_close(
        reference.product(x, w, by_block, channel), spread_x @ (w * channel).T
    )
    torch.testing.assert_close(
        reference.product(x, w, of_row, channel), (x * of_row) @ (w * channel).T
    )


@pytest.mark.parametrize("blocks", [(2, 4), (4, 2), (3, 2), (1, 6), (6, 1), (4, 4)])
def test_products_with_unequal_blocks(blocks):
    """Rows and weights may have their scales per different numbers of columns."""
    rng = torch.Generator().manual_seed(6)
    x, w = (torch.randn(rows, 12, generator=rng).double() for rows in (3, 5))
    of_x, of_w = torch.rand(3, blocks[0], generator=rng), torch.rand(5, blocks[1], generator=rng)
    wide_x, wide_w = (
        scale.double().repeat_interleave(12 // scale.shape[1], 1) for scale in (of_x, of_w)
    )
    got = reference.product(x, w, of_x.double(), of_w.double())
    torch.testing.assert_close(got, (x * wide_x) @ (w * wide_w).T)


@pytest.mark.parametrize("blocks", [(5, 1), (1, 5), (4, 8)])
def test_products_with_blocks_that_do_not_divide_the_columns_are_refused(blocks):
    x, w = torch.ones(3, 12), torch.ones(5, 12)
    with pytest.raises(ValueError, match="12 columns"):
        reference.product(x, w, torch.ones(3, blocks[0]), torch.ones(5, blocks[1]))


# --- clamp


@pytest.mark.parametrize("precision", PRECISIONS)
def test_clamp_of_the_activation(precision):
    x, w13, w2 = make_case(6, **FP8_SIZES)
    weights = reference.Weights(w13, w2)
    if PRECISIONS[precision].tokens.has_scales:
        weights = quantize_weights(w13, w2, precision)
        columns = PRECISIONS[precision].tokens.scale_columns
        x = reference.dequantize(*reference.quantize(x, columns)).float()
    [idx], [router] = make_routing("uniform", 1, T, K, EXPERTS, 6)
    arguments = (x, idx, router, *weights)
    options = {"precision": precision, "rounding": False}
    y = reference.moe_forward(*arguments, **options, clamp=0.75)
    expected = naive(x, idx, router, weights, clamp=0.75)
    assert reference.relative_error(y, expected) < 1e-6  # dequantised x is quantised again
    assert reference.relative_error(reference.moe_forward(*arguments, **options), expected) > 0.05


def test_clamp_bounds_gate_from_above_and_up_from_both_sides():
    gate_up = torch.tensor([[-9.0, 9.0, 1.0, 2.0, 9.0, -9.0]], dtype=torch.float64)
    same = torch.tensor([[-9.0, 3.0, 1.0, 2.0, 3.0, -3.0]], dtype=torch.float64)
    assert torch.equal(reference.swiglu(gate_up, 3.0), reference.swiglu(same))
    assert torch.equal(reference.swiglu(gate_up, math.inf), reference.swiglu(gate_up))


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


def stored(row, precision, hidden=False):
    """A row in float64 as the recipe stores it: a token, or a weighted hidden row."""
    if precision == "bf16":
        return row.bfloat16().double()
    recipe = PRECISIONS[precision]
    columns = (recipe.hidden if hidden else recipe.tokens).scale_columns
    return dequantized(row, len(row) if columns == WHOLE_ROW else columns)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_points_are_exactly_these(precision, seed):
    """Round the input row, the weighted hidden row, each slot and the sum; nothing else."""
    x, weights = case_of(precision, seed)
    [idx], [router] = make_routing("masked", 1, T, K, EXPERTS, seed)
    y = reference.moe_forward(x, idx, router, *weights, precision=precision, compute=torch.float64)
    expected = torch.zeros(x.shape)
    for t in range(T):
        row = stored(x[t], precision)
        for k in range(K):
            if idx[t, k] < 0:
                continue
            w13, w2 = naive_weights(weights, int(idx[t, k]))
            gate, up = (w13 @ row).chunk(2)
            hidden = gate * torch.sigmoid(gate) * up * router[t, k].double()
            expected[t] += (w2 @ stored(hidden, precision, hidden=True)).bfloat16().float()
    assert reference.relative_error(y, expected.bfloat16()) < HALF_ULP / 2
    assert (y == expected.bfloat16()).float().mean() > 0.98


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
        recipe_with(monkeypatch, hidden=FLOAT32)
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


@pytest.mark.parametrize("expert", [-2, EXPERTS, 2**40])
def test_an_expert_that_is_not_there_is_named(expert):
    x, w13, w2 = make_case(0)
    [idx], [weights] = make_routing("masked", 1, T, K, EXPERTS)
    idx[4, 1] = expert
    with pytest.raises(ValueError, match=rf"topk_idx holds {expert}, expected -1..{EXPERTS - 1}"):
        reference.moe_forward(x, idx, weights, w13, w2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_autocast_changes_no_bit(precision, dtype):
    x, w13, w2 = make_case(0, **FP8_SIZES)
    given = (w13, w2) if precision == "bf16" else quantize_weights(w13, w2, precision)
    [idx], [weights] = make_routing("masked", 1, T, K, EXPERTS)
    y = reference.moe_forward(x, idx, weights, *given, precision=precision)
    with torch.autocast("cpu", dtype):
        again = reference.moe_forward(x, idx, weights, *given, precision=precision)
    assert torch.equal(again, y)


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


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 1), (2, 4)])
def test_relative_error_of_other_shapes_is_refused(shape):
    with pytest.raises(ValueError, match=r"out has shape .*, expected \[1, 4\]"):
        reference.relative_error(torch.zeros(shape), torch.ones(1, 4))
