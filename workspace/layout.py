"""Regions of a workspace: what a buffer is, and where each lies.

A region has a name, dtype, shape, space and kind, one line each on who writes it, who reads it and
why it is or is not reset, and how it is accessed. From a table of them follow sizes and offsets
(64-bit), the host views (`workspace.views`) and the addresses that a kernel uses, so that host and
device cannot disagree. What the regions are for is the owner's matter.

Kinds (what happens between launches):
- counter: zero again; whoever launches sees to that.
- padding: zero again. Metadata of rows; a row that only pads must be inert.
- data: never reset; every byte is written before it is read within a launch.
- barrier: zeroed once at allocation, then never: epochs that only grow, shared with peers.

Spaces: symmetric regions are read or written by peers and lie at the same offset on every rank,
barrier header first; local regions are private to the rank, with everything that resets in one
contiguous span at the front. A symmetric region never resets: that would wipe the signal of a peer
that is already in the next launch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

ALIGNMENT = 128  # of every region: a cache line, and more than TMA and bulk copies ask for
SPAN_ALIGNMENT = 1024

COUNTER, PADDING, DATA, BARRIER = "counter", "padding", "data", "barrier"
KINDS = (COUNTER, PADDING, DATA, BARRIER)
RESET_KINDS = (COUNTER, PADDING)
SYMMETRIC, LOCAL = "symmetric", "local"
SPACES = (SYMMETRIC, LOCAL)
#: Regions of a space by kind, from its start: the header, then what resets, then the rest.
PLACES = (BARRIER, COUNTER, PADDING, DATA)


@dataclass(frozen=True)
class Region:
    """One buffer; `offset` counts bytes from the start of its space.

    dtype: a name of torch, with its number of bits. atomic: changed by atomic instructions while
    others look. bulk: TMA or bulk copies read or write it, so ordinary accesses to it need a proxy
    fence. host_writes: the host writes it between launches, and a launch may read that.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    space: str
    kind: str
    writer: str
    reader: str
    reason: str
    atomic: bool = False
    bulk: bool = False
    host_writes: bool = False
    offset: int = 0

    def __post_init__(self):
        assert self.kind in KINDS and self.space in SPACES, self
        assert self.space == (LOCAL if self.resets else self.space), f"{self.name} cannot reset"
        assert self.space == SYMMETRIC or self.kind != BARRIER, f"{self.name} is no barrier"

    @property
    def item_bytes(self) -> int:
        return int(re.findall(r"\d+", self.dtype)[0]) // 8

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return self.num_bytes // self.shape[0]

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    @property
    def resets(self) -> bool:
        return self.kind in RESET_KINDS


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def span_of(regions: Iterable[Region]) -> tuple[int, int]:
    """(begin, end) bytes of regions that lie beside each other in one space; (0, 0) if there are
    none.
    """
    regions = list(regions)
    return (
        min((region.offset for region in regions), default=0),
        max((region.end for region in regions), default=0),
    )


@dataclass(frozen=True)
class Layout:
    """A table of regions, the same on each of `num_ranks` ranks, with offsets."""

    num_ranks: int
    table: tuple[Region, ...]

    @cached_property
    def regions(self) -> dict[str, Region]:
        """By name, in the order of the table."""
        placed: dict[str, Region] = {}
        cursor = dict.fromkeys(SPACES, 0)
        for region in sorted(self.table, key=lambda region: PLACES.index(region.kind)):
            placed[region.name] = replace(region, offset=align_up(cursor[region.space], ALIGNMENT))
            cursor[region.space] = placed[region.name].end
        assert len(placed) == len(self.table), "two regions have one name"
        return {region.name: placed[region.name] for region in self.table}

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]

    def index(self, name: str) -> int:
        """Number of a region in the table: how a kernel names it in an error record."""
        return list(self.regions).index(name)

    def of_space(self, space: str) -> list[Region]:
        return [region for region in self.regions.values() if region.space == space]

    def of_kind(self, kind: str) -> list[Region]:
        return [region for region in self.regions.values() if region.kind == kind]

    def num_bytes(self, space: str) -> int:
        """Bytes to allocate for one space."""
        return align_up(span_of(self.of_space(space))[1], SPAN_ALIGNMENT)

    @property
    def total_bytes(self) -> int:
        return sum(self.num_bytes(space) for space in SPACES)

    @cached_property
    def reset_span(self) -> tuple[int, int]:
        """(begin, end) bytes in the local space that hold every region that resets, and nothing
        else.
        """
        return span_of(region for region in self.regions.values() if region.resets)

    @property
    def reset_bytes(self) -> int:
        begin, end = self.reset_span
        return end - begin

    @cached_property
    def header_span(self) -> tuple[int, int]:
        """(begin, end) bytes in the symmetric space of the barrier header."""
        return span_of(self.of_kind(BARRIER))

    def bytes_by_kind(self) -> dict[str, int]:
        return {kind: sum(region.num_bytes for region in self.of_kind(kind)) for kind in KINDS}

    def describe(self) -> str:
        """The table as text: bytes by region and by kind."""
        head = ("region", "kind", "space", "dtype", "shape", "bytes")
        rows = [
            (r.name, r.kind, r.space, r.dtype, "x".join(map(str, r.shape)), f"{r.num_bytes:,}")
            for r in self.regions.values()
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

        def line(row):
            cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
            return "  ".join([*cells, row[-1].rjust(widths[-1])])

        kinds = "  ".join(f"{kind} {size:,}" for kind, size in self.bytes_by_kind().items())
        reset = f"reset between launches {self.reset_bytes:,} of {self.total_bytes:,}"
        summary = f"bytes by kind: {kinds}; {reset}"
        return "\n".join(
            [line(head), line(tuple("-" * width for width in widths)), *map(line, rows), summary]
        )
