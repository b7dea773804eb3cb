"""The steps of a GPU session that run with a process per GPU."""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamoe import compile
from megamoe.precision import precision_of
from perf.__main__ import main, options_of
from perf.against.baselines import baseline_name
from perf.commands import publish
from perf.recording.files import load
from perf.running.jobs import place_of
from perf.running.options import Options
from perf.running.plan import plan_of
from perf.running.timing import GRAPH, mode_label
from perf.workload.cases import MODELS
from perf.workload.parts import PARTS
from tests.unit.perf_helpers import pretend_gpu

RANK_1 = {"RANK": "1", "LOCAL_RANK": "1"}
ROUTINGS = {"skewed": "zipf", "hot_expert": "hot-expert:0.3", "hot_rank": "hot-rank:0.6"}


def step_named(name: str) -> publish.Step:
    return publish.STEP_OF[name]


def arguments_of(name: str) -> Options:
    step = step_named(name)
    return options_of([step.command, *step.arguments])


def test_steps_with_a_process_per_gpu(tmp_path, monkeypatch):
    pretend_gpu(monkeypatch, count=8)
    assert publish.steps_for(0) == publish.steps_for(1) == list(publish.STEPS)
    for gpus, sizes in {2: [2], 3: [2], 4: [4, 2], 7: [4, 2], 8: [8, 4, 2]}.items():
        steps = publish.steps_for(gpus)
        assert steps == [step for size in sizes for step in publish.EP_STEPS if step.gpus == size]
    for step in publish.EP_STEPS:
        reps = 1 if step.command == "accuracy" else 3
        command = publish.command_of(step, tmp_path, ["--reps", "3"] if reps == 3 else [])
        head = f"-m torch.distributed.run --standalone --nproc-per-node {step.gpus} -m perf"
        head += f" {step.command}"
        assert " ".join(command[1:]).startswith(head)
        plan = plan_of(options_of(command[8:]), place_of({**RANK_1, "WORLD_SIZE": str(step.gpus)}))
        assert plan.reps == reps and plan.case.num_gpus == step.gpus
        config, *parts = publish.configs_of([step])
        if step.name == "pro_shared_ep2_fp8":  # its halves are other layers
            parts.clear()
        only = [part.pop("kernel")["only"] for part in parts]
        assert only == (list(PARTS) if step.command == "ablation" else [])
        assert all(part == config for part in parts)
        assert config == dataclasses.asdict(plan.case.config(plan.max_tokens))
        assert config["num_ranks"] == step.gpus
    names = {step.name for step in publish.EP_STEPS}
    wanted = {f"{model}_ep{gpus}" for model in ("pro", "flash", "v3") for gpus in (8, 4, 2)}
    wanted |= {"mimo_ep8"}
    wanted |= {f"{name}_fp8" for name in (*wanted, "mimo_ep4", "qwen3_ep4")}
    assert wanted <= names
    skewed = [f"pro_ep{n}_{name}_fp8" for n in (8, 4, 2) for name in ROUTINGS]
    assert set(skewed) <= names and "pro_ep2_skewed" not in names


def test_one_gpu_has_the_experts_of_a_rank_at_ep4(monkeypatch):
    pretend_gpu(monkeypatch)
    found = {step.name: step for step in publish.STEPS if re.search("_one(_fp8)?$", step.name)}
    both = [f"{model}_one{short}" for model in ("pro", "flash", "v3") for short in ("", "_fp8")]
    assert list(found) == [*both, "mimo_one_fp8", "qwen3_one_fp8"]
    for name, step in found.items():
        plan = plan_of(options_of([step.command, *step.arguments]))
        model, case = name.partition("_")[0], plan.case
        assert case.num_ranks == 1 and 4 * case.experts_per_rank == MODELS[model].num_experts
        assert (plan.mode, plan.max_tokens, len(plan.tokens)) == (GRAPH, 8192, 9)


