"""Zeroing everything and adding slots separately: the same outputs, and what is touched."""

from __future__ import annotations

import pytest
import torch

import megamoe
from megamoe import reference
from perf.__main__ import main
from perf.commands import zeroing
from perf.commands.zeroing import (
    FULL_ZEROING,
    SEPARATE_SUM,
    contenders_of,
    sum_of_slots,
    zeroed_spans,
)
from perf.recording.files import load
from perf.running.layer import outputs_of
from perf.running.timing import EAGER
from perf.workload.cases import MODELS, Case, make_inputs, make_weights
from perf.workload.parts import MEGAMOE
from tests.machine import max_relative_error
from tests.nights import at_night
from tests.unit.perf_helpers import measured
from workspace.layout import BARRIER

CASE = Case(MODELS["emulated"], num_ranks=2, tokens=5)


@pytest.fixture(scope="module")
def layer(one_thread):
    model = CASE.model
    moe = megamoe.MegaMoE(
        num_experts=model.num_experts,
        top_k=model.top_k,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        max_tokens_per_rank=8,
        world=CASE.num_ranks,
        device="cpu",
    )
    moe.load_weights(*make_weights(CASE))
    return moe


def test_all_but_the_barrier_header_is_zeroed(layer):
    views = [layer.workspace.regions(rank) for rank in layer.local_ranks]
    kept = [[view.clone() for view in regions.values()] for regions in views]
    for regions in views:
        for view in regions.values():
            view.view(torch.uint8).fill_(1)
    for span in zeroed_spans(layer.workspace):
        span.zero_()
    layout = layer.workspace.layout
    for regions in views:
        for name, view in regions.items():
            assert bool(view.any()) == (layout[name].kind == BARRIER), name
    for regions, old in zip(views, kept, strict=True):
        for view, before in zip(regions.values(), old, strict=True):
            view.copy_(before)


def test_both_variants_give_the_layers_output(layer):
    inputs = make_inputs(CASE)
    expected = [y.clone() for y in outputs_of(layer, inputs)]
    events = []

    def meet():
        spans = zeroed_spans(layer.workspace)
        events.append(not any(span.any() for span in spans))

    zero, add = contenders_of(layer, EAGER, meet)
    for _ in range(2):  # again, after a launch with other inputs
        outputs = zero.prepare(inputs)()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        sums = add.prepare(inputs)()
        for mine, wanted in zip(sums, expected, strict=True):
            assert mine.shape == wanted.shape and mine.dtype == wanted.dtype
            assert reference.relative_error(mine, wanted) < 4e-3
        outputs_of(layer, make_inputs(CASE.with_tokens(8)))
    assert events == [True, True]  # met once a call, when everything was zero
    assert (zero.impl, add.impl) == (FULL_ZEROING, SEPARATE_SUM)
    spans = zeroed_spans(layer.workspace)
    assert zero.config == f"zeroed_bytes={sum(span.numel() for span in spans) // 2}"


def test_slots_are_added_in_float32():
    slots_TKH = torch.tensor([[[256.0], [1.0], [1.0], [1.0]]], dtype=torch.bfloat16)
    assert sum_of_slots(slots_TKH).tolist() == [[260.0]]  # 259 in float32; 256 if added in bf16
    assert sum_of_slots(slots_TKH).dtype == torch.bfloat16


def test_ratios_are_to_the_layer_at_the_same_tokens():
    points = [
        measured(MEGAMOE, 4, 100.0), measured(FULL_ZEROING, 4, 250.0),
        measured(SEPARATE_SUM, 4, 130.0),
        measured(MEGAMOE, 8, 200.0), measured(FULL_ZEROING, 8, 300.0),  # stopped here
    ]  # fmt: skip
    assert zeroing.ratios(points) == [("bf16", 4, 100.0, 2.5, 1.3)]
    assert "2.50x" in zeroing.table(points) and "1.30x" in zeroing.table(points)


@pytest.mark.parametrize("precision", ["bf16", at_night("fp8_block"), at_night("fp8_channel")])
def test_the_command_on_a_cpu(precision, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    small = ["--tokens", "3", "--ranks", "2", "--num-experts", "8", "--reps", "2"]
    small += ["--precision", precision]
    assert main(["zeroing", *small, "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    assert "CPU emulation" in out and "full zeroing" in out and out.count("x\n") == 1
    rows = load(path)
    assert rows.impl.tolist() == [MEGAMOE, FULL_ZEROING, SEPARATE_SUM]
    bound = max_relative_error(precision) if precision == "fp8_channel" else 8e-3
    assert (rows.error_rel < bound).all() and rows.config[1].startswith("zeroed_bytes=")
    # Titles stand over their columns, whatever the names of implementations.
    title, *lines = out.splitlines()[2:6]
    assert {len(line) for line in (title, *lines)} == {len(title)}
