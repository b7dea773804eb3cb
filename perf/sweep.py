"""The command `sweep`: one model and routing over token counts, for one precision after another.

With `--device cuda` the figures are measurements. All ranks are virtual ranks of one GPU, or each
has a process and a GPU of its own: `torchrun --nproc-per-node N -m perf sweep`; then rank 0 prints
and writes. With `--device cpu` the kernel's PTX runs on the CPU: errors and byte counts are exact,
times are a CPU's and say nothing about a GPU. Every output is checked against the dense oracle
(with a process per rank: on a sample of every rank's tokens), unless --no-verify. Every
configuration is checked before the first runs. Lines are printed and appended to the CSV file one
at a time; an interrupt keeps what is finished. Rows with a cold L2 say so in `mode`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from megamoe.faults import MegaMoEError
from perf import deepep
from perf.cases import Case
from perf.measure import STAGING, Point, Runner, WrongResult, out_of_memory
from perf.plan import Plan, add_options, check_here, plans_of
from perf.process_runner import ProcessRunner
from perf.processes import Job, joined, place_of
from perf.progress import Progress
from perf.results import ResultsFile, Row, environment
from perf.routings import label_of

__all__ = ["SUMMARY", "add_options", "run"]

SUMMARY = "time one model over token counts and check every output (default: on the CPU)"
EPILOG = (
    "Exit status: 0 if every output was right, 1 after a wrong output, a failed launch or the end "
    "of memory or disk, 2 for wrong arguments, 130 after an interrupt; finished rows are kept. "
    "With a process per GPU: torchrun --nproc-per-node N -m perf sweep --device cuda ..."
)

FAILED, INTERRUPTED = 1, 130


def _error(point: Point) -> str:
    return "-" if point.error is None else f"{point.error:.2e}"


def _bounded(text: Callable[[Point], str]) -> Callable[[Point], str]:
    """The text of a point that has a roofline."""
    return lambda point: text(point) if point.roofline else "-"


def _held(point: Point) -> str:
    return f"{point.reset_bytes:,} of {point.workspace_bytes:,}" if point.workspace_bytes else "-"


#: Heading, width and text of every printed column; names of implementations may be wider.
CPU_COLUMNS = (
    ("tokens/rank", 11, lambda p: f"{p.case.tokens}"),
    ("impl", 10, lambda p: p.impl),
    ("CPU time", 12, lambda p: f"{p.times.us_median / 1e3:,.1f} ms"),
    ("max error", 9, _error),
    ("NVLink bytes", 14, lambda p: "-" if p.nvlink_bytes is None else f"{p.nvlink_bytes:,}"),
    ("bytes reset of bytes held", 26, _held),
)
GPU_COLUMNS = (
    ("tokens/rank", 11, lambda p: f"{p.case.tokens}"),
    ("impl", 10, lambda p: p.impl),
    ("us min", 9, lambda p: f"{p.times.us_min:.1f}"),
    ("median", 9, lambda p: f"{p.times.us_median:.1f}"),
    ("p95", 9, lambda p: f"{p.times.us_p95:.1f}"),
    ("TFLOP/s/GPU", 11, _bounded(lambda p: f"{p.work.tflops(p.times.us_median):.1f}")),
    ("roofline us", 11, _bounded(lambda p: f"{p.roofline.us:.1f}")),
    ("bound", 6, _bounded(lambda p: p.roofline.bound)),
    ("share", 5, _bounded(lambda p: f"{p.roofline.share(p.times.us_median):.2f}")),
    ("max error", 9, _error),
)


def columns_of(plan: Plan, impls: Sequence[str]):
    """The columns of a plan that measures these beside the layer."""
    columns = CPU_COLUMNS if plan.emulated else GPU_COLUMNS
    widest = max(map(len, impls), default=0)
    return [
        (title, max(width, widest) if title == "impl" else width, text)
        for title, width, text in columns
    ]


def title_of(case: Case) -> str:
    """Shape, precision and routing in a line."""
    model = case.model
    shape = f"H={model.hidden} I={model.intermediate} E={model.num_experts} K={model.top_k}"
    return (
        f"{model.name} ({shape}), EP={case.num_ranks}, {case.precision}, "
        f"{label_of(case.routing)} routing"
    )


def heading(plan: Plan, gpu: str, columns) -> str:
    """What is measured where, and the titles of the columns."""
    case = plan.case
    lines = [f"{title_of(case)}, {plan.label(plan.mode)}, {plan.reps} timed call(s)"]
    if plan.emulated:
        lines.append("CPU emulation of every rank: the times are those of a CPU, not GPU figures.")
    elif case.num_gpus > 1:
        lines.append(f"{case.num_gpus} x {gpu}, a process and a rank on each; times: slowest rank")
        names = ", ".join(name for name in plan.baselines if name != deepep.NAME)
        if names:
            lines.append(f"{names}: eager, NCCL all-to-all with counts read by the host")
        if deepep.NAME in plan.baselines:
            lines.append(f"{deepep.NAME}: eager, counts read by the host, torch between them")
    else:
        lines.append(f"{gpu}, which holds {case.ranks_per_gpu} rank(s)")
    if plan.staging and not plan.stages:
        lines.append(f"nothing is copied before the launch, so there are no rows of {STAGING}")
    return "\n".join([*lines, titles(columns)])


def titles(columns) -> str:
    return "  ".join(title.rjust(width) for title, width, _ in columns)


@dataclass(frozen=True)
class Listing:
    """How the points of a command are printed and kept: the class of their CSV rows; the columns of
    a plan with these implementations beside the layer, (title, width, text of a point); and the
    lines above them, for a plan, the name of its GPU and these columns.
    """

    kind: type = Row
    columns: Callable[[Plan, Sequence[str]], list] = columns_of
    heading: Callable[[Plan, str, list], str] = heading


SWEEP = Listing()


def run(args: argparse.Namespace) -> int:
    """Run the sweep: 0, 1 after a wrong output or whatever ended it, 130 after an interrupt. Under
    torchrun a rank that failed does not return; its process ends with the status.
    """
    return run_plans(args, Runner, ProcessRunner)


def run_plans(
    args: argparse.Namespace,
    one: type[Runner],
    many: type[ProcessRunner],
    seen: Callable[[Point], object] = lambda point: None,
    listing: Listing = SWEEP,
) -> int:
    """Measure every plan of `args` by a runner for this process alone, or for one of a job; `seen`
    gets each point in the process that prints. Points have `problem` and `row`, as `Point` has.
    """
    place = place_of(os.environ)
    plans = plans_of(args, place)
    check_here(plans)
    file = ResultsFile(args.csv, listing.kind) if args.csv else None
    if place is None:
        return measure_all(plans, file, one, seen=seen, listing=listing)
    with joined(place) as job:
        return measure_all(plans, file, lambda plan: many(plan, job), job, seen, listing)


def run_table(
    args: argparse.Namespace,
    one: type[Runner],
    many: type[ProcessRunner],
    title: str,
    table: Callable[[Sequence[Point]], str],
) -> int:
    """`run_plans`, then a table of what was measured, under its title; the exit status."""
    points: list[Point] = []
    status = run_plans(args, one, many, points.append)
    if points:
        print(title)
        print(table(points))
    return status


def measure_all(
    plans: Sequence[Plan],
    file: ResultsFile | None,
    make_runner: Callable[[Plan], Runner | ProcessRunner],
    job: Job | None = None,
    seen: Callable[[Point], object] = lambda point: None,
    listing: Listing = SWEEP,
) -> int:
    """Measure, print and keep every point; the exit status. `seen` gets each printed point."""
    speaks = job is None or job.rank == 0
    status, finished = 0, 0
    progress = Progress(sum(len(plan.tokens) for plan in plans) if speaks else 0)

    def say(line: str, stream: TextIO) -> None:
        progress.clear()
        print(line, file=stream, flush=True)

    def stop(message: str, status: int = FAILED) -> int:
        progress.clear()
        if job:
            job.abort(message, status)
        print(message, file=sys.stderr)
        return status

    try:
        for plan in plans:
            where = environment(plan.device) if speaks else {}
            runner = None  # gives back the memory of the last plan
            place = plan.case.precision
            runner = make_runner(plan)
            impls = [contender.impl for contender in runner.contenders]
            columns = listing.columns(plan, impls)
            if speaks:
                say(listing.heading(plan, where["gpu"], columns), sys.stdout)
            for tokens in plan.tokens:
                place = f"{plan.case.precision}, {tokens} tokens per rank"
                progress.start(place)
                for point in runner.points(tokens):
                    status = FAILED if point.problem else status
                    try:  # store first, as nobody may read stdout any more; print in any case
                        if speaks and file:
                            file.append(point.row(where))
                        finished += 1
                    finally:
                        if speaks:
                            cells = [text(point).rjust(width) for _, width, text in columns]
                            say("  ".join(cells), sys.stdout)
                    if speaks:
                        if point.problem:
                            say(point.problem, sys.stderr)
                        seen(point)
        progress.clear()
    except KeyboardInterrupt:
        kept = f" in {file.path}" if file else ""
        return stop(f"interrupted: {finished} finished row(s) kept{kept}", INTERRUPTED)
    except WrongResult as error:
        return stop(str(error))
    except MegaMoEError as error:
        return stop(f"launch failed after {finished} finished row(s): {error}")
    except OSError as error:
        return stop(f"stopped after {finished} finished row(s): {error}")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        kept = f"{place}: out of memory after {finished} finished row(s)"
        return stop(f"{kept}, try --num-experts: {reason}")
    return status
