"""The queue of tiles: one warp of a CTA takes tickets and hands tiles over, the others take them.

A ticket is a place in the one order of all tiles of a rank (`schedule`). QUEUE_SLOTS tiles are on
their way at a time, each with the block scales of its weights.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr, range_constexpr

from megamoe import schedule
from megamoe.budget import QUEUE_SLOTS, QUEUE_WORDS, WEIGHT_SCALE_BYTES
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch
from megamoe.kernels.ptx import bulk_load

arch = cute.arch


class Pipes(NamedTuple):
    """Shared-memory pointers of the pipelines (see `kernel`): mbarriers, the words of the tile
    queue, the scales that come with stages and with tiles, and the tiles' padding metadata.
    """

    full: cute.Pointer
    empty: cute.Pointer
    queue: cute.Pointer
    queue_full: cute.Pointer
    queue_empty: cute.Pointer
    row_scales: cute.Pointer
    weight_scales: cute.Pointer
    metadata: cute.Pointer
    metadata_full: cute.Pointer
    multiplied: cute.Pointer
    stored: cute.Pointer


class Entry(NamedTuple):
    """A tile as handed over: the words of a queue slot, in order."""

    phase: Int32
    pool: Int32  # pool block
    column: Int32
    rows: Int32  # real rows
    expert: Int32
    block: Int32  # pool block within the expert


@cute.jit
def take_tile(pipes: Pipes, taken) -> Entry:
    """Tile number `taken` of the queue; give it back with `release_tile`."""
    slot = taken % QUEUE_SLOTS
    arch.mbarrier_wait(pipes.queue_full + slot, (taken // QUEUE_SLOTS) % 2)
    words = pipes.queue + slot * QUEUE_WORDS
    return Entry(*[words[word] for word in range(len(Entry._fields))])


@cute.jit
def k_blocks_of(launch: Launch, tile) -> Int32:
    """K blocks of a tile."""
    k_blocks = Int32(launch.shape.fc1_k_blocks)
    if tile.phase == schedule.PHASE_FC2:
        k_blocks = Int32(launch.shape.fc2_k_blocks)
    return k_blocks


@cute.jit
def release_tile(pipes: Pipes, taken, lane):
    """This warp has read what the queue holds of tile number `taken`."""
    arch.sync_warp()
    if lane == 0:
        arch.mbarrier_arrive(pipes.queue_empty + taken % QUEUE_SLOTS)


@cute.jit
def report_stored(launch: Launch, pipes: Pipes, tile, taken, arrivals, place, times, lane):
    """This math warp has stored its part of tile number `taken`; it arrives for so many warps.
    `times`: of the warp with `place` 0, when it took the tile and when its product was done.
    """
    arch.sync_warp()
    if lane == 0:
        arch.mbarrier_arrive(pipes.stored + taken % QUEUE_SLOTS, arrive_count=arrivals)
    if place == 0 and lane == 0:
        ends = [*times, sync.trace_clock(launch)]
        sync.record_tile(launch, taken, tile.phase, tile.pool, tile.column, ends)


@cute.jit
def hand_over(launch: Launch, pipes, slot, tile: Entry, lane):
    """Put a tile into its queue slot, and with it the block scales of its weights."""
    shape = launch.shape
    if lane == 0:
        words = pipes.queue + slot * QUEUE_WORDS
        for word in range_constexpr(len(tile)):
            words[word] = tile[word]
        full = pipes.queue_full + slot
        if const_expr(shape.weight_scale_bytes == 0):
            arch.mbarrier_arrive(full)
        else:
            to = pipes.weight_scales + slot * shape.weight_scale_bytes
            if tile.phase == schedule.PHASE_FC1:
                num_bytes = shape.fc1_k_blocks * WEIGHT_SCALE_BYTES
                index = tile.expert * shape.fc1_columns + tile.column
                arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
                bulk_load(to, launch.w13_scales + Int64(index) * num_bytes, full, num_bytes)
            elif tile.phase == schedule.PHASE_FC2:
                num_bytes = shape.fc2_k_blocks * WEIGHT_SCALE_BYTES
                index = tile.expert * shape.fc2_columns + tile.column
                arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
                bulk_load(to, launch.w2_scales + Int64(index) * num_bytes, full, num_bytes)
            else:
                arch.mbarrier_arrive(full)
    arch.sync_warp()


@cute.jit
def next_tile(launch: Launch, pipes, tickets, stream, walk, handed, received, expert_ids, lane):
    """Take a ticket, walk on to its tile and hand it over as tile number `handed`, once there is
    room. Returns the walk and the tile. `tickets`: where they are counted; `stream`: see
    `LaunchShape.stream`.
    """
    ticket = Int32(0)
    if lane == 0:
        ticket = arch.atomic_add(tickets, Int32(1), sem="relaxed", scope="gpu")
    ticket = arch.shuffle_sync(ticket, 0)
    walk = schedule.seek_walk(walk, ticket, received, *stream)
    slot = handed % QUEUE_SLOTS
    arch.mbarrier_wait(pipes.queue_empty + slot, (handed // QUEUE_SLOTS + 1) % 2)
    tile = schedule.Tile(Int32(0), Int32(0), Int32(0))
    rows, expert = Int32(0), Int32(0)
    if walk.phase != schedule.PHASE_DONE:
        tile = schedule.tile_of(walk, ticket)
        rows = schedule.rows_in_block(
            received[walk.expert], tile.block, launch.shape.kernel.block_m
        )
        expert = Int32(expert_ids[walk.expert])
    entry = Entry(walk.phase, tile.pool, tile.column, rows, expert, tile.block)
    hand_over(launch, pipes, slot, entry, lane)
    return walk, entry
