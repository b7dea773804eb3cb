"""The steps of a GPU session that run with a process per GPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perf import publish
from perf.__main__ import parser
from perf.plan import plan_of
from perf.processes import place_of

RANK_1 = {"RANK": "1", "LOCAL_RANK": "1"}


def test_steps_with_a_process_per_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert publish.steps_for(0) == publish.steps_for(1) == list(publish.STEPS)
    assert {step.gpus for step in publish.steps_for(2)} == {2}
    assert {step.gpus for step in publish.steps_for(4)} == {4, 2}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for step in publish.EP_STEPS:
        command = publish.command_of(step, tmp_path, ["--reps", "3"])
        head = f"-m torch.distributed.run --standalone --nproc-per-node {step.gpus} -m perf sweep"
        assert " ".join(command[1:]).startswith(head)
        plan = plan_of(
            parser().parse_args(command[8:]), place_of({**RANK_1, "WORLD_SIZE": str(step.gpus)})
        )
        assert plan.reps == 3 and plan.case.num_gpus == step.gpus
        (config,) = publish.configs_of([step])
        assert config == dataclasses.asdict(plan.case.config(plan.max_tokens))
        assert config["num_ranks"] == step.gpus
    names = [step.name for step in publish.EP_STEPS]
    assert {"pro_ep4", "flash_ep4", "v3_ep4", "pro_ep2", "flash_ep2", "v3_ep2"} <= set(names)


def test_listing_configs_needs_no_gpu(tmp_path):
    assert publish.main([str(tmp_path), "--list-configs", "--gpus", "4"]) == 0
    text = (tmp_path / "configs.json").read_text()
    assert '"num_ranks": 4' in text and '"num_ranks": 2' in text and '"num_ranks": 1' not in text
    assert publish.main([str(tmp_path), "--list-configs", "--only", "pro_ep4"]) == 0
    assert (tmp_path / "configs.json").read_text().count("num_ranks") == 1


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
