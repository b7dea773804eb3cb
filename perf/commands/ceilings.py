"""The command `ceilings`: measure what this machine's GPUs do at their best, and keep it.

Every ceiling (`probes`) is a row of a CSV file with the columns of its environment. `sweep
--ceilings FILE` draws its roofline from such rows instead of those that `roofline` has. With
torchrun all GPUs are measured at once, the slowest counts, and NVLink comes on top.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perf.against.ceilings import STORED, CeilingRow, load
from perf.arguments import integer, one_of, option
from perf.recording.environment import environment
from perf.recording.files import ResultsFile
from perf.running import probes
from perf.running.jobs import ALONE, Job, place_of
from perf.running.options import csv_option
from perf.running.probes import Probe
from perf.running.processes import joined
from perf.running.timing import Times
from perf.running.together import measure_together

SUMMARY = "measure GEMM, memory, launch and NVLink ceilings on the GPUs here and store them"
EPILOG = "With torchrun all GPUs are measured at once, and NVLink and a barrier on top."


def row_of(probe: Probe, times: Times, num_ranks: int, where: dict[str, Any]) -> CeilingRow:
    return CeilingRow(
        **where,
        num_ranks=num_ranks,
        ceiling=probe.name,
        dtype=probe.dtype,
        value=probe.value(times.us_median),
        unit=probe.unit,
        **times.columns,
    )


def table(rows) -> str:
    """Stored or new rows, one per line."""
    lines = [
        f"{row.ceiling:<12} {row.dtype:<14} {row.value:>10,.2f} {row.unit:<8} "
        f"{row.num_ranks} x {row.gpu}, {str(row.date)[:10]}, torch {row.torch}, "
        f"driver {row.driver}"
        for row in rows
    ]
    return "\n".join(lines)


def measured(device: torch.device, reps: int, job: Job = ALONE) -> Iterator[CeilingRow]:
    """Every ceiling of this machine, as it is measured; collective with a job. A probe that this
    torch does not have is named on stderr and left out.
    """
    where = environment(device)

    def times_of(probe: Probe) -> Times:
        return measure_together(job, probe.call, device, probe.mode, reps)[0]

    for make in probes.ONE_GPU:
        try:
            probe = make(device)
            times = times_of(probe)
        except (RuntimeError, AttributeError) as error:
            if not job.alone and not isinstance(error, AttributeError):
                raise  # other ranks may be waiting: all end together
            print(f"{make.__name__} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        yield row_of(probe, times, job.size, where)
        del probe
        torch.cuda.empty_cache()
    if not job.alone:
        for probe in probes.nvlink(job):
            yield row_of(probe, times_of(probe), job.size, where)


@dataclass(frozen=True)
class Options:
    device: str | None = option(
        "cuda measures, cpu shows what is stored (default: cuda where there is a GPU)",
        type=one_of(("cuda", "cpu")),
        metavar="NAME",
    )
    csv: str = csv_option(
        "where rows are stored (default: perf/results/ceilings.csv)", default=str(STORED)
    )
    reps: int = option("timed calls", default=20, type=integer(1, 10_000), metavar="N")


def show(path: Path) -> int:
    """Print what is stored; 0."""
    if not path.is_file():
        print(f"nothing is stored in {path}")
        return 0
    frame = load(path)
    print(f"{len(frame)} stored ceilings, {path}:")
    print(table(frame.itertuples(index=False)))
    return 0


def run(options: Options) -> int:
    """Measure, print and store every ceiling, or show the stored ones without a GPU; 0."""
    if options.device == "cpu" or not torch.cuda.is_available():
        why = "as asked" if options.device == "cpu" else "torch sees no GPU"
        print(f"nothing is measured on a CPU ({why})")
        return show(Path(options.csv))
    file = ResultsFile(options.csv, CeilingRow)
    with joined(place_of(os.environ)) as job:
        rows = measured(torch.device("cuda"), options.reps, job)
        return keep(file if job.rank == 0 else None, rows)


def keep(file: ResultsFile | None, rows: Iterator[CeilingRow]) -> int:
    """Print and store rows as they come; without a file only take them. 0, or 130 after an
    interrupt.
    """
    count = 0
    try:
        for row in rows:
            if file:
                file.append(row)  # first, as nobody may read stdout any more
                count += 1
                print(table([row]), flush=True)
    except KeyboardInterrupt:
        print(f"interrupted: {count} finished row(s) kept", file=sys.stderr)
        return 130
    return 0
