"""From the options of a command to its exit status: every plan is checked, then measured, printed
and kept point by point.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from megamoe.faults import MegaMoEError
from megamoe.progress import Progress
from perf.recording.environment import environment
from perf.recording.files import ResultsFile
from perf.running.checks import check_here
from perf.running.contenders import WrongResult
from perf.running.jobs import ALONE, Job, place_of
from perf.running.listing import SWEEP, Listing
from perf.running.options import Options
from perf.running.plan import Plan, plans_of
from perf.running.points import Point
from perf.running.processes import joined, out_of_memory
from perf.running.runner import Runner

FAILED, INTERRUPTED = 1, 130


def run_plans(
    options: Options,
    runner: type[Runner] = Runner,
    seen: Callable[[Point], object] = lambda point: None,
    listing: Listing = SWEEP,
) -> int:
    """Measure every plan of `options`: 0, 1 after a wrong output or whatever ended it, 130 after an
    interrupt. Under torchrun a rank that failed does not return; its process ends with the status.
    `seen` gets each point in the process that prints. Points have `problem` and `row`, as `Point`
    has.
    """
    place = place_of(os.environ)
    plans = plans_of(options, place)
    check_here(plans)
    file = ResultsFile(options.csv, listing.kind) if options.csv else None
    with joined(place) as job:
        return measure_all(plans, file, runner, job, seen, listing)


def run_table(
    options: Options, runner: type[Runner], title: str, table: Callable[[Sequence[Point]], str]
) -> int:
    """`run_plans`, then a table of what was measured, under its title; the exit status."""
    points: list[Point] = []
    status = run_plans(options, runner, points.append)
    if points:
        print(title)
        print(table(points))
    return status


def measure_all(
    plans: Sequence[Plan],
    file: ResultsFile | None,
    make_runner: Callable[[Plan, Job], Runner] = Runner,
    job: Job = ALONE,
    seen: Callable[[Point], object] = lambda point: None,
    listing: Listing = SWEEP,
) -> int:
    """Measure, print and keep every point; the exit status. `seen` gets each printed point."""
    speaks = job.rank == 0
    status, finished = 0, 0
    progress = Progress(sum(len(plan.tokens) for plan in plans) if speaks else 0)

    def say(line: str, stream: TextIO) -> None:
        progress.clear()
        print(line, file=stream, flush=True)

    def stop(message: str, status: int = FAILED) -> int:
        progress.clear()
        return job.abort(message, status)

    try:
        for plan in plans:
            where = environment(plan.device) if speaks else {}
            runner = None  # gives back the memory of the last plan
            place = plan.case.precision
            runner = make_runner(plan, job)
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
