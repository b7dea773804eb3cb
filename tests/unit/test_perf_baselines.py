"""The torch baseline computes the layer that the oracle computes; timing keeps what it timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamoe import reference
from megamoe.faults import MegaMoEError
from perf.baselines import BASELINES, TorchBf16
from perf.cases import MODELS, Case, Inputs, make_inputs, make_weights
from perf.routings import ROUTINGS
from perf.timing import EAGER, GRAPH, Times, measure

#: A few bf16 roundings (2^-9 each) of independent signs.
BOUND = 8e-3


def case_of(routing: str = "balanced", tokens: int = 37) -> Case:
    return Case(MODELS["emulated"], num_ranks=1, tokens=tokens, routing=routing)


def both(case: Case, inputs: Inputs, masked: bool):
    w13, w2 = make_weights(case)
    expected = reference.moe_forward(inputs.x, inputs.topk_idx, inputs.topk_weights, w13, w2)
    layer = TorchBf16(w13, w2, masked=masked)
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


def test_no_tokens():
    case = case_of(tokens=1)
    layer = BASELINES["torch_bf16"](*make_weights(case))
    empty = Inputs(*(tensor[:0] for tensor in dataclasses.astuple(make_inputs(case)[0])))
    assert layer(empty.x, empty.topk_idx, empty.topk_weights).shape == (0, case.model.hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["balanced", "masked"])
def test_a_replayed_graph_on_the_gpu_equals_the_oracle(cuda, routing):
    case = Case(MODELS["tiny"], num_ranks=1, tokens=96, routing=routing)
    w13, w2 = make_weights(case, cuda)
    layer = TorchBf16(w13, w2, masked=routing == "masked")
    i = make_inputs(case, cuda)[0]
    expected = reference.moe_forward(i.x, i.topk_idx, i.topk_weights, w13, w2)
    times, out = measure(lambda: layer(i.x, i.topk_idx, i.topk_weights), cuda, GRAPH, 5)
    assert reference.relative_error(out, expected) < BOUND
    assert len(times.us) == 5 and 0 < times.us_min < 1e5


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
