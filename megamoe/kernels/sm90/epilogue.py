"""SM90 epilogues: FC1 (SwiGLU x router weight -> fc1_output) and FC2 (rows -> slots of the source
rank).

A math warp owns 16 rows of the tile. Accumulator element (q, r, j) of a lane is row lane / 4 + 8 r,
column 8 j + 2 (lane % 4) + q. The columns of an FC1 tile are 64 gate, their 64 up, 64 gate, 64 up
(`operands`). Results leave in passes of 16 rows x 128 bytes through 2 KB of shared memory per warp,
swizzled in 16-byte chunks, so that every global store is 16 bytes per lane and 128 contiguous bytes
per row.
"""

from __future__ import annotations

import operator

import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr, range_constexpr

from megamoe import schedule, wire
from megamoe.activation import ADD, MULTIPLY, SWIGLU, column_operands
from megamoe.budget import PASS_ROW_BYTES, WARP_ROWS
from megamoe.kernels.activation import ACTIVATIONS, NO_LIMIT
from megamoe.kernels.launch import Launch, address, peer_base
from megamoe.kernels.ptx import (
    as_float,
    as_word,
    global_ptr,
    load_global_v2,
    load_shared,
    load_shared_v4,
    pack_bf16x2,
    store_global,
    store_global_v4,
    store_shared,
    store_shared_e4m3x2,
)
from megamoe.kernels.quantize import largest_of_lanes, magnitude, scale_of

arch = cute.arch

#: How a column operand is combined with the sums of its column.
COMBINE = {MULTIPLY: operator.mul, ADD: operator.add}
PASS_COLUMNS = PASS_ROW_BYTES // 2
SLABS_PER_PASS = PASS_COLUMNS // 8
#: Rows that one lane stores per pass: the warp covers 4 rows of 128 bytes with one instruction.
STORES_PER_PASS = WARP_ROWS // 4