def test_as_many_experts_on_a_gpu_as_at_ep8():
    table = [s for s in publish.STEP_OF.values() if s.file("h200").endswith("of_ep8.csv")]
    models = ("pro", "flash", "v3", "mimo")
    places = {"one": 1, "ep2": 2}
    assert [s.name for s in table] == [f"{m}_{p}_of_ep8_fp8" for p in places for m in models]
    for step in table:
        model, place = step.name.split("_")[:2]
        [config] = publish.configs_of([step])
        assert step.gpus == config["num_ranks"] == places[place]
        assert 8 * config["num_experts"] == step.gpus * MODELS[model].num_experts
        args = arguments_of(step.name)
        assert (args.mode, args.max_tokens, len(args.tokens)) == (GRAPH, 8192, 9)


def test_skewed_routings_load_the_layer_that_is_measured_balanced():
    for gpus in (2, 4, 8):
        balanced = publish.configs_of([step_named(f"pro_ep{gpus}_fp8")])
        for name, routing in ROUTINGS.items():
            name = f"pro_ep{gpus}_{name}_fp8"
            args = arguments_of(name)
            assert (args.routing, args.tokens) == (routing, [128, 1024, 8192])
            assert publish.configs_of([step_named(name)]) == balanced


def test_steps_measure_again_what_other_files_hold():
    """The layer and token counts of the rows that are published, and nothing beside them."""
    for name, file in {
        "zeroing": "zeroing.csv",
        "pro_ep2_staging": "staging.csv",
        "pro_ep2_cold_l2": "cold_l2.csv",
    }.items():
        step, args = step_named(name), arguments_of(name)
        [config] = publish.configs_of([step])
        rows = load(publish.REPOSITORY / "perf" / "results" / file)
        assert step.file("h200") == file and rows.tokens.unique().tolist() == args.tokens
        for row in rows.itertuples():
            assert row.num_ranks == config["num_ranks"] == step.gpus * row.ranks_per_gpu
            assert (row.model, row.num_experts) == (args.model, config["num_experts"])
            assert (row.precision, row.routing) == (config["precision"], args.routing)
            assert row.mode == mode_label(args.mode, args.l2)
        assert config["max_tokens_per_rank"] >= max(args.tokens)
    assert arguments_of("pro_ep2_staging").staging
    for name in ("pro_ep2_staging", "pro_ep2_cold_l2"):
        assert arguments_of(name).baseline == ()


def test_steps_have_names_of_their_own_and_count_tokens_upwards():
    assert len(publish.STEP_OF) == len(publish.STEPS) + len(publish.EP_STEPS)
    for step in publish.STEP_OF.values():
        args = options_of([step.command, *step.arguments])
        assert args.tokens == sorted(args.tokens), step.name
        assert args.precision == (step.precision,)
        if step.command == "sweep" and step.baseline:
            assert args.baseline == (baseline_name(precision_of(step.precision)),)


def test_a_file_holds_one_kind_of_rows():
    files: dict[str, set] = {}
    for step in publish.STEP_OF.values():
        files.setdefault(step.file("h200"), set()).add((step.precision, step.gpus))
    files.pop("smoke.csv")
    assert files.pop("ablation.csv") == {("fp8_block", 1), ("fp8_block", 2), ("fp8_block", 4)}
    assert files.pop("accuracy.csv") == {
        ("fp8_block", 1), ("fp8_channel", 1), ("fp8_mxfp4", 1), ("fp8_mxfp4_token", 1),
        ("fp8_int4", 1), ("bf16", 1), ("fp8_block", 4), ("fp8_block", 8),
    }  # fmt: skip
    assert {s.file("h200") for s in publish.STEPS if s.command == "accuracy"} == {"accuracy.csv"}
    assert files.pop("h200_fp8_share_of_ep8.csv") == {("fp8_block", 1), ("fp8_block", 2)}
    assert all(len(kinds) == 1 for kinds in files.values())
    assert {name: kinds.pop() for name, kinds in files.items()} == {
        "h200_bf16_one_gpu.csv": ("bf16", 1),
        "h200_fp8_one_gpu.csv": ("fp8_block", 1),
        "h200_bf16_ep8.csv": ("bf16", 8),
        "h200_fp8_ep8.csv": ("fp8_block", 8),
        "h200_bf16_ep4.csv": ("bf16", 4),
        "h200_fp8_ep4.csv": ("fp8_block", 4),
        "h200_fp8_channel_one_gpu.csv": ("fp8_channel", 1),
        "h200_fp8_channel_ep4.csv": ("fp8_channel", 4),
        "h200_fp8_mxfp4_one_gpu.csv": ("fp8_mxfp4", 1),
        "h200_fp8_mxfp4_ep4.csv": ("fp8_mxfp4", 4),
        "h200_fp8_mxfp4_ep2.csv": ("fp8_mxfp4", 2),
        "h200_fp8_mxfp4_token_ep2.csv": ("fp8_mxfp4_token", 2),
        "h200_fp8_int4_one_gpu.csv": ("fp8_int4", 1),
        "h200_fp8_int4_ep2.csv": ("fp8_int4", 2),
        "h200_bf16_ep2.csv": ("bf16", 2),
        "h200_fp8_ep2.csv": ("fp8_block", 2),
        "staging.csv": ("bf16", 2),
        "cold_l2.csv": ("fp8_block", 2),
        "shared_experts.csv": ("fp8_block", 2),
        "zeroing.csv": ("fp8_block", 1),
    }


