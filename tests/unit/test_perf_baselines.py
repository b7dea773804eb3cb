"""The torch baseline computes the layer that the oracle computes; timing keeps what it timed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megamoe import reference
from megamoe.faults import MegaMoEError
from megamoe.precision import PRECISIONS
from perf.against import experts
from perf.against.baselines import BASELINES, TorchBf16, TorchFp8
from perf.against.experts import BLOCKED, GROUPED, MAX_FP8_ERROR
from perf.running import contenders as contenders_module
from perf.running.contenders import baseline_contenders
from perf.running.expected import expected_of
from perf.running.jobs import ALONE
from perf.running.layer import layer_bound
from perf.running.timing import EAGER, GRAPH, Times, measure
from perf.workload.cases import MODELS, Case, Inputs, make_inputs, make_weights
from perf.workload.routings import ROUTINGS
from perf.workload.stored import make_layer_weights
from tests.nights import built

#: A few bf16 roundings (2^-9 each) of independent signs.
BOUND = 8e-3


def case_of(routing: str = "balanced", tokens: int = 37) -> Case:
    return Case(MODELS["emulated"], num_ranks=1, tokens=tokens, routing=routing)


def both(case: Case, inputs: Inputs, masked: bool, baseline=TorchBf16):
    w13, w2 = make_weights(case)
    expected = reference.moe_forward(inputs.x, inputs.topk_idx, inputs.topk_weights, w13, w2)
    layer = baseline(w13, w2, masked=masked)
    return layer(inputs.x, inputs.topk_idx, inputs.topk_weights), expected


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 37])
def test_equals_the_oracle(routing, tokens):
    case = case_of(routing, tokens)
    out, expected = both(case, make_inputs(case)[0], masked=routing == "masked")
    assert out.shape == expected.shape and out.dtype == torch.bfloat16
    assert reference.relative_error(out, expected) < BOUND


def test_masks_and_no_masks_agree_where_nothing_is_masked():
    case = case_of()
    inputs = make_inputs(case)[0]
    with_masks, without = (both(case, inputs, masked)[0] for masked in (True, False))
    assert torch.equal(with_masks, without)


def test_all_masked_is_zero():
    case = case_of()
    inputs = make_inputs(case)[0]
    inputs = dataclasses.replace(inputs, topk_idx=torch.full_like(inputs.topk_idx, -1))
    out, expected = both(case, inputs, masked=True)
    assert torch.equal(out, expected) and not out.any()


def test_rows_of_no_expert_are_never_read(monkeypatch):
    """The grouped GEMM leaves the rows of masked slots unwritten; here they hold NaN."""
    grouped_mm = torch._grouped_mm

    def poisoned(rows, weights, offs):
        out = grouped_mm(rows, weights, offs=offs)
        out[int(offs[-1]) :] = float("nan")
        return out

    monkeypatch.setattr(torch, "_grouped_mm", poisoned)
    case = case_of("masked")
    out, expected = both(case, make_inputs(case)[0], masked=True)
    assert reference.relative_error(out, expected) < BOUND


@pytest.mark.parametrize("form", [GROUPED, BLOCKED])
@pytest.mark.parametrize("routing", ["balanced", "random", "hot-expert", "masked"])
def test_fp8_is_the_layer_but_for_its_rounding(routing, form, monkeypatch):
    monkeypatch.setattr(experts, "fp8_form", lambda device: form)
    case = case_of(routing)
    out, expected = both(case, make_inputs(case)[0], routing == "masked", TorchFp8)
    assert out.shape == expected.shape and out.dtype == torch.bfloat16
    error = reference.relative_error(out, expected)
    assert 0.02 < error < MAX_FP8_ERROR  # it did round to FP8
    layer = TorchFp8(*make_weights(case))
    assert layer.max_error == MAX_FP8_ERROR and f"form={form}" in layer.config
    assert layer.capturable == (form == GROUPED)


@pytest.mark.parametrize(("precision", "form"), [("fp8_block", BLOCKED), ("fp8_channel", GROUPED)])
def test_weights_that_are_quantised_already_are_taken_as_they_are(precision, form):
    case = dataclasses.replace(case_of(), precision=precision)
    weights, inputs = make_layer_weights(case), make_inputs(case)[0]
    layer = TorchFp8(*weights[:2], scales=weights[2:])
    assert f"form={form}" in layer.config
    assert layer.multiply.w13[0] is weights.w13 and layer.multiply.w2[0] is weights.w2
    exact = reference.moe_forward(
        inputs.x,
        inputs.topk_idx,
        inputs.topk_weights,
        *weights,
        precision=precision,
        rounding=False,
    )
    # What is left is the rounding of hidden rows to FP8.
    out = layer(inputs.x, inputs.topk_idx, inputs.topk_weights)
    assert 0.02 < reference.relative_error(out, exact) < 0.03


@pytest.mark.parametrize("columns", [None, 128])
def test_rows_are_quantised_by_their_largest_value(columns):
    x = torch.randn(5, 256) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 7.0]).unsqueeze(1)
    x[1, 130] = 1000.0
    data, scale = experts.quantise_rows(x.bfloat16(), columns)
    assert data.dtype == torch.float8_e4m3fn and data.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (5, 2 if columns else 1)
    back = experts.dequantise(data, scale)
    assert torch.isfinite(back).all() and not back[3].any()
    wide = x.bfloat16().float().view(5, scale.shape[1], -1)
    largest = wide.abs().amax(dim=2)
    assert torch.allclose(back.view_as(wide).abs().amax(dim=2), largest, rtol=1e-6)
    # Half a unit in the last place of a number with 3 bits, or of the smallest subnormal.
    bound = wide.abs() * 2**-4 + scale.unsqueeze(2) * 2**-10
    assert ((back.view_as(wide) - wide).abs() <= bound * 1.001).all()


def test_blocks_of_weights_have_a_scale_each():
    w = torch.ones(256, 384)
    w[128:, 256:] = 8.0
    data, scale = experts.quantise_blocks(w)
    assert scale.shape == (2, 3) and scale[1, 2] == 8 * scale[0, 0]
    assert torch.equal(experts.dequantise(data, scale), w)


def test_products_get_operands_as_the_gpu_takes_them(monkeypatch):
    """The operations that only a GPU has, replaced by products of what they are given."""

    def scaled(a, b, scale_a, scale_b, out_dtype):
        assert a.is_contiguous() and b.t().is_contiguous() and a.shape[0] % 4 == 0
        assert scale_a.t().is_contiguous() and scale_a.shape == (a.shape[0], a.shape[1] // 128)
        assert scale_b.t().is_contiguous()
        assert scale_b.shape == (b.shape[0] // 128, b.shape[1] // 128)
        rows = experts.dequantise(a, scale_a)
        return (rows @ experts.dequantise(b.t().contiguous(), scale_b.t()).T).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    x, w = torch.randn(7, 256), torch.randn(384, 256)
    rows, blocks = experts.quantise_rows(x, 128), experts.quantise_blocks(w)
    out = experts._blocked_mm(*rows, *blocks)
    expected = experts._dequantised_mm(*rows, *blocks)
    assert out.shape == (7, 384) and reference.relative_error(out, expected) < 4e-3


def test_the_form_follows_torch_and_the_gpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert experts.fp8_form(cpu) == GROUPED
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert experts.fp8_form(gpu) == GROUPED
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert experts.fp8_form(gpu) == BLOCKED
    monkeypatch.delattr(torch, "_scaled_grouped_mm")
    assert experts.fp8_form(cpu) == BLOCKED


@pytest.mark.parametrize("name", BASELINES)
def test_no_tokens(name):
    case = case_of(tokens=1)
    layer = BASELINES[name](*make_weights(case))
    empty = Inputs(*(tensor[:0] for tensor in dataclasses.astuple(make_inputs(case)[0])))
    assert layer(empty.x, empty.topk_idx, empty.topk_weights).shape == (0, case.model.hidden)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("baseline", "form", "bound"),
    [
        (TorchBf16, None, BOUND),
        (TorchFp8, GROUPED, MAX_FP8_ERROR),
        (TorchFp8, BLOCKED, MAX_FP8_ERROR),
    ],
)
@pytest.mark.parametrize("routing", ["balanced", "masked"])
def test_on_the_gpu_it_equals_the_oracle(cuda, routing, baseline, form, bound, monkeypatch):
    """In a replayed graph where one can hold it."""
    monkeypatch.setattr(experts, "fp8_form", lambda device: form)
    case = Case(MODELS["tiny"], num_ranks=1, tokens=96, routing=routing)
    w13, w2 = make_weights(case, cuda)
    layer = baseline(w13, w2, masked=routing == "masked")
    assert layer.capturable == (form != BLOCKED)
    i = make_inputs(case, cuda)[0]
    expected = reference.moe_forward(i.x, i.topk_idx, i.topk_weights, w13, w2)
    mode = GRAPH if layer.capturable else EAGER
    times, out = measure(lambda: layer(i.x, i.topk_idx, i.topk_weights), cuda, mode, 5)
    assert reference.relative_error(out, expected) < bound
    assert len(times.us) == 5 and 0 < times.us_min < 1e5


@pytest.mark.parametrize("precision", built())
def test_baselines_take_bf16_weights_made_only_if_they_are_asked_for(precision, monkeypatch):
    case = dataclasses.replace(case_of(), precision=precision)
    weights = make_layer_weights(case)
    scaled, packed = case.recipe.tokens.has_scales, case.recipe.weights.packed
    plan = SimpleNamespace(case=case, baselines=(), mode=EAGER, device=torch.device("cpu"))
    made, every = [], range(case.model.num_experts)
    for name in ("make_weights", "expanded_weights"):
        make = getattr(contenders_module, name)
        monkeypatch.setattr(
            contenders_module, name, lambda *a, n=name, m=make: made.append(n) or m(*a)
        )
    assert baseline_contenders(plan, ALONE, weights, every) == [] and not made

    plan.baselines = ("torch_bf16", "torch_fp8")
    contenders = baseline_contenders(plan, ALONE, weights, every)
    assert made == (["expanded_weights"] if packed else ["make_weights"] * scaled)
    assert [contender.impl for contender in contenders] == list(plan.baselines)
    bounds = [contender.max_error for contender in contenders]
    assert bounds == pytest.approx([0.102, 0.1414] if scaled else [0.02, 0.1], rel=1e-3)
    inputs = make_inputs(case)
    expected = expected_of(ALONE, inputs, weights, case)
    for contender in contenders:
        contender.refuse(expected.error(contender.prepare(inputs)()), case.tokens)


def test_the_layer_in_fp8_may_differ_by_flipped_codes_only():
    assert layer_bound(PRECISIONS["bf16"]) == 2e-2
    for recipe in PRECISIONS.values():
        assert layer_bound(recipe) == (3e-2 if recipe.hidden.has_scales else 2e-2)


def test_statistics_of_times():
    times = Times(tuple(float(us) for us in range(100, 0, -1)))
    assert (times.us_min, times.us_median, times.us_p95) == (1, 50.5, 95)
    assert Times((3.0,)).us_p95 == 3
    assert Times((1.0, 9.0)).us_p95 == 9


def test_measure_returns_the_last_output_and_checks_at_the_end():
    calls: list[int] = []

    def call() -> int:
        calls.append(len(calls))
        return calls[-1]

    times, output = measure(call, "cpu", EAGER, repetitions=4, warmup=2)
    assert output == 5 and len(calls) == 6
    assert len(times.us) == 4 and times.us_min >= 0

    def fail() -> None:
        raise MegaMoEError("late")

    with pytest.raises(MegaMoEError, match="late"):
        measure(call, "cpu", check=fail)
