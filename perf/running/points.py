"""One measurement of one implementation, before it becomes a row or a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from perf.against.roofline import Roofline, Work
from perf.recording.columns import Row
from perf.running.timing import Times
from perf.workload.cases import Case


@dataclass(frozen=True)
class Point:
    """What one implementation did at one token count; None is what was not measured. `mode`: as
    `Plan.label` has it. max_error: the largest `error` that is rounding.
    """

    case: Case
    mode: str
    impl: str
    times: Times
    work: Work | None  # None where the time is no GPU's, or not of all of the work
    roofline: Roofline | None  # None there, and where ceilings are not known
    error: float | None
    nvlink_bytes: int | None = None  # counted on a CPU
    reset_bytes: int | None = None
    workspace_bytes: int | None = None
    config: str = ""
    max_error: float = inf

    @property
    def problem(self) -> str:
        """Why the measurement failed, in a line; empty if it did not."""
        if self.error is None or self.error <= self.max_error:
            return ""
        return f"{self.impl} is wrong at {self.case.tokens} tokens: error {self.error:.2e}"

    def row(self, where: dict[str, Any]) -> Row:
        """The result row of this point, measured at `where` (`environment`)."""
        us = self.times.us_median
        bound: dict[str, Any] = {}
        if self.roofline:
            bound = {
                "roofline_us": self.roofline.us,
                "roofline_bound": self.roofline.bound,
                "roofline_share": self.roofline.share(us),
            }
        return Row(
            **where,
            **self.case.columns,
            mode=self.mode,
            impl=self.impl,
            **self.times.columns,
            tflops=self.work.tflops(us) if self.work else None,
            **bound,
            error_rel=self.error,
            reset_bytes=self.reset_bytes,
            workspace_bytes=self.workspace_bytes,
            config=self.config,
        )


def medians_of(
    points: Iterable[Point], impls: Sequence[str]
) -> list[tuple[tuple[str, int], list[float]]]:
    """((precision, tokens), median us of each of `impls`) where all of them have finished."""
    us: dict[tuple[str, int], dict[str, float]] = {}
    for point in points:
        key = (point.case.precision, point.case.tokens)
        us.setdefault(key, {})[point.impl] = point.times.us_median
    return [
        (key, [by[impl] for impl in impls]) for key, by in us.items() if by.keys() >= set(impls)
    ]
