"""How the points of a command are printed and kept: the columns, and the lines above them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from perf.against import deepep
from perf.recording.columns import Row
from perf.running.plan import Plan
from perf.running.points import Point
from perf.workload.cases import Case
from perf.workload.parts import STAGING
from perf.workload.routings import label_of


def _error(point: Point) -> str:
    return "-" if point.error is None else f"{point.error:.2e}"


def _of(name: str, text: Callable[[Any], str]) -> Callable[[Point], str]:
    """The text of a point that has this."""
    return lambda point: text(point) if getattr(point, name) else "-"


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
    ("TFLOP/s/GPU", 11, _of("work", lambda p: f"{p.work.tflops(p.times.us_median):.1f}")),
    ("roofline us", 11, _of("roofline", lambda p: f"{p.roofline.us:.1f}")),
    ("bound", 6, _of("roofline", lambda p: p.roofline.bound)),
    ("share", 5, _of("roofline", lambda p: f"{p.roofline.share(p.times.us_median):.2f}")),
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
    shape += f" S={model.num_shared_experts}" if model.num_shared_experts else ""
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
    if not (plan.emulated or plan.ceilings):
        lines.append(f"ceilings of {gpu} are not known, so there is no roofline: see --ceilings")
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
