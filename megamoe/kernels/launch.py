"""What every role of one launch knows: the static problem and the addresses of this rank.

`Launch` mixes Python constants (configuration, layout) with traced values (addresses, rank, token
count). It is built once at the top of the kernel and never reassigned. Region addresses come from
the region table alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Float32, Int32, Int64

from megamoe.kernels.ptx import global_ptr
from megamoe.shape import Shape
from workspace.layout import SYMMETRIC


@dataclass(frozen=True)
class Launch:
    """One launch of one rank, as its roles see it. Addresses are Int64 bytes valid on this GPU."""

    shape: Shape
    symmetric_base: Int64
    local_base: Int64
    peers: Int64  # int64 [W]: symmetric base of every rank
    w13_scales: (
        Int64  # scales of w13 and w2 as `weights.write_tile_scales` lays them out; 0 without
    )
    w2_scales: Int64
    x: Int64  # token [T, H]; recipes with scales: bfloat16 [T, H] to quantise, or 0 if staged
    topk_idx: Int64  # int32 or int64 [T, K]
    topk_weights: Int64  # float32 [T, K]
    y: Int64  # output [T, H]
    expert_counts: Int64  # int32 [e] that received rows are added to, or 0
    record: Int64  # host-visible error record
    timeout_ns: Int64  # of a wait, once all ranks have begun
    start_timeout_ns: Int64  # of a wait for CTAs and ranks to begin
    rank: Int32
    layer: Int32  # number of the layer, the same on every rank
    num_tokens: Int32  # or faults.NO_INPUT
    wide_idx: Int32  # 1 if topk_idx holds int64
    dependents: Int32  # 1 if the next kernel of the stream may begin beside this launch
    clamp: Float32  # of gate and up before SwiGLU; infinite: none
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
    row_bytes = region.num_bytes // region.shape[0]
    return Int64(region.offset + 4 * word) + Int64(index) * row_bytes
