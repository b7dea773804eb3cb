"""One launch as a timeline: what its CTAs recorded, decoded and written as Chrome trace events.

A kernel built with `KernelConfig.trace` leaves marks in region `trace` of the workspace (a row per
CTA, `megamoe.regions.TRACE_NAMES`), and, where the region `tile_trace` exists, four words per tile
that a CTA worked: begin, end of the product, end of the epilogue, and a code. A word that is 0 was
not written: whoever launches zeroes both regions before.

Events follow the Trace Event Format, which Perfetto and chrome://tracing open: a process per rank
and a thread per CTA. Slices of a thread nest and do not overlap, whatever the clocks said: a slice
begins no earlier than the one before it ended. Neighbour: `trace` launches and writes the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megamoe import wire
from megamoe.ordering import FC1_DONE, TOKENS_IN
from megamoe.regions import TRACE_NAMES, TileRecord
from megamoe.schedule import PHASE_FC1, PHASE_FC2

COUNT, TILES, BARRIER, COMBINE = "count", "tiles", "barrier", "combine"
EPILOGUE = "epilogue"
PHASE_NAMES = {PHASE_FC1: "FC1", PHASE_FC2: "FC2"}
#: Marks that are an instant rather than the border of a slice.
INSTANTS = {"counted": "counted", "last_pull": "last pull"}
#: Marks that hold a sum of waits, and what for.
WAITS = {
    "wait_tokens_ns": f"for {TOKENS_IN.region}", "wait_fc1_out_ns": f"for {FC1_DONE.region}"
}  # fmt: skip
WAIT_COUNTER = "waits, summed over CTAs that are done"


@dataclass(frozen=True)
class TileTimes:
    """One tile that a CTA worked."""

    phase: int
    block: int  # over the whole pool
    column: int
    begin: int
    multiplied: int
    end: int


@dataclass(frozen=True)
class CtaTrace:
    """What one CTA recorded; a mark that is missing was not reached. Tiles in their order."""

    rank: int
    cta: int
    marks: Mapping[str, int]
    tiles: Sequence[TileTimes] = ()


@dataclass(frozen=True)
class Slice:
    name: str
    begin: int
    end: int
    args: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Clock:
    """What the recorded times count: `per_us` of them are a microsecond of the timeline. `note`
    tells a reader where that is no time.
    """

    unit: str
    per_us: int
    note: str


GPU_CLOCK = Clock("us", 1000, "microseconds of the GPU's global timer")
CPU_CLOCK = Clock(
    "steps", 1, "instructions of warps side by side, drawn as microseconds: an order, no time"
)


def decode_tile(words: Sequence[int]) -> TileTimes:
    tile = TileRecord(*words)
    return TileTimes(*wire.decode_tile(tile.code), tile.begin, tile.multiplied, tile.end)


def decode(
    rank: int, marks_CM: torch.Tensor, num_ctas: int, tiles_CTW: torch.Tensor | None = None
) -> list[CtaTrace]:
    """The records of one rank, from its regions `trace` and `tile_trace`."""
    traces = []
    for cta in range(num_ctas):
        words = marks_CM[cta, : len(TRACE_NAMES)].tolist()
        marks = {name: word for name, word in zip(TRACE_NAMES, words, strict=True) if word}
        assert "start" in marks, f"rank {rank}, CTA {cta} left no mark"
        tiles = [] if tiles_CTW is None else tiles_CTW[cta].tolist()
        traces.append(CtaTrace(rank, cta, marks, [decode_tile(t) for t in tiles if t[0]]))
    return traces


def shifts_of(traces: Iterable[CtaTrace]) -> dict[int, int]:
    """What to add to the times of every rank where each has a timer of its own: the ranks leave the
    dispatch barrier together, so the first CTA of each to do so stands at rank 0's time.
    """
    first: dict[int, int] = {}
    for trace in traces:
        at = trace.marks["dispatched"]
        first[trace.rank] = min(at, first.get(trace.rank, at))
    return {rank: first[min(first)] - at for rank, at in first.items()}


def shifted(trace: CtaTrace, by: int) -> CtaTrace:
    """The same some time later; sums of waits and cycles stay."""
    lasting = ("_ns", "_cycles")
    marks = {
        name: word if name.endswith(lasting) else word + by for name, word in trace.marks.items()
    }
    tiles = [
        replace(tile, begin=tile.begin + by, multiplied=tile.multiplied + by, end=tile.end + by)
        for tile in trace.tiles
    ]
    return CtaTrace(trace.rank, trace.cta, marks, tiles)


def _phases(trace: CtaTrace) -> Iterator[Slice]:
    """The slices of a CTA from outside, as recorded."""
    marks, tiles = trace.marks, trace.tiles
    borders = {
        COUNT: (marks["start"], marks.get("dispatched")),
        TILES: (marks.get("first_tile"), marks.get("last_tile")),
        BARRIER: (marks.get("last_tile"), marks.get("combined")),
        COMBINE: (marks.get("combined"), marks.get("end")),
    }
    if tiles and marks.get("last_tile"):  # `first_tile` is left by a CTA whose first tile is FC1
        first = min(marks.get("first_tile", tiles[0].begin), tiles[0].begin)
        borders[TILES] = first, max(marks["last_tile"], tiles[-1].end)
    for name, (begin, end) in borders.items():
        if begin is not None and end is not None:
            yield Slice(name, begin, end)


def slices_of(trace: CtaTrace, clock: Clock = GPU_CLOCK) -> Iterator[Slice]:
    """All slices of a CTA, a slice before those inside it; nested and in order."""
    done = 0
    for phase in _phases(trace):
        begin = max(phase.begin, done)
        done = max(phase.end, begin)
        args: dict[str, object] = {}
        if phase.name == TILES:
            args = {
                f"waited {what}, {clock.unit}": trace.marks.get(name, 0) / clock.per_us
                for name, what in WAITS.items()
            }
            args |= {"tiles": len(trace.tiles)} if trace.tiles else {}
        yield Slice(phase.name, begin, done, args)
        if phase.name == TILES:
            yield from _tile_slices(trace.tiles, begin, done)


def _tile_slices(tiles: Iterable[TileTimes], begin: int, end: int) -> Iterator[Slice]:
    """A slice per tile within (begin, end), and the epilogue in it."""

    def within(low: int, value: int) -> int:
        return min(max(low, value), end)

    for tile in tiles:
        begin = within(begin, tile.begin)
        multiplied = within(begin, tile.multiplied)
        done = within(multiplied, tile.end)
        name = PHASE_NAMES.get(tile.phase, f"phase {tile.phase}")
        yield Slice(name, begin, done, {"pool block": tile.block, "column": tile.column})
        yield Slice(EPILOGUE, multiplied, done)
        begin = done


def events_of(traces: Sequence[CtaTrace], clock: Clock = GPU_CLOCK) -> list[dict]:
    """The trace events of a launch, times from its first mark on."""
    origin = min(trace.marks["start"] for trace in traces)

    def at(time: int) -> float:
        return (time - origin) / clock.per_us

    events: list[dict] = []
    for rank in sorted({trace.rank for trace in traces}):
        mine = [trace for trace in traces if trace.rank == rank]
        events += _names(rank, mine)
        events += _wait_counter(rank, mine, at, clock)
    for trace in traces:
        place = {"pid": trace.rank, "tid": trace.cta}
        events += [
            {"ph": "X", "name": s.name, "cat": "launch", **place, "ts": at(s.begin),
             "dur": (s.end - s.begin) / clock.per_us, "args": s.args}
            for s in slices_of(trace, clock)
        ]  # fmt: skip
        events += [
            {"ph": "i", "name": name, "cat": "launch", **place, "ts": at(trace.marks[mark]),
             "s": "t"}
            for mark, name in INSTANTS.items() if mark in trace.marks
        ]  # fmt: skip
    return events


def _names(rank: int, traces: Iterable[CtaTrace]) -> Iterator[dict]:
    def entry(kind: str, tid: int, value: dict) -> dict:
        return {"ph": "M", "name": kind, "pid": rank, "tid": tid, "args": value}

    yield entry("process_name", 0, {"name": f"rank {rank}"})
    yield entry("process_sort_index", 0, {"sort_index": rank})
    for trace in traces:
        yield entry("thread_name", trace.cta, {"name": f"CTA {trace.cta}"})
        yield entry("thread_sort_index", trace.cta, {"sort_index": trace.cta})


def _wait_counter(rank: int, traces: Sequence[CtaTrace], at, clock: Clock) -> Iterator[dict]:
    """Sums of waits, which grow when a CTA is done with its tiles."""
    total = dict.fromkeys(WAITS, 0)

    def entry(time: int) -> dict:
        args = {what: total[name] / clock.per_us for name, what in WAITS.items()}
        return {"ph": "C", "name": WAIT_COUNTER, "pid": rank, "ts": at(time), "args": args}

    yield entry(min(trace.marks["start"] for trace in traces))
    ended = [trace for trace in traces if "last_tile" in trace.marks]
    for trace in sorted(ended, key=lambda trace: trace.marks["last_tile"]):
        for name in WAITS:
            total[name] += trace.marks.get(name, 0)
        yield entry(trace.marks["last_tile"])


def sm_clock_mhz(traces: Iterable[CtaTrace]) -> float | None:
    """The clock that the SMs had during the launch, on average; None if nobody counted cycles."""
    found = []
    for trace in traces:
        marks = trace.marks
        if {"start_cycles", "end_cycles", "end"} <= marks.keys() and marks["end"] > marks["start"]:
            cycles = marks["end_cycles"] - marks["start_cycles"]
            found.append(cycles * 1e3 / (marks["end"] - marks["start"]))
    return sum(found) / len(found) if found else None


def summary(traces: Sequence[CtaTrace], reset_bytes: int, clock: Clock = GPU_CLOCK) -> str:
    """Per phase: the mean over CTAs, and the longest; a line each. Then where the workspace's reset
    is among them: it has no marks of its own.
    """
    lengths: dict[str, list[float]] = {}
    for trace in traces:
        for phase in _phases(trace):
            length = (phase.end - phase.begin) / clock.per_us
            lengths.setdefault(phase.name, []).append(length)
    lines = [f"{'phase':>8}  {'mean ' + clock.unit:>12}  {'longest':>12}"]
    lines += [
        f"{name:>8}  {sum(values) / len(values):>12,.1f}  {max(values):>12,.1f}"
        for name, values in lengths.items()
    ]
    lines.append(
        f"reset of {reset_bytes:,} bytes: row metadata within {TILES}, as FC2 frees its blocks; "
        f"counters within {COMBINE}, whose time is an upper bound"
    )
    return "\n".join(lines)
