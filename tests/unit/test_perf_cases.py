"""Models, inputs and weights of the measurements."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamoe import quantize_weights, reference
from megamoe.precision import PRECISIONS
from perf.workload.cases import MODELS, Case, make_inputs, make_weights
from perf.workload.stored import make_layer_weights

EMULATED = MODELS["emulated"]


def case_of(tokens: int = 300, ranks: int = 4, **model) -> Case:
    return Case(dataclasses.replace(EMULATED, **model), ranks, tokens)


@pytest.mark.parametrize(
    ("name", "shape"),
    {
        "pro": (7168, 3072, 384, 6),
        "flash": (4096, 2048, 256, 6),
        "v3": (7168, 2048, 256, 8),
        "mimo": (6144, 2048, 384, 8),
        "qwen3": (4096, 1536, 128, 8),
    }.items(),
)
def test_published_shapes(name, shape):
    model = MODELS[name]
    assert (model.hidden, model.intermediate, model.num_experts, model.top_k) == shape


def test_inputs_repeat_for_a_seed_and_differ_between_ranks_seeds_and_token_counts():
    case = case_of(tokens=8)
    first, second = make_inputs(case), make_inputs(case)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[1].topk_idx, second[1].topk_idx)
    assert not torch.equal(first[0].x, first[1].x)
    assert not torch.equal(first[0].topk_idx, first[1].topk_idx)
    other = make_inputs(dataclasses.replace(case, seed=1))
    assert not torch.equal(first[0].x, other[0].x)
    assert not torch.equal(first[0].x, make_inputs(case.with_tokens(16))[0].x[:8])


def test_router_weights_are_positive_and_sum_to_one():
    weights = make_inputs(case_of())[0].topk_weights
    assert weights.dtype == torch.float32 and (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(weights.shape[0]))


def test_activations_stay_of_order_one():
    case = case_of(ranks=1, tokens=64)
    w13, w2 = make_weights(case)
    assert w13.dtype == w2.dtype == torch.bfloat16
    assert w13.shape == (32, 512, 256) and w2.shape == (32, 256, 256)
    inputs = make_inputs(case)[0]
    gate_up = reference.product(inputs.x.float(), w13[0].float())
    assert 0.9 < gate_up.std() < 1.1
    out = reference.moe_forward(inputs.x, inputs.topk_idx, inputs.topk_weights, w13, w2)
    assert 0.1 < out.float().std() < 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_layer_gets_the_same_draws_in_every_precision(precision):
    case = dataclasses.replace(case_of(tokens=4), precision=precision)
    experts, drawn = range(3, 6), make_weights(case, experts=range(3, 6))
    expected = drawn if precision == "bf16" else quantize_weights(*drawn, precision)
    made = make_layer_weights(case, experts=experts)
    for one, other in zip(made[: len(expected)], expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert make_inputs(case)[0].x.dtype == torch.bfloat16


def test_impossible_cases_are_refused():
    with pytest.raises(ValueError, match="top_k=4 is more than num_experts=2"):
        case_of(num_experts=2)
    with pytest.raises(ValueError, match="ranks_per_gpu=3"):
        Case(EMULATED, 4, 1, ranks_per_gpu=3)
