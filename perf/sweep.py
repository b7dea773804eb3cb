"""The command `sweep`: one model and routing over a list of token counts, one line per measurement.

With `--device cuda` all ranks are virtual ranks of one GPU and the figures are measurements. With
`--device cpu` the emulator runs the protocol: errors and byte counts are exact, times are a CPU's
and say nothing about a GPU. Every output is checked against the dense oracle, unless --no-verify.
Lines are printed and appended to the CSV file one at a time; an interrupt keeps what is finished.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megamoe.faults import MegaMoEError
from perf.measure import Point, Runner
from perf.plan import Plan, add_options, plan_of
from perf.results import ResultsFile, environment

__all__ = ["SUMMARY", "add_options", "run"]

SUMMARY = "time one model over token counts and check every output (default: the CPU emulator)"

#: A relative error above this is no rounding: the sweep says so and exits with status 1.
MAX_ERROR = 2e-2
FAILED, INTERRUPTED = 1, 130


def _error(point: Point) -> str:
    return "-" if point.error is None else f"{point.error:.2e}"


def _held(point: Point) -> str:
    return f"{point.reset_bytes:,} of {point.workspace_bytes:,}" if point.workspace_bytes else "-"


#: Heading, width and text of every printed column.
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
    ("TFLOP/s/GPU", 11, lambda p: f"{p.work.tflops(p.times.us_median):.1f}"),
    ("roofline us", 11, lambda p: f"{p.roofline.us:.1f}"),
    ("bound", 6, lambda p: p.roofline.bound),
    ("share", 5, lambda p: f"{p.roofline.share(p.times.us_median):.2f}"),
    ("max error", 9, _error),
)


def heading(plan: Plan, gpu: str, columns) -> str:
    """What is measured where, and the titles of the columns."""
    model, case = plan.case.model, plan.case
    shape = f"H={model.hidden} I={model.intermediate} E={model.num_experts} K={model.top_k}"
    lines = [
        f"{model.name} ({shape}), EP={case.num_ranks}, {case.precision}, "
        f"{case.routing} routing, {plan.mode}, {plan.reps} timed call(s)"
    ]
    if plan.emulated:
        lines.append("CPU emulation of every rank: the times are those of a CPU, not GPU figures.")
    else:
        lines.append(f"{gpu}, which holds {case.ranks_per_gpu} rank(s)")
    lines.append("  ".join(title.rjust(width) for title, width, _ in columns))
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Run the sweep: 0, 1 after a failed launch or a wrong output, 130 after an interrupt."""
    plan = plan_of(args)
    file = ResultsFile(args.csv) if args.csv else None
    columns = CPU_COLUMNS if plan.emulated else GPU_COLUMNS
    status, finished = 0, 0
    try:
        where = environment(plan.device)
        runner = Runner(plan)
        print(heading(plan, where["gpu"], columns), flush=True)
        for tokens in plan.tokens:
            for point in runner.points(tokens):
                if file:
                    file.append(point.row(where))
                print("  ".join(text(point).rjust(width) for _, width, text in columns), flush=True)
                finished += 1
                if point.error is not None and not point.error <= MAX_ERROR:
                    message = f"{point.impl} is wrong at {tokens} tokens: error {point.error:.2e}"
                    print(message, file=sys.stderr)
                    status = FAILED
    except KeyboardInterrupt:
        print(f"interrupted: {finished} finished row(s) kept", file=sys.stderr)
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        print(
            f"out of GPU memory after {finished} row(s), try --num-experts: {error}",
            file=sys.stderr,
        )
        return FAILED
    except MegaMoEError as error:
        print(f"launch failed after {finished} finished row(s): {error}", file=sys.stderr)
        return FAILED
    return status