@pytest.mark.parametrize(
    ("gpu", "word"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GH200 480GB", "gh200")],
)
def test_files_are_named_after_the_gpu_that_is_measured(gpu, word, monkeypatch, tmp_path):
    pretend_gpu(monkeypatch, gpu)
    files = {
        "pro_one": f"{word}_bf16_one_gpu", "pro_ep2_fp8": f"{word}_fp8_ep2", "zeroing": "zeroing",
        "pro_ep2_of_ep8_fp8": f"{word}_fp8_share_of_ep8",
    }  # fmt: skip
    for name, file in files.items():
        assert publish.command_of(step_named(name), tmp_path)[-1] == f"{tmp_path}/{file}.csv"


def listed(directory: Path, *options: str) -> list[tuple]:
    """(configuration, kernel) of what `publish` lists, which needs no GPU."""
    assert main(["publish", str(directory), "--list-configs", *options]) == 0
    return compile._configs_of(argparse.Namespace(list=directory / "configs.json"))


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_kernels_of_every_step_can_be_listed(gpus, tmp_path):
    ranks = {config.num_ranks for config, _ in listed(tmp_path, "--gpus", str(gpus))}
    alone = {1} if gpus > 1 else set()  # shared experts as a layer of their own
    assert ranks == {step.gpus for step in publish.steps_for(gpus)} | alone


def test_a_kernel_is_listed_once(tmp_path):
    assert len(listed(tmp_path, "--only", "pro_ep4")) == 1
    both = listed(tmp_path, "--only", "pro_ep4_fp8_channel,pro_ep4_fp8")
    assert [config.precision for config, _ in both] == ["fp8_block", "fp8_channel"]
    shared = listed(tmp_path, "--only", "pro_ep4_fp8,pro_ablation_ep4_fp8")  # the kernel of all
    assert [kernel.only for _, kernel in shared] == ["", *PARTS]


def test_a_step_of_several_processes_is_ended_politely(tmp_path):
    marker = tmp_path / "ended"
    script = (
        "import signal, sys, time, pathlib\n"
        f"def end(*_): pathlib.Path({str(marker)!r}).touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end); time.sleep(60)"
    )
    command = [sys.executable, "-c", script]
    assert publish.run_step(command, 1.0, gpus=4) == "stopped after 1 s"
    assert marker.exists()
    assert publish.run_step([sys.executable, "-c", "exit(3)"], 20, gpus=4) == "exit status 3"


@pytest.mark.slow
def test_torchrun_starts_the_sweep():
    command = publish.command_of(publish.EP_STEPS[-1], Path("/nowhere"))
    if torch.cuda.is_available():
        pytest.skip("would run")
    done = subprocess.run(
        command, cwd=publish.REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "no CUDA device is available" in done.stderr
