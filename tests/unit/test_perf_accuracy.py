"""Errors of the layer and of the unfused pipeline: definitions, bounds, and what exceeds them."""

from __future__ import annotations

import csv
import dataclasses
from math import inf, nan

import pytest
import torch

import megamoe
from megamoe import reference
from megamoe.precision import PRECISIONS, WHOLE_ROW, e4m3
from perf.__main__ import main
from perf.commands.accuracy import (
    ORIGINAL,
    STORED,
    AccuracyRow,
    Errors,
    bounds_of,
    calc_diff,
    max_abs,
)
from perf.recording.columns import Launched
from perf.recording.environment import EMULATION
from perf.workload.cases import MODELS, Case, make_inputs, make_weights
from perf.workload.parts import MEGAMOE
from perf.workload.stored import make_layer_weights
from tests.nights import at_night
from tests.unit.perf_helpers import error_line

FEW = ["--ranks", "2", "--num-experts", "4", "--top-k", "2", "--tokens", "16"]
FEW += ["--intermediate-size", "512"]


# --- definitions


def test_errors_of_hand_values():
    out, exact = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert reference.relative_error(out, exact) == pytest.approx(4 / 3)
    assert calc_diff(out, exact) == pytest.approx(1 - 2 * 9 / (25 + 9))
    assert max_abs(out, exact) == 4.0
    assert calc_diff(exact, exact) == 0.0 and calc_diff(-exact, exact) == 2.0
    zero = torch.zeros(1, 2)
    assert calc_diff(zero, zero) == 0.0 and calc_diff(zero, exact) == 1.0
    assert calc_diff(zero[:0], zero[:0]) == max_abs(zero[:0], zero[:0]) == 0.0


@pytest.mark.parametrize("bad", [nan, inf])
def test_values_that_are_no_numbers_are_infinitely_wrong(bad):
    out, exact = torch.tensor([1.0, bad]), torch.ones(2)
    assert calc_diff(out, exact) == max_abs(out, exact) == inf


def test_sums_are_in_float64():
    out = torch.ones(1 << 16)
    exact = out.double()
    exact[0] += 2.0**-12
    assert calc_diff(out, exact) == pytest.approx(2.0**-24 / 2**17, rel=1e-3)


CASE = Case(MODELS["emulated"], 2, 16, precision="fp8_block")


def errors(relative=0.02, diff=2e-4, unfused=0.02, exact=STORED, **changes) -> Errors:
    return Errors(CASE, MEGAMOE, exact, relative, diff, 0.1, unfused, **changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"relative": 0.032, "diff": 6e-4, "unfused": 0.0295}, ""),
        ({"relative": 0.0325, "unfused": 0.03}, "relative L2 0.0325 > 0.032"),
        ({"diff": 6.1e-4}, "calc_diff 0.00061 > 0.0006"),
        ({"relative": 0.0221}, "ratio to the unfused pipeline 1.1 > 1.1"),
        ({"relative": inf, "diff": inf}, "relative L2 inf > 0.032, calc_diff inf > 0.0006, ratio"),
        ({"relative": 0.07, "exact": ORIGINAL}, ""),  # no bound for this one
        ({"relative": 0.07, "unfused": None}, ""),  # nor for the unfused pipeline
    ],
)
def test_a_problem_names_what_is_exceeded(changes, problem):
    found = errors(**changes).problem
    assert found.count("\n") == 0 and problem in found and bool(found) == bool(problem)
    assert not found or found.startswith("megamoe at 16 tokens, fp8_block: ")


def test_ratios_where_an_error_is_zero():
    assert errors(unfused=None).ratio is None
    assert errors(relative=0.0, unfused=0.0).ratio == 1.0
    assert errors(unfused=0.0).ratio == inf


