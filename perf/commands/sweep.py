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

from perf.running.options import SweepOptions as Options
from perf.running.plan import write_configs
from perf.running.session import run_plans

__all__ = ["SUMMARY", "Options", "run"]

SUMMARY = "time one model over token counts and check every output (default: on the CPU)"
EPILOG = (
    "Exit status: 0 if every output was right, 1 after a wrong output, a failed launch or the end "
    "of memory or disk, 2 for wrong arguments, 130 after an interrupt; finished rows are kept. "
    "With a process per GPU: torchrun --nproc-per-node N -m perf sweep --device cuda ..."
)


def run(options: Options) -> int:
    """Run the sweep, or list its kernels; the exit status (`run_plans`)."""
    if options.list_configs:
        return write_configs(options, [{}])
    return run_plans(options)
