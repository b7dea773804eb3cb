"""The command `ablation`: a layer for each part, what it works on, the table, what is refused."""

from __future__ import annotations

import argparse

import pytest

import megamoe
from megamoe import compile, reference
from perf.__main__ import main, options_of
from perf.commands import ablation
from perf.commands.ablation import AblationRunner, fill_pool, fill_slots
from perf.recording.environment import environment
from perf.running.checks import check_here
from perf.running.layer import layer_of
from perf.running.plan import plan_of
from perf.workload.parts import ABLATION_KERNELS, MEGAMOE, PART_NAMES, PARTS, STAGING, part_name
from tests.nights import at_night
from tests.unit.perf_helpers import measured

RANKS = 2


def plan_for(*options: str):
    small = ["--tokens", "3", "--ranks", str(RANKS), "--num-experts", "8", "--reps", "2"]
    return plan_of(options_of(["ablation", *small, *options]))


@pytest.fixture
def made(monkeypatch, one_thread):
    """The kernel options of every layer; these launches are whole whatever they say."""
    made, real = [], megamoe.MegaMoE

    def make(**arguments):
        made.append(arguments.pop("kernel_options"))
        return real(**arguments)

    monkeypatch.setattr(megamoe, "MegaMoE", make)
    return made


def test_every_part_is_timed_with_a_workspace_of_its_own(made):
    runner = AblationRunner(plan_for())
    assert made == list(ABLATION_KERNELS)
    points = list(runner.points(3))
    assert [point.impl for point in points] == [MEGAMOE, *map(part_name, PARTS)]
    assert points[0].error is not None and not any(point.problem for point in points)
    assert {part_name(part) for part in PARTS} | {STAGING} == set(PART_NAMES)
    for point in points[1:]:
        row = point.row(environment("cpu"))
        assert row.error_rel is row.roofline_us is row.tflops is None and row.us_median > 0
        assert "num_stages=" in row.config and len(point.times.us) == 2
    layers = {id(moe.workspace): moe for moe in map(layer_in, runner.contenders)}
    assert len(layers) == 3 and id(runner.moe.workspace) not in layers
    assert all(moe.weights_version for moe in layers.values())


def layer_in(contender) -> megamoe.MegaMoE:
    """The layer that a contender calls."""
    return contender.prepare([]).func


def test_a_process_makes_its_parts_in_its_group(made, monkeypatch):
    plan, given = plan_for(), []
    runner = AblationRunner(plan)
    monkeypatch.setattr(
        ablation,
        "layer_of",
        lambda plan, job: given.append((plan.kernel_options, job)) or runner.moe,
    )
    runner.job = "job"
    runner.make_contenders()
    assert given == [({"only": part}, "job") for part in PARTS]


@pytest.mark.parametrize("precision", ["bf16", at_night("fp8_block"), at_night("fp8_mxfp4")])
def test_pool_and_slots_hold_normal_numbers(precision, one_thread):
    moe = layer_of(plan_for("--precision", precision))
    fill_pool(moe)
    fill_slots(moe)
    for rank in moe.local_ranks:
        regions = moe.workspace.regions(rank)
        rows = regions["l1_token_buffer"].double()
        if moe.config.recipe.tokens.has_scales:
            scales = regions["l1_scale_buffer"].transpose(1, 2).reshape(len(rows), -1)
            assert regions["l1_token_buffer"].float().abs().max() == 448
            rows = reference.dequantize(regions["l1_token_buffer"], scales)
        for values in (rows, regions["combine_output"].double()):
            assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1
            assert (values.flatten(1).std(dim=1) > 0.5).all()


def test_the_table_says_what_overlap_saves():
    us = (1000.0, 900.0, 250.0, 150.5)
    names = (MEGAMOE, *map(part_name, PARTS))
    points = [measured(name, 4, time) for name, time in zip(names, us, strict=True)]
    points += [measured(MEGAMOE, 8, 2000.0), measured(names[1], 8, 1800.0)]  # stopped here
    title, *lines = ablation.table(points).splitlines()
    assert title.split() == [
        "precision", "tokens/rank", "all", "gemms", "dispatch", "combine", "sum", "-", "all"
    ]  # fmt: skip
    assert [line.split() for line in lines] == [
        ["bf16", "4", "1,000.0", "900.0", "250.0", "150.5", "300.5"]
    ]
    assert len(lines[0]) == len(title)


def test_what_to_build_is_listed_without_a_gpu(tmp_path):
    path = tmp_path / "configs.json"
    options = ["--device", "cuda", "--model", "pro", "--ranks", "4", "--precision"]
    options += ["bf16,fp8_block", "--list-configs", str(path)]
    assert main(["ablation", *options]) == 0
    listed = compile._configs_of(argparse.Namespace(list=path))
    assert [(config.precision, kernel.only) for config, kernel in listed] == [
        (precision, only) for precision in ("bf16", "fp8_block") for only in ("", *PARTS)
    ]
    assert {config.max_tokens_per_rank for config, _ in listed} == {8192}


def test_room_and_kernels_of_all_parts_are_checked(monkeypatch):
    checked = []
    monkeypatch.setattr(ablation, "check_here", lambda plans: checked.extend(plans))
    whole = plan_for()
    ablation.check_memory_and_kernels([whole])
    assert [plan.kernel_options for plan in checked] == [{"only": part} for part in PARTS]
    assert {plan.workspace_bytes for plan in checked} == {4 * whole.workspace_bytes}
    check_here(checked)  # a CPU needs nothing