def test_the_requirement():
    bounds = {name: dataclasses.astuple(bounds_of(row)) for name, row in PRECISIONS.items()}
    for name, row in PRECISIONS.items():
        rounded = row.hidden.storage == "float8_e4m3fn"
        assert bounds[name] == ((0.032, 6e-4, 1.1) if rounded else (4e-3, 8e-6, 1.1))
    assert bounds["fp8_block"] == bounds["fp8_channel"] != bounds["bf16"]


# --- magnitudes spread over blocks


def test_spread_magnitudes_cancel_exactly():
    model = dataclasses.replace(MODELS["emulated"], hidden=384, num_experts=4)
    plain = Case(model, 1, 5, precision="fp8_block")
    spread = dataclasses.replace(plain, spread=9)
    outputs = []
    for case in (plain, spread):
        [i] = make_inputs(case)
        arguments = i.x, i.topk_idx, i.topk_weights, *make_weights(case)
        outputs.append(reference.moe_forward(*arguments, rounding=False))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)
    x = [make_inputs(case)[0].x for case in (plain, spread)]
    for block, exponent in enumerate((0, 4, 9)):
        columns = slice(128 * block, 128 * (block + 1))
        assert torch.equal(x[0][:, columns], x[1][:, columns] * 2**exponent)
    stored = [make_layer_weights(case) for case in (plain, spread)]
    assert torch.equal(stored[0].w13.view(torch.uint8), stored[1].w13.view(torch.uint8))
    assert torch.equal(stored[0].w2_scale[:, :, 1] * 2**9, stored[1].w2_scale[:, :, 1])


# --- the command


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


SHAPES = {
    "default": [],
    "one rank": ["--ranks", "1", "--tokens", "1,8"],
    "wide": ["--ranks", "2", "--hidden-size", "512", "--intermediate-size", "384"],
    "masked": ["--ranks", "4", "--hidden-size", "128", "--routing", "masked"],
    "spread": [*FEW, "--spread", "16"],
}