@cute.jit
def stage_pair(staging, lane, half: Constexpr, slab: Constexpr, low, high, item_bytes: Constexpr):
    """Put columns 2 (lane % 4) .. + 1 of slab `slab` of row lane / 4 + 8 `half` into the swizzled
    staging tile, as BF16 or (one byte) e4m3.
    """
    row = lane // 4 + 8 * half
    offset = slab * 8 * item_bytes
    chunk = (offset // 16) ^ (row % 8)
    pointer = staging + (
        row * PASS_ROW_BYTES + chunk * 16 + offset % 16 + (lane % 4) * 2 * item_bytes
    )
    if const_expr(item_bytes == 1):
        store_shared_e4m3x2(pointer, low, high)
    else:
        store_shared(pointer, pack_bf16x2(low, high))


@cute.jit
def unstage(staging, lane, store: Constexpr):
    """16 bytes of row 4 * store + lane / 8, chunk lane % 8."""
    row = 4 * store + lane // 8
    chunk = (lane % 8) ^ (row % 8)
    return load_shared_v4(staging + (row * PASS_ROW_BYTES + chunk * 16))


def gate_index(slab: int) -> int:
    """Accumulator index of the gate values of output slab `slab` (8 of the tile's 128 outputs); its
    up values lie UP_INDEX on. A tile holds 64 gate columns, their 64 up columns, and so on.
    """
    return 4 * (slab // 8 * 16 + slab % 8)


UP_INDEX = 4 * 8


@cute.jit
def bound(accumulator, function: Constexpr, limit):
    """The activation's bounds."""
    for index in range_constexpr(cute.size(accumulator)):
        is_up = index // UP_INDEX % 2 == 1
        accumulator[index] = function(accumulator[index], is_up, limit)


@cute.jit
def store_fc1(launch: Launch, accumulator, staging, metadata, warp, lane, pool, column):
    """FC1 tile of pool block `pool`: 128 outputs per row to `fc1_output`, and their scale where the
    recipe has one.
    """
    shape, recipe = launch.shape, launch.shape.config.recipe
    block_m = shape.kernel.block_m
    first_row = schedule.ring_row(pool, shape.ring, block_m) + warp * WARP_ROWS
    row = warp * WARP_ROWS + lane // 4
    weights = [as_float(load_shared(metadata + (row + 8 * half))) for half in range(2)]
    columns = shape.kernel.block_n // 2
    tile_bytes = recipe.hidden.num_bytes(columns)
    slabs = columns // 8
    activation = ACTIVATIONS[SWIGLU.name]
    if launch.clamp < NO_LIMIT:  # a branch around the work: most layers have none
        bound(accumulator, activation.bound, launch.clamp)
    for slab in range_constexpr(slabs):
        for half in range_constexpr(2):
            index = gate_index(slab) + 2 * half
            gates = [accumulator[index + q] for q in range(2)]
            ups = [accumulator[index + q + UP_INDEX] for q in range(2)]
            outputs = activation.outputs(gates, ups, ())
            for q in range_constexpr(2):
                accumulator[index + q] = outputs[q]
    factors = weights
    if const_expr(recipe.hidden.has_scales):
        factors = []
        for half in range_constexpr(2):
            values = [
                accumulator[gate_index(slab) + 2 * half + q]
                for slab in range(slabs)
                for q in range(2)
            ]
            # The largest product is the largest value times the weight.
            amax = largest_of_lanes(magnitude(values), 4) * magnitude([weights[half]])
            scale, inverse = scale_of(amax)
            factors.append(inverse * weights[half])
            target = address(launch, "fc1_output_scale", pool % shape.ring)
            row = warp * WARP_ROWS + lane // 4 + 8 * half
            if lane % 4 == 0:
                store_global(target + Int64(column * block_m + row) * 4, as_word(scale))
    row_bytes = shape.fc1_out_row_bytes
    base = address(launch, "fc1_output", first_row) + column * tile_bytes + (lane % 8) * 16
    passes = tile_bytes // PASS_ROW_BYTES
    for step in range_constexpr(passes):
        for slab in range_constexpr(slabs // passes):
            for half in range_constexpr(2):
                index = gate_index(step * (slabs // passes) + slab) + 2 * half
                stage_pair(
                    staging,
                    lane,
                    half,
                    slab,
                    accumulator[index] * factors[half],
                    accumulator[index + 1] * factors[half],
                    recipe.hidden.num_bytes(1),
                )
        arch.sync_warp()
        for store in range_constexpr(STORES_PER_PASS):
            row = 4 * store + lane // 8
            words = unstage(staging, lane, store)
            store_global_v4(base + Int64(row) * row_bytes + step * PASS_ROW_BYTES, words)
        arch.sync_warp()


@cute.jit
def scale_rows(launch: Launch, accumulator, tile, warp, lane):
    """accumulator *= scale of the token, where a row of tokens has one."""
    base = address(launch, "l1_scale_buffer", tile.pool % launch.shape.ring)
    for half in range_constexpr(2):
        row = warp * WARP_ROWS + lane // 4 + 8 * half
        word = arch.load(global_ptr(base + Int64(row) * 4), Int32, sem="relaxed", scope="gpu")
        scale = as_float(word)
        for pair in range_constexpr(cute.size(accumulator) // 4):
            for q in range_constexpr(2):
                index = 4 * pair + 2 * half + q
                accumulator[index] = accumulator[index] * scale


@cute.jit
def combine_columns(accumulator, values, combine: Constexpr, channels, lane):
    """Combine every element with the value of its output channel. `values`: address of one expert's
    float32; `channels`: the channel of the first column of each quarter of the tile.
    """
    slabs = cute.size(accumulator) // 4
    for slab in range_constexpr(slabs):
        quarter, within = slab // (slabs // 4), slab % (slabs // 4)
        if const_expr(within == 0):
            arch.sync_warp()  # keeps ptxas from loading all of them at once, which would spill
        channel = channels[quarter] + 8 * within + 2 * (lane % 4)
        words = load_global_v2(values + Int64(channel) * 4)
        for half in range_constexpr(2):
            for q in range_constexpr(2):
                index = 4 * slab + 2 * half + q
                accumulator[index] = combine(accumulator[index], as_float(words[q]))


@cute.jit
def combine_fc1(launch: Launch, accumulator, tile, lane):
    """What FC1's epilogue reads by column."""
    config, quarter = launch.shape.config, launch.shape.kernel.block_n // 4
    gate = tile.column * (2 * quarter)
    up = gate + config.intermediate_size
    for operand in column_operands("w13", config.recipe.weights, SWIGLU):
        values = getattr(launch, operand.name)
        values += Int64(tile.expert) * (4 * SWIGLU.fc1_columns(config.intermediate_size))
        channels = [gate, up, gate + quarter, up + quarter]
        combine_columns(accumulator, values, COMBINE[operand.combines], channels, lane)


@cute.jit
def combine_fc2(launch: Launch, accumulator, tile, lane):
    """What FC2's epilogue reads by column."""
    config, quarter = launch.shape.config, launch.shape.kernel.block_n // 4
    channels = []
    for n in range_constexpr(4):
        channel = tile.column * (4 * quarter) + n * quarter
        if channel >= config.hidden_size:
            channel = Int32(0)  # these columns are not stored
        channels.append(channel)
    for operand in column_operands("w2", config.recipe.weights, SWIGLU):
        values = getattr(launch, operand.name)
        values += Int64(tile.expert) * (4 * config.hidden_size)
        combine_columns(accumulator, values, COMBINE[operand.combines], channels, lane)


@cute.jit
def store_fc2(launch: Launch, accumulator, staging, metadata, warp, lane, pool, column):
    """FC2 tile of pool block `pool`: real rows to `combine_output` of their source rank."""
    shape = launch.shape
    max_slots = shape.config.max_slots_per_rank
    row_bytes = shape.output_row_bytes
    region_offset = shape.layout["combine_output"].offset
    tile_bytes = 2 * shape.kernel.block_n
    targets = cute.make_rmem_tensor((STORES_PER_PASS,), Int64)
    for store in range_constexpr(STORES_PER_PASS):
        code = load_shared(metadata + (warp * WARP_ROWS + 4 * store + lane // 8))
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
                    stage_pair(
                        staging, lane, half, slab, accumulator[index], accumulator[index + 1], 2
                    )
            arch.sync_warp()
            for store in range_constexpr(STORES_PER_PASS):
                words = unstage(staging, lane, store)
                if targets[store] != 0:
                    store_global_v4(targets[store] + step * PASS_ROW_BYTES, words)
            arch.sync_warp()
