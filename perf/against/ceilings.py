"""Stored ceilings of GPUs (`perf/results/ceilings.csv`), and those that a roofline is drawn with.

The command `ceilings` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perf.against.roofline import H200, Ceilings
from perf.recording.columns import POSITIVE, Environment, column
from perf.recording.environment import REPOSITORY
from perf.recording.files import load as load_rows

STORED = REPOSITORY / "perf" / "results" / "ceilings.csv"


@dataclass(frozen=True, kw_only=True)
class CeilingRow(Environment):
    """One ceiling; `value` is of the median time, in `unit`.

    num_ranks: GPUs that were measured at once. dtype: of a GEMM. us_*: of one call of the probe,
    maximum over ranks.
    """

    num_ranks: int = column(POSITIVE)
    ceiling: str
    dtype: str
    value: float = column(POSITIVE)
    unit: str
    us_min: float = column(POSITIVE)
    us_median: float = column(POSITIVE)
    us_p95: float = column(POSITIVE)
    sm_mhz: float | None = column(default=None, added=True)
    power_w: float | None = column(default=None, added=True)
    energy_mj: float | None = column(default=None, added=True)


def load(path: str | Path):
    """Stored rows as a pandas DataFrame, oldest first; ValueError if `path` is no such file or has
    a row that cannot be.
    """
    frame = load_rows(path, kind=CeilingRow)
    return frame.sort_values("date", kind="stable", ignore_index=True)


def ceilings_of(path: str | Path, gpu: str, num_gpus: int) -> Ceilings:
    """The latest stored ceilings of this GPU, of as many GPUs at once if there are such; ValueError
    naming what is missing. Memory: the better of copy and read. NVLink: pull.
    """
    frame = load(path)
    frame = frame[frame.gpu == gpu]
    exact = frame[frame.num_ranks == num_gpus]

    def value(name: str, dtype: str = "", pools=(exact, frame)) -> float | None:
        for pool in pools:
            found = pool[(pool.ceiling == name) & (pool.dtype == dtype)]
            if len(found):
                return float(found.iloc[-1].value)
        return None

    gemm = {dtype: value("gemm", dtype) for dtype in H200.gemm_tflops}
    memory = [value(name) for name in ("hbm_copy", "hbm_read")]
    link = value("nvlink_pull", pools=[exact]) if num_gpus > 1 else H200.nvlink_gbps
    known = {"gemm": any(gemm.values()), "hbm": any(memory), "nvlink_pull": link}
    missing = [name for name, found in known.items() if not found]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)} of {num_gpus} x {gpu}")
    assert link is not None
    return Ceilings(
        {dtype: tflops for dtype, tflops in gemm.items() if tflops},
        max(filter(None, memory)) / 1e3,
        link,
    )
