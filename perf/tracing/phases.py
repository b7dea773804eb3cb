"""Where the time of a launch goes: one row of phases per recorded launch.

`trace --phases` appends a row, `report` draws the rows of a file. Phases follow each other within a
CTA and are means over all CTAs, so that they add up to the launch. Dispatch pulls rows under the
products and FC2 sends its results from the epilogue: neither has a phase of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from perf.recording.columns import KEY, TIME, Launched, column, columns_of
from perf.tracing.timeline import BARRIER, COMBINE, COUNT, EPILOGUE, PHASE_NAMES, Slice

#: Field and name of each phase; the wait between tiles is what the others leave of the launch.
PHASES = {
    "count_us": "dispatch barrier",
    "fc1_us": "FC1 products",
    "fc2_us": "FC2 products",
    "epilogue_us": "epilogues",
    "wait_us": "wait for rows, tiles",
    "barrier_us": "wait for slowest rank",
    "combine_us": "rest of the combine",
}
TILE_FIELDS = dict(zip(PHASE_NAMES.values(), ("fc1_us", "fc2_us"), strict=True))
FIELDS = {COUNT: "count_us", BARRIER: "barrier_us", COMBINE: "combine_us", **TILE_FIELDS}


@dataclass(frozen=True, kw_only=True)
class PhaseRow(Launched):
    """One recorded launch: microseconds of every phase."""

    launch_us: float = column(TIME)
    count_us: float = column(TIME)
    fc1_us: float = column(TIME)
    fc2_us: float = column(TIME)
    epilogue_us: float = column(TIME)
    wait_us: float = column(TIME)
    barrier_us: float = column(TIME)
    combine_us: float = column(TIME)


def phases_of(ctas: Iterable[Iterable[Slice]], per_us: int) -> dict[str, float]:
    """`launch_us` and the phases, from the slices of all CTAs (`timeline.slices_of`)."""
    ctas = [list(slices) for slices in ctas]
    total = dict.fromkeys(PHASES, 0.0)
    for slices in ctas:
        tile = ""
        for part in slices:
            length = part.end - part.begin
            if part.name == EPILOGUE:  # inside the slice of its tile
                total["epilogue_us"] += length
                total[tile] -= length
            elif part.name in FIELDS:
                tile = FIELDS[part.name]
                total[tile] += length
    begin = min(part.begin for slices in ctas for part in slices)
    launch = (max(part.end for slices in ctas for part in slices) - begin) / per_us
    mean = {name: value / len(ctas) / per_us for name, value in total.items()}
    mean["wait_us"] = max(launch - sum(mean.values()), 0.0)  # not a rounding error below
    return {"launch_us": launch, **mean}


def sections_of(frame) -> dict[str, tuple[str, dict[int, dict[str, float]]]]:
    """{slug: (title, {tokens: {phase: microseconds}})} of rows (`files.load`), the latest of
    each launch.
    """
    what = [name for name in KEY if name in columns_of(PhaseRow)]
    latest = frame.sort_values("date", kind="stable").drop_duplicates(what, keep="last")
    key = [name for name in what if name != "tokens"]
    sections = {}
    for number, (_, rows) in enumerate(latest.groupby(key, sort=False)):
        launches = list(rows.sort_values("tokens").itertuples())
        row = launches[0]
        shared = f" with {s} shared" if (s := row.num_shared_experts) else ""
        title = f"{row.model}{shared}, EP{row.num_ranks}, {row.precision}, {row.routing} routing"
        sections[f"phases-{number}"] = (
            title,
            {
                launch.tokens: {name: getattr(launch, field) for field, name in PHASES.items()}
                for launch in launches
            },
        )
    return sections