@pytest.mark.parametrize("seed", ["0", at_night("7")])
@pytest.mark.parametrize(
    "shape",
    [s if s == "default" else at_night(s) for s in SHAPES],
)
def test_a_cpu_is_within_the_bounds(shape, seed, one_thread, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    argv = [*SHAPES[shape], "--seed", seed, "--precision", "bf16,fp8_block", "--csv", str(path)]
    assert main(["accuracy", *argv]) == 0
    out = capsys.readouterr().out
    assert out.count("CPU emulation") == 2 and "relative L2" in out
    for row in rows_of(path):
        assert row["seed"] == seed and row["gpu"] == EMULATION
        assert row["spread"] == ("16" if shape == "spread" else "0")
        error, diff = float(row["error_rel"]), float(row["calc_diff"])
        assert diff == pytest.approx(error**2 / 2, rel=0.1) and float(row["max_abs"]) > 0
        if row["impl"] != MEGAMOE:
            assert row["ratio"] == ""
        elif row["exact"] == STORED:
            bounds = bounds_of(PRECISIONS[row["precision"]])
            assert bounds.relative / 2 < error < bounds.relative
            assert diff < bounds.calc_diff and 0.5 < float(row["ratio"]) < 1.1
        else:  # tokens and two weights rounded to FP8 as well
            assert 0.05 < error < 0.1 and 0.9 < float(row["ratio"]) < 1.1


@pytest.mark.nightly
def test_integers_are_compared_with_e4m3_that_has_their_scales(one_thread, tmp_path):
    path = tmp_path / "rows.csv"
    assert main(["accuracy", *FEW, "--precision", "fp8_int4", "--csv", str(path)]) == 0
    stored = [row for row in rows_of(path) if row["exact"] == STORED]
    assert [row["impl"] for row in stored] == [MEGAMOE, "torch_fp8"]
    assert "form=blocked" in stored[1]["config"] and 0.9 < float(stored[0]["ratio"]) < 1.1


@pytest.mark.parametrize("recipes", ["fp8_block", at_night("fp8_block,fp8_channel,fp8_mxfp4")])
def test_rows_say_what_was_compared_where(recipes, one_thread, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    argv = [*FEW, "--precision", recipes, "--csv", str(path)]
    assert main(["accuracy", *argv]) == 0
    rows = rows_of(path)
    launch = [field.name for field in dataclasses.fields(Launched)]
    assert list(rows[0])[: len(launch)] == launch
    assert list(rows[0]) == [field.name for field in dataclasses.fields(AccuracyRow)]
    pairs = [(row["exact"], row["impl"]) for row in rows]
    one = [(exact, impl) for exact in (STORED, ORIGINAL) for impl in (MEGAMOE, "torch_fp8")]
    assert pairs == one * len(recipes.split(","))
    configs = [row["config"] for row in rows if row["impl"] == "torch_fp8"]
    assert configs[0] == configs[1] == "form=blocked scales=1x128 products=float32"
    assert {*configs[4:]} <= {configs[0]}
    assert {*configs[2:4]} <= {"form=grouped scales=row products=float32"}
    title, *lines = [line for line in capsys.readouterr().out.splitlines() if "  " in line][:5]
    assert {len(line) for line in lines} == {len(title)}
    # Another header is refused before anything runs.
    assert "another header" in error_line(["sweep", "--csv", str(path)], capsys)


class WrongScale(megamoe.MegaMoE):
    def load_weights(self, w13, w2, w13_scale, w2_scale):
        w13_scale = w13_scale.clone()
        w13_scale[1] *= 1.02
        super().load_weights(w13, w2, w13_scale, w2_scale)


class WrongOrder(megamoe.MegaMoE):
    def __call__(self, *inputs):
        outputs = super().__call__(*inputs)
        outputs[1][[2, 9]] = outputs[1][[9, 2]]
        return outputs


class WrongRow(megamoe.MegaMoE):
    def __call__(self, *inputs):
        outputs = super().__call__(*inputs)
        outputs[0][3, 5] = nan
        return outputs


class WideHiddenScales(megamoe.MegaMoE):
    """Hidden rows have one scale each."""

    def load_weights(self, *weights):
        super().load_weights(*weights)
        self.given = weights

    def __call__(self, *inputs):
        wide = dataclasses.replace(PRECISIONS["fp8_block"], hidden=e4m3(1, WHOLE_ROW))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRECISIONS, "fp8_block", wide)
            return [
                reference.moe_forward(*rank, *self.given, precision="fp8_block")
                for rank in zip(*inputs, strict=True)
            ]


@pytest.mark.parametrize("broken", [WrongScale, WrongOrder, WrongRow, WideHiddenScales])
def test_a_broken_layer_is_flagged(broken, one_thread, monkeypatch, capsys):
    argv = ["accuracy", *FEW]
    argv += ["--spread", "16"] * (broken is WideHiddenScales)
    assert main(argv) == 0
    capsys.readouterr()
    monkeypatch.setattr(megamoe, "MegaMoE", broken)
    assert main(argv) == 1
    reasons = [line for line in capsys.readouterr().err.splitlines() if " > " in line]
    assert len(reasons) == 1 and reasons[0].startswith("megamoe at 16 tokens, fp8_block: ")


def test_wide_hidden_scales_show_only_where_magnitudes_spread(one_thread, monkeypatch):
    monkeypatch.setattr(megamoe, "MegaMoE", WideHiddenScales)
    assert main(["accuracy", *FEW]) == 0


def test_a_wrong_pipeline_is_nothing_to_compare_with(one_thread, monkeypatch, capsys):
    monkeypatch.setattr("perf.against.experts.Fp8Experts.max_error", 0.01)
    assert main(["accuracy", *FEW]) == 1
    assert "torch_fp8 is wrong at 16 tokens" in capsys.readouterr().err


def test_help_states_bounds_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["accuracy", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "fp8_block: relative L2 0.032, 1.1 times that of the unfused pipeline, calc_diff" in text
    assert "(default: fp8_block)" in text and "16 on cpu; 512 on cuda" in text
    assert "--verify" not in text
