"""What every role of one launch knows: its arguments, the static problem and its place in the grid.

`Launch` mixes Python constants (configuration, layout) with traced values (addresses, rank, token
count). It is built once at the top of the kernel and never reassigned. Region addresses come from
the region table alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Int32, Int64

from megamoe.kernels.ptx import global_ptr
from megamoe.launch_shape import LaunchShape
from megamoe.signature import Arguments
from workspace.layout import SYMMETRIC


@dataclass(frozen=True)
class Launch(Arguments):
    """One launch of one rank, as its roles see it. Addresses are Int64 bytes valid on this GPU."""

    shape: LaunchShape
    num_ctas: Int32
    cta: Int32
    thread: Int32


# Functions, not methods: the DSL would carry an object whose method is called in a loop through
# that loop.


def address(launch: Launch, name: str, index=0, word: int = 0):
    """Address of row `index` of a region of this rank, plus `word` int32 words."""
    region = launch.shape.layout[name]
    base = launch.symmetric_base if region.space == SYMMETRIC else launch.local_base
    return base + region_offset(region, index, word)


def peer_base(launch: Launch, rank):
    """Base of the symmetric space of `rank`."""
    return global_ptr(launch.peers + Int64(rank) * 8, Int64, 8)[0]


def peer_address(launch: Launch, name: str, rank, index=0, word: int = 0):
    """Address of row `index` of a symmetric region of `rank`."""
    region = launch.shape.layout[name]
    assert region.space == SYMMETRIC, name
    return peer_base(launch, rank) + region_offset(region, index, word)


def region_offset(region, index, word: int):
    """Byte offset of row `index` (first axis) of a region within its space."""
    return Int64(region.offset + 4 * word) + Int64(index) * region.row_bytes
