"""SM90 epilogues: FC1 (SwiGLU x router weight -> fc1_output) and FC2 (rows -> slots of the source
rank).

A math warp owns 16 rows of the tile. Accumulator element (q, r, j) of a lane is row lane / 4 + 8 r,
column 8 j + 2 (lane % 4) + q. Results leave in passes of 16 rows x 64 columns through 2 KB of
shared memory per warp, swizzled in 16-byte chunks, so that every global store is 16 bytes per lane
and 128 contiguous bytes per row.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, range_constexpr

from megamoe import schedule
from megamoe.budget import PASS_ROW_BYTES, WARP_ROWS
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch, address, peer_address, peer_base
from megamoe.kernels.ptx import (
    as_float,
    global_ptr,
    load_shared_v4,
    pack_bf16x2,
    silu,
    store_global,
    store_global_v4,
    store_shared,
)
from workspace import wire

arch = cute.arch

PASS_COLUMNS = PASS_ROW_BYTES // 2
SLABS_PER_PASS = PASS_COLUMNS // 8
#: Rows that one lane stores per pass: the warp covers 4 rows of 128 bytes with one instruction.
STORES_PER_PASS = WARP_ROWS // 4


@cute.jit
def read_metadata(launch: Launch, name: Constexpr, ring_row) -> Int32:
    """A word of padding metadata, past L1: another CTA's dispatch warp wrote it."""
    return arch.load(global_ptr(address(launch, name, ring_row)), Int32, sem="relaxed", scope="gpu")


@cute.jit
def stage_word(staging, lane, half: Constexpr, slab: Constexpr, word):
    """Put columns 2 (lane % 4) .. + 1 of slab `slab` of row lane / 4 + 8 `half` into the swizzled
    staging tile.
    """
    row = lane // 4 + 8 * half
    chunk = slab ^ (row % 8)
    store_shared(staging + (row * PASS_ROW_BYTES + chunk * 16 + (lane % 4) * 4), word)


@cute.jit
def unstage(staging, lane, store: Constexpr):
    """16 bytes of row 4 * store + lane / 8, chunk lane % 8."""
    row = 4 * store + lane // 8
    chunk = (lane % 8) ^ (row % 8)
    return load_shared_v4(staging + (row * PASS_ROW_BYTES + chunk * 16))


@cute.jit
def store_fc1(launch: Launch, accumulator, staging, warp, lane, pool, column):
    """FC1 tile of pool block `pool`: 128 outputs per row to `fc1_output`, then one report per
    warp.
    """
    shape = launch.shape
    first_row = schedule.ring_row(pool, shape.ring, shape.kernel.block_m) + warp * WARP_ROWS
    weights = [
        as_float(read_metadata(launch, "l1_topk_weights_buffer", first_row + lane // 4 + 8 * half))
        for half in range(2)
    ]
    outputs = shape.kernel.block_n // 2
    row_bytes = shape.hidden_row_bytes
    base = address(launch, "fc1_output", first_row) + column * (2 * outputs) + (lane % 8) * 16
    for step in range_constexpr(outputs // PASS_COLUMNS):
        for slab in range_constexpr(SLABS_PER_PASS):
            gate = 4 * (2 * (step * SLABS_PER_PASS + slab))
            for half in range_constexpr(2):
                values = []
                for q in range_constexpr(2):
                    index = gate + 2 * half + q
                    values.append(silu(accumulator[index]) * accumulator[index + 4] * weights[half])
                stage_word(staging, lane, half, slab, pack_bf16x2(values[0], values[1]))
        arch.sync_warp()
        for store in range_constexpr(STORES_PER_PASS):
            row = 4 * store + lane // 8
            words = unstage(staging, lane, store)
            store_global_v4(base + Int64(row) * row_bytes + step * PASS_ROW_BYTES, words)
        arch.sync_warp()


@cute.jit
def report_fc1(launch: Launch, lane, pool):
    """One report per warp; the proxy fence lets TMA of other CTAs read what these stores wrote."""
    arch.fence_proxy("async.global")
    arch.sync_warp()
    if lane == 0:
        sync.signal(launch, "fc1_done_counter", pool)


@cute.jit
def store_fc2(launch: Launch, accumulator, staging, warp, lane, pool, column):
    """FC2 tile of pool block `pool`: real rows to `combine_output` of their source rank."""
    shape = launch.shape
    first_row = schedule.ring_row(pool, shape.ring, shape.kernel.block_m) + warp * WARP_ROWS
    max_slots = shape.config.max_slots_per_rank
    row_bytes = shape.output_row_bytes
    region_offset = shape.layout["combine_output"].offset
    tile_bytes = 2 * shape.kernel.block_n
    targets = cute.make_rmem_tensor((STORES_PER_PASS,), Int64)
    for store in range_constexpr(STORES_PER_PASS):
        code = read_metadata(launch, "token_src_metadata", first_row + 4 * store + lane // 8)
        target = Int64(0)
        if code != wire.PADDING:
            slot = wire.source_slot(code, max_slots)
            target = peer_base(launch, wire.source_rank(code, max_slots)) + Int64(region_offset)
            target += Int64(slot) * row_bytes + Int64(column) * tile_bytes + (lane % 8) * 16
        targets[store] = target
    for step in range_constexpr(shape.kernel.block_n // PASS_COLUMNS):
        if column * tile_bytes + step * PASS_ROW_BYTES < row_bytes:
            for slab in range_constexpr(SLABS_PER_PASS):
                for half in range_constexpr(2):
                    index = 4 * (step * SLABS_PER_PASS + slab) + 2 * half
                    stage_word(
                        staging,
                        lane,
                        half,
                        slab,
                        pack_bf16x2(accumulator[index], accumulator[index + 1]),
                    )
            arch.sync_warp()
            for store in range_constexpr(STORES_PER_PASS):
                words = unstage(staging, lane, store)
                if targets[store] != 0:
                    store_global_v4(targets[store] + step * PASS_ROW_BYTES, words)
            arch.sync_warp()


@cute.jit
def report_fc2(launch: Launch, lane, pool):
    """One report per warp. The last one of the block tells the source of every row that it is in,
    cleans the padding metadata and frees the ring slot.
    """
    shape = launch.shape
    max_slots = shape.config.max_slots_per_rank
    arch.sync_warp()
    before = Int32(0)
    if lane == 0:
        counter = global_ptr(address(launch, "fc2_done_counter", pool))
        before = arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu")
    before = arch.shuffle_sync(before, 0)
    if before == shape.fc2_done - 1:
        first_row = schedule.ring_row(pool, shape.ring, shape.kernel.block_m)
        # Orders all rows of the block, which other warps stored and reported, before the counts.
        arch.fence_acq_rel_sys()
        for row in range(lane, shape.kernel.block_m, 32):
            code = read_metadata(launch, "token_src_metadata", first_row + row)
            if code != wire.PADDING:
                rank = wire.source_rank(code, max_slots)
                token = wire.source_slot(code, max_slots) // shape.config.top_k
                arrived = global_ptr(peer_address(launch, "combine_arrival_count", rank, token))
                arch.red(arrived, Int32(1), op="add", dtype="s32", sem="relaxed", scope="sys")
            store_global(address(launch, "l1_topk_weights_buffer", first_row + row), Int32(0))
            store_global(address(launch, "token_src_metadata", first_row + row), Int32(0))
        arch.sync_warp()
        if lane == 0:
            sync.signal(launch, "fc2_done_counter", pool)
