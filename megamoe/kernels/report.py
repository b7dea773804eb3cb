"""The report warp: tells other CTAs and ranks which tiles are stored.

A release waits until the stores that it covers have been performed, which takes a microsecond under
load; so no math warp waits for it. Their stores come before their arrivals at `stored`, and so
before the release of the warp that waited there: causality order is transitive, and the proxy fence
may stand anywhere along it. Between reports the warp reduces tokens.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32

from megamoe import schedule, wire
from megamoe.budget import QUEUE_SLOTS
from megamoe.config import GEMMS
from megamoe.kernels import sync
from megamoe.kernels.combine import Reducing, reduce_step, start_reducing
from megamoe.kernels.launch import Launch, address, peer_address
from megamoe.kernels.ptx import global_ptr, store_global
from megamoe.kernels.tiles import Pipes, release_tile, take_tile
from megamoe.ordering import FC1_DONE, FC1_STORED, FC2_DONE, ROWS_SENT, TOKEN_IN

arch = cute.arch


@cute.jit
def await_stored(launch: Launch, pipes: Pipes, taken, state: Reducing, worker, lane) -> Reducing:
    """Reduce until the math warps have stored tile number `taken`."""
    barrier, phase = pipes.stored + taken % QUEUE_SLOTS, taken // QUEUE_SLOTS % 2
    stored = Int32(0)
    while state.left > 0 and stored == 0:
        stored = arch.shuffle_sync(Int32(arch.mbarrier_test_wait(barrier, phase)), 0)
        if stored == 0:
            state = reduce_step(launch, state, worker, lane)
    arch.mbarrier_wait(barrier, phase)
    return state


@cute.jit
def report(launch: Launch, pipes: Pipes, worker, lane) -> Reducing:
    """Report every tile of the CTA once its math warps have stored it. Returns how far worker
    number `worker` has come with reducing.
    """
    state = start_reducing(launch, worker)
    taken = Int32(0)
    running = Int32(launch.shape.kernel.runs(GEMMS))
    while running == 1:
        tile = take_tile(pipes, taken)
        if tile.phase == schedule.PHASE_DONE:
            running = Int32(0)
        else:
            state = await_stored(launch, pipes, taken, state, worker, lane)
        release_tile(pipes, taken, lane)
        if tile.phase == schedule.PHASE_FC1:
            arch.fence_proxy(FC1_STORED.kind)
            if lane == 0:
                sync.signal(launch, FC1_DONE, tile.pool)
        elif tile.phase == schedule.PHASE_FC2:
            report_fc2(launch, lane, tile.pool)
        taken += 1
    return state


@cute.jit
def report_fc2(launch: Launch, lane, pool):
    """The last report of a block tells the source of every row that it is in, cleans the padding
    metadata and frees the ring slot.
    """
    shape = launch.shape
    max_slots = shape.config.max_slots_per_rank
    before = Int32(0)
    if lane == 0:
        counter = global_ptr(address(launch, FC2_DONE.region, pool))
        before = arch.atomic_add(counter, Int32(1), sem="acq_rel", scope=FC2_DONE.scope)
    before = arch.shuffle_sync(before, 0)
    if before == shape.fc2_done - 1:
        first_row = schedule.ring_row(pool, shape.ring, shape.kernel.block_m)
        arch.sync_warp()  # what lane 0 has acquired comes before what every lane does
        sync.fence_system(ROWS_SENT)
        for row in range(lane, shape.kernel.block_m, 32):
            metadata = global_ptr(address(launch, "token_src_metadata", first_row + row))
            code = arch.load(metadata, Int32, sem="relaxed", scope="gpu")
            if code != wire.PADDING:
                rank = wire.source_rank(code, max_slots)
                token = wire.source_slot(code, max_slots) // shape.config.slots_per_token
                arrived = global_ptr(peer_address(launch, TOKEN_IN.region, rank, token))
                scope = TOKEN_IN.scope
                arch.red(arrived, Int32(1), op="add", dtype="s32", sem="relaxed", scope=scope)
            for name in shape.paddings:
                store_global(address(launch, name, first_row + row), Int32(0))
        arch.sync_warp()
        if lane == 0:
            sync.signal(launch, FC2_DONE, pool)
