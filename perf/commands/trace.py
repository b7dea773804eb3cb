"""The command `trace`: one launch, with the time at which every CTA passed its marks, as a file for
Perfetto (https://ui.perfetto.dev) or chrome://tracing.

With `--device cuda` the kernel is built with `KernelConfig.trace` and records times of the GPU's
global timer; launches before the recorded one warm it up. All ranks are virtual ranks of one GPU,
or each has a process and a GPU of its own (torchrun); then rank 0 writes for all, and the timers of
the GPUs, which nobody sets, are laid side by side at the dispatch barrier. With `--device cpu` the
same kernel runs on the CPU; its times are counted in instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import megamoe
from megamoe.config import select
from megamoe.faults import MegaMoEError
from perf.arguments import check_no_results, check_writable, path_name
from perf.recording.results import ResultsFile, environment
from perf.running.measure import (
    Runner,
    largest_error,
    layer_bound,
    oracle,
    out_of_memory,
    outputs_of,
)
from perf.running.plan import (
    Plan,
    add_launch_options,
    add_list_configs,
    check_here,
    list_configs,
    plan_of,
)
from perf.running.process_runner import ProcessRunner
from perf.running.processes import Job, joined, place_of
from perf.running.sample import sample_of
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
from perf.workload.cases import Inputs, make_inputs, make_rank_inputs
from perf.workload.routings import label_of
from workspace.layout import layout_of

SUMMARY = "record one launch CTA by CTA as a timeline for Perfetto (default: on the CPU)"
EPILOG = (
    "On a GPU without the DSL the kernel is built ahead of time: --list-configs FILE, "
    "python -m megamoe.compile --list FILE --out DIR, then --kernel-dir DIR. Exit status: 0, or 1 "
    "after a wrong output or a failed launch."
)

#: Tokens per rank unless asked otherwise.
TOKENS = {"cpu": [4], "cuda": [512]}
#: Fields of the kernel that records.
TRACED = {"trace": True}
FAILED = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    tokens = "; ".join(f"{','.join(map(str, TOKENS[name]))} on {name}" for name in TOKENS)
    add_launch_options(parser, tokens=tokens)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("trace.json"),
        metavar="PATH",
        help="the file, which is overwritten (default: trace.json)",
    )
    add_list_configs(parser)
    parser.add_argument(
        "--phases",
        type=path_name,
        metavar="CSV",
        help="append a row: where the time of the launch went, on a GPU",
    )
    parser.set_defaults(mode=EAGER, reps=1, ceilings=None)


def run(args: argparse.Namespace) -> int:
    """Launch, write the file, print what took how long: 0, or 1 after a wrong output or a failed
    launch; ValueError for more than one launch or a path that cannot be written.
    """
    args.tokens = args.tokens or TOKENS[args.device]
    for option, values in (("--tokens", args.tokens), ("--precision", args.precision)):
        if len(values) > 1:
            raise ValueError(f"{option} {','.join(map(str, values))}: one launch has one of them")
    if args.list_configs:
        return list_configs(args, [TRACED])
    check_no_results("--out", args.out, read=[args.phases] if args.phases else [])
    check_writable("--out", args.out)
    if args.phases and args.device == "cpu":
        raise ValueError(f"--phases {args.phases}: a CPU has an order of steps, no times")
    phases = ResultsFile(args.phases, PhaseRow) if args.phases else None
    args.kernel_options = TRACED
    place = place_of(os.environ)
    plan = plan_of(args, place)
    check_here([plan])
    if place is None:
        return record(plan, args.out, phases)
    with joined(place) as job:
        return record(plan, args.out, phases, job)


def record(plan: Plan, out: Path, phases: ResultsFile | None = None, job: Job | None = None) -> int:
    """Launch, gather and write; the exit status. Collective with a job."""
    try:
        runner = ProcessRunner(plan, job) if job else Runner(plan)
        if job:
            inputs = [make_rank_inputs(plan.case, job.rank, plan.device)]
        else:
            inputs = make_inputs(plan.case, plan.device)
        traces, outputs = launch(runner.moe, plan, inputs, job)
        error = error_of(runner, plan, inputs, outputs, job)
    except (RuntimeError, MemoryError) as failure:
        if not isinstance(failure, MegaMoEError) and not out_of_memory(failure):
            raise
        what = "launch failed" if isinstance(failure, MegaMoEError) else "out of memory"
        message = f"{what}: {failure}".partition("\n")[0]
        if job:
            job.abort(message, FAILED)
        print(message, file=sys.stderr)
        return FAILED
    if job is None or job.rank == 0:
        write(plan, traces, error, out, phases)
    bound = layer_bound(plan.case.recipe)
    return FAILED if error is not None and not error <= bound else 0


def launch(
    moe: megamoe.MegaMoE, plan: Plan, inputs: Sequence[Inputs], job: Job | None = None
) -> tuple[list[CtaTrace], list[torch.Tensor]]:
    """(what every CTA recorded, outputs) of a launch, on GPUs after others; with a job, records of
    all ranks on every rank, outputs of this one.
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
    if job:
        job.align()
    outputs = outputs_of(moe, inputs)
    moe.synchronize()

    regions = {name: torch.stack([view[name] for view in views]) for name in names}
    if job:
        regions = {name: job.gather(region) for name, region in regions.items()}
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
    runner: Runner | ProcessRunner,
    plan: Plan,
    inputs: Sequence[Inputs],
    outputs: Sequence[torch.Tensor],
    job: Job | None,
) -> float | None:
    """The largest relative error of a rank; None if nobody asked."""
    if not plan.verify:
        return None
    precision = plan.case.precision
    if job is None:
        return largest_error(outputs, oracle(inputs, runner.weights, precision))
    sample = sample_of(job, inputs[0], runner.weights, precision)
    return job.max_over_ranks([sample.error(outputs[0])])[0]


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
    kernel = select(config, **plan.kernel_options)
    where = environment(plan.device)
    if phases:
        times = phases_of(map(slices_of, traces), clock.per_us)
        phases.append(PhaseRow(**where, **case.columns, **times))
    facts = {
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
