"""The command `trace`: one launch, with the time at which every CTA passed its marks, as a file for
Perfetto (https://ui.perfetto.dev) or chrome://tracing.

With `--device cuda` the kernel is built with `KernelConfig.trace` and records times of the GPU's
global timer; launches before the recorded one warm it up. All ranks are virtual ranks of one GPU,
or each has a process and a GPU of its own (torchrun); then rank 0 writes for all, and the timers of
the GPUs, which nobody sets, are laid side by side at the dispatch barrier. With `--device cpu` the
same kernel runs on the CPU; its times are counted in instructions.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megamoe
from megamoe.arguments import kernel_config_of
from megamoe.faults import MegaMoEError
from megamoe.regions import layout_of
from perf.arguments import check_no_results, check_writable, option, path_name
from perf.recording.environment import environment
from perf.recording.files import ResultsFile
from perf.running.checks import check_here
from perf.running.jobs import ALONE, Job, place_of
from perf.running.layer import layer_bound, outputs_of
from perf.running.options import Options as AllOptions
from perf.running.options import list_configs_option
from perf.running.plan import Plan, plan_of, write_configs
from perf.running.processes import joined, out_of_memory
from perf.running.runner import Runner
from perf.running.timing import EAGER, HEAD_START_CYCLES
from perf.tracing.phases import PhaseRow, phases_of
from perf.tracing.timeline import (
    CPU_CLOCK,
    GPU_CLOCK,
    CtaTrace,
    decode,
    events_of,
    shifted,
    shifts_of,
    slices_of,
    sm_clock_mhz,
    summary,
)
from perf.workload.cases import Inputs
from perf.workload.routings import label_of

SUMMARY = "record one launch CTA by CTA as a timeline for Perfetto (default: on the CPU)"
EPILOG = (
    "On a GPU without the DSL the kernel is built ahead of time: --list-configs FILE, "
    "python -m megamoe.compile --list FILE --out DIR, then --kernel-dir DIR. Exit status: 0, or 1 "
    "after a wrong output or a failed launch."
)

#: Fields of the kernel that records.
TRACED: dict[str, object] = {"trace": True}
FAILED = 1


@dataclass(frozen=True)
class Options(AllOptions):
    """A single launch is recorded."""

    default_tokens = {"cpu": (4,), "cuda": (512,)}
    mode: str = EAGER
    reps: int = 1
    out: Path = option(
        "the file, which is overwritten", default=Path("trace.json"), type=Path, metavar="PATH"
    )
    list_configs: Path | None = list_configs_option()
    phases: str | None = option(
        "append a row: where the time of the launch went, on a GPU", type=path_name, metavar="CSV"
    )


def run(options: Options) -> int:
    """Launch, write the file, print what took how long: 0, or 1 after a wrong output or a failed
    launch; ValueError for more than one launch or a path that cannot be written.
    """
    for name, values in (("--tokens", options.counts), ("--precision", options.precision)):
        if len(values) > 1:
            raise ValueError(f"{name} {','.join(map(str, values))}: one launch has one of them")
    if options.list_configs:
        return write_configs(options, [TRACED])
    check_no_results("--out", options.out, read=[options.phases] if options.phases else [])
    check_writable("--out", options.out)
    if options.phases and options.device == "cpu":
        raise ValueError(f"--phases {options.phases}: a CPU has an order of steps, no times")
    phases = ResultsFile(options.phases, PhaseRow) if options.phases else None
    place = place_of(os.environ)
    plan = plan_of(options, place, kernel_options=TRACED)
    check_here([plan])
    with joined(place) as job:
        return record(plan, options.out, phases, job)


def record(plan: Plan, out: Path, phases: ResultsFile | None = None, job: Job = ALONE) -> int:
    """Launch, gather and write; the exit status. Collective."""
    try:
        runner = Runner(plan, job)
        inputs = runner.inputs_of(plan.case)
        traces, outputs = launch(runner.moe, plan, inputs, job)
        error = error_of(runner, inputs, outputs)
    except (RuntimeError, MemoryError) as failure:
        if not isinstance(failure, MegaMoEError) and not out_of_memory(failure):
            raise
        what = "launch failed" if isinstance(failure, MegaMoEError) else "out of memory"
        return job.abort(f"{what}: {failure}".partition("\n")[0], FAILED)
    if job.rank == 0:
        write(plan, traces, error, out, phases)
    bound = layer_bound(plan.case.recipe)
    return FAILED if error is not None and not error <= bound else 0


def launch(
    moe: megamoe.MegaMoE, plan: Plan, inputs: Sequence[Inputs], job: Job = ALONE
) -> tuple[list[CtaTrace], Sequence[torch.Tensor]]:
    """(what every CTA recorded, outputs) of a launch, on GPUs after others; records of all ranks on
    every rank, outputs of this one's. Collective.
    """
    views = [moe.workspace.regions(rank) for rank in moe.local_ranks]
    names = [name for name in ("trace", "tile_trace") if name in views[0]]
    for _ in range(plan.warmup):
        outputs_of(moe, inputs)
    moe.synchronize()
    for view in views:
        for name in names:
            view[name].zero_()
    if not plan.emulated:
        torch.cuda._sleep(HEAD_START_CYCLES)  # the host queues every launch before the first begins
    job.align()
    outputs = outputs_of(moe, inputs)
    moe.synchronize()

    regions = {name: job.gather(torch.stack([view[name] for view in views])) for name in names}
    marks, tiles = regions["trace"].cpu(), regions.get("tile_trace")
    traces = [
        trace
        for rank in range(plan.case.num_ranks)
        for trace in decode(
            rank, marks[rank], moe.num_sms, None if tiles is None else tiles[rank].cpu()
        )
    ]
    if plan.case.num_gpus > 1:
        shifts = shifts_of(traces)
        traces = [shifted(trace, shifts[trace.rank]) for trace in traces]
    return traces, outputs


def error_of(
    runner: Runner, inputs: Sequence[Inputs], outputs: Sequence[torch.Tensor]
) -> float | None:
    """The largest relative error of a rank; None if nobody asked."""
    expected = runner.expected_of(inputs)
    return expected.error(outputs) if expected else None


def write(
    plan: Plan,
    traces: Sequence[CtaTrace],
    error: float | None,
    out: Path,
    phases: ResultsFile | None = None,
) -> None:
    """The file, a row of phases if somebody asked, and a few lines about the launch."""
    case, clock = plan.case, CPU_CLOCK if plan.emulated else GPU_CLOCK
    config = case.config(plan.max_tokens)
    kernel = kernel_config_of(config, plan.kernel_options, plan.device)
    where = environment(plan.device)
    if phases:
        times: dict[str, Any] = phases_of(map(slices_of, traces), clock.per_us)
        phases.append(PhaseRow(**where, **case.columns, **times))
    facts: dict[str, Any] = {
        **where,
        "time": clock.note,
        **case.columns,
        "kernel": dataclasses.asdict(kernel),
        "error_rel": error if error is None else f"{error:.2e}",
        "sm_clock_mhz": None if plan.emulated else sm_clock_mhz(traces),
    }
    if case.num_gpus > 1:
        facts["time"] += ", laid side by side at the dispatch barrier"
    events = events_of(traces, clock)
    out.write_text(json.dumps({"displayTimeUnit": "ns", "otherData": facts, "traceEvents": events}))
    ctas = len(traces) // case.num_ranks
    print(
        f"{case.model.name}, EP={case.num_ranks}, {case.precision}, {case.tokens} tokens per rank, "
        f"{label_of(case.routing)} routing: {ctas} CTAs per rank, {len(events)} events in {out}"
    )
    print(f"times: {facts['time']}")
    print(summary(traces, layout_of(config, kernel).reset_bytes, clock))
    if error is not None:
        verdict = "" if error <= layer_bound(case.recipe) else ": the output is wrong"
        print(f"error {error:.2e}{verdict}")
