"""The loader warps: weight tiles in the order of the tickets, token tiles once they are ready."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr, range_constexpr

from megamoe import faults, schedule
from megamoe.activation import SWIGLU
from megamoe.architecture import SM90A
from megamoe.budget import QUEUE_SLOTS, Budget
from megamoe.config import DISPATCH, GEMMS
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch, address
from megamoe.kernels.ptx import bulk_load, global_ptr, store_shared
from megamoe.kernels.sm90.operands import (
    FINE_BOXES,
    FINE_ROWS,
    down_box,
    gate_up_box,
    partition,
    tokens_box,
)
from megamoe.kernels.tiles import next_tile, release_tile, take_tile
from megamoe.ordering import FC1_DONE, ROWS_READY, TOKENS_IN
from megamoe.precision import WHOLE_ROW

arch = cute.arch

ONE = 0x3F800000  # 1.0 as a word


@cute.jit
def wait_for_stage(launch: Launch, pipes, position):
    """Wait until the stage at ring position `position` is free."""
    stages = launch.shape.kernel.num_stages
    arch.mbarrier_wait(pipes.empty + position % stages, (position // stages + 1) % 2)


@cute.jit
def load_stages(
    launch: Launch, atom, sides, grain: Constexpr, run: Constexpr, pipes, position, k_blocks, rows,
    num_bytes, scales, lane,
):  # fmt: skip
    """Load `k_blocks` K blocks of one operand into consecutive stages, from ring position
    `position`. A stage takes one box from each of `sides`; all but the first only if `rows` reach
    into it, `grain` rows being a box. `run`: K blocks that are asked for together where one
    warpgroup holds the rows. `num_bytes`: of the boxes together. `scales`: address of the row
    scales of the first K block (a stage's after the other), or None.
    """
    stages, scale_bytes = launch.shape.kernel.num_stages, 4 * launch.shape.kernel.block_m
    for k in cutlass.range(k_blocks, unroll=1):
        stage = (position + k) % stages
        full = pipes.full + stage
        if const_expr(run > 1):
            if k % run == 0 and rows <= SM90A.group_rows:
                wait_for_stage(launch, pipes, position + min(k + run, k_blocks) - 1)
        wait_for_stage(launch, pipes, position + k)
        if lane == 0:
            if const_expr(scales is None):
                arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
            else:
                arch.mbarrier_arrive_and_expect_tx(full, num_bytes + scale_bytes)
                to = pipes.row_scales + stage * scale_bytes
                bulk_load(to, scales + Int64(k) * scale_bytes, full, scale_bytes)
        arch.sync_warp()
        for part in range_constexpr(len(sides)):
            to, source = sides[part]
            if part == 0 or rows > part * grain:
                cute.copy(atom, source[None, k], to[None, stage], tma_bar_ptr=full)


@cute.jit
def load_columns(
    launch: Launch, budget: Budget, atom, tensor, smem_b, box, place, pipes, position, k_blocks,
    rows, lane,
):  # fmt: skip
    """Load the columns of a tile of weights over K, for `rows` rows of tokens."""
    side = partition(atom, smem_b, tensor, box, place)
    load_stages(
        launch, atom, [side], 0, launch.shape.kernel.weight_run, pipes, position, k_blocks, rows,
        budget.b_stage_bytes, None, lane,
    )  # fmt: skip


@cute.jit
def load_chunks(launch: Launch, base, index, smem_b, pipes, position, k_blocks, lane):
    """Load the packed weights of a tile over K: number `index` of tiles with so many K blocks, of
    which the first lies at `base`.
    """
    stages, num_bytes = launch.shape.kernel.num_stages, launch.shape.b_stage_bytes
    source = base + Int64(index) * (k_blocks * num_bytes)
    for k in cutlass.range(k_blocks, unroll=1):
        stage = (position + k) % stages
        wait_for_stage(launch, pipes, position + k)
        if lane == 0:
            full = pipes.full + stage
            arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
            bulk_load(smem_b + stage * num_bytes, source + Int64(k) * num_bytes, full, num_bytes)
        arch.sync_warp()


@cute.jit
def load_weights(
    launch: Launch,
    budget: Budget,
    weights,
    smem_b,
    received,
    expert_ids,
    num_live,
    pipes,
    lane,
):
    """Take tickets, hand tiles over, load weight tiles. Waits only for free queue slots and
    stages.
    """
    shape, kernel = launch.shape, launch.shape.kernel
    packed = shape.config.recipe.weights.packed
    tickets = global_ptr(address(launch, "load_balance_counter"))
    stream = shape.stream(launch.num_ctas, num_live)
    walk = schedule.start_walk(received, num_live)
    position = Int32(0)
    handed = Int32(0)
    running = Int32(kernel.runs(GEMMS))
    while running == 1:
        walk, tile = next_tile(
            launch, pipes, tickets, stream, walk, handed, received, expert_ids, lane
        )
        handed += 1
        if tile.phase == schedule.PHASE_FC1:
            if const_expr(packed):
                index = tile.expert * shape.fc1_columns + tile.column
                load_chunks(
                    launch, weights.w13, index, smem_b, pipes, position, shape.fc1_k_blocks, lane
                )
            else:
                place = ((0, 0, tile.column), None, tile.expert)
                load_columns(
                    launch, budget, weights.gate_up_atom, weights.gate_up, smem_b,
                    gate_up_box(kernel), place, pipes, position, shape.fc1_k_blocks, tile.rows,
                    lane,
                )  # fmt: skip
            position += shape.fc1_k_blocks
        elif tile.phase == schedule.PHASE_FC2:
            if const_expr(packed):
                index = tile.expert * shape.fc2_columns + tile.column
                load_chunks(
                    launch, weights.w2, index, smem_b, pipes, position, shape.fc2_k_blocks, lane
                )
            else:
                place = (tile.column, None, tile.expert)
                load_columns(
                    launch, budget, weights.down_atom, weights.down, smem_b, down_box(kernel),
                    place, pipes, position, shape.fc2_k_blocks, tile.rows, lane,
                )  # fmt: skip
            position += shape.fc2_k_blocks
        else:
            running = Int32(0)


def load_words(launch: Launch, name, index, lane) -> list:
    """Words for the rows of a pool block, from row `index` of a region on, which another CTA's
    dispatch warp wrote to global memory: every 32nd.
    """
    source = global_ptr(address(launch, name, index))
    return [
        arch.load(source + (lane + first), Int32, sem="relaxed", scope="gpu")
        for first in range(0, launch.shape.kernel.block_m, 32)
    ]


def store_words(to, index, words):
    """Every 32nd word of shared memory, from number `index` on."""
    for part, word in enumerate(words):
        store_shared(to + (index + 32 * part), word)


@cute.jit
def load_metadata(launch: Launch, pipes, name: Constexpr, tile, block, slot, exchange, lane):
    """A word of padding metadata for every row of a tile's pool block, number `block` of the ring,
    into its queue slot, where the epilogue finds it; with `exchange` also what else one with
    swapped operands needs.
    """
    rows = launch.shape.kernel.block_m
    words = load_words(launch, name, block * rows, lane)
    if const_expr(launch.shape.kernel.only == GEMMS and name == "l1_topk_weights_buffer"):
        words = [Int32(ONE)] * len(words)  # no row came with a weight, and 0 would save FC2 power
    store_words(pipes.metadata, slot * rows + lane, words)
    full = pipes.metadata_full + slot
    if const_expr(exchange is None):
        arch.mbarrier_arrive(full)
    else:
        if const_expr(launch.shape.config.recipe.tokens.scale_columns == WHOLE_ROW):
            if tile.phase == schedule.PHASE_FC1:
                scales = load_words(launch, "l1_scale_buffer", block, lane)
                to = cute.recast_ptr(exchange.token_scales, dtype=Int32)
                store_words(to, slot * rows + lane, scales)
        if const_expr(not launch.shape.config.recipe.weights.row_factors):
            arch.mbarrier_arrive(full)
        elif lane == 0:
            load_row_factors(launch, tile, exchange.row_factors, slot, full)
        else:
            arch.mbarrier_arrive(full)


@cute.jit
def load_row_factors(launch: Launch, tile, row_factors, slot, full):
    """One lane: copy the factors of the tile's weight rows into its queue slot, those of gates
    before those of ups; it arrives at `full` too.
    """
    config, rows = launch.shape.config, launch.shape.kernel.block_n
    to = row_factors + slot * (4 * rows)
    if tile.phase == schedule.PHASE_FC1:
        half = rows // 2
        of_expert = Int64(tile.expert) * SWIGLU.fc1_columns(config.intermediate_size)
        gates = launch.w13_scales + (of_expert + tile.column * half) * 4
        arch.mbarrier_arrive_and_expect_tx(full, 4 * rows)
        bulk_load(to, gates, full, 4 * half)
        bulk_load(to + 4 * half, gates + 4 * config.intermediate_size, full, 4 * half)
    else:
        first = tile.column * rows
        num_bytes = 4 * min(rows, config.hidden_size - first)
        arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
        factors = launch.w2_scales + (Int64(tile.expert) * config.hidden_size + first) * 4
        bulk_load(to, factors, full, num_bytes)


@cute.jit
def load_rows(
    launch: Launch, budget: Budget, maps, smem_a, pipes, position, k_blocks, tile,
    scale_region: Constexpr, lane,
):  # fmt: skip
    """Load the rows of a tile's pool block over K, once they are ready, and from `scale_region`,
    unless that is None, the rows' scales.

    One box per math warpgroup that has real rows; but of an expert with few rows only fine boxes,
    because the rest of 64 rows would come from HBM. The last block of many loads 64 rows: those
    that pad it are zeros, which cost less power than what the stages hold.
    """
    block = tile.pool % launch.shape.ring
    arch.fence_proxy(ROWS_READY.kind)
    scales = None
    if const_expr(scale_region is not None):
        scales = address(launch, scale_region, block)
    if tile.rows <= FINE_ROWS * FINE_BOXES and tile.block == 0:
        load_boxes(
            launch, budget, maps.fine_atom, maps.fine_rows, FINE_ROWS, FINE_BOXES, smem_a, pipes,
            position, k_blocks, block, tile.rows, scales, lane,
        )  # fmt: skip
    else:
        load_boxes(
            launch, budget, maps.atom, maps.rows, SM90A.group_rows,
            launch.shape.kernel.num_math_warpgroups, smem_a, pipes, position, k_blocks, block,
            tile.rows, scales, lane,
        )  # fmt: skip


@cute.jit
def load_boxes(
    launch: Launch, budget: Budget, atom, tensor, box_rows: Constexpr, most: Constexpr, smem_a,
    pipes, position, k_blocks, block, rows, scales, lane,
):  # fmt: skip
    """Load the first `rows` rows of a pool block in boxes of `box_rows`, `most` at most."""
    kernel = launch.shape.kernel
    box = tokens_box(kernel, box_rows)
    sides = []
    for part in range_constexpr(most):
        smem_box = cute.local_tile(smem_a, box, (part, 0, None))
        place = (block * (kernel.block_m // box_rows) + part, None)
        sides.append(partition(atom, smem_box, tensor, box, place))
    num_boxes = schedule.ceil_div(rows, box_rows)
    num_bytes = num_boxes * (budget.a_stage_bytes // (kernel.block_m // box_rows))
    load_stages(
        launch, atom, sides, box_rows, 1, pipes, position, k_blocks, rows, num_bytes, scales, lane
    )


@cute.jit
def load_tokens(launch: Launch, budget: Budget, tokens, fc1_outs, smem_a, pipes, exchange, lane):
    """Wait until a tile's rows are ready, then load them. `exchange`: shared memory of an epilogue
    with swapped operands, or None.
    """
    shape, role = launch.shape, faults.ROLE_LOAD_TOKENS
    recipe = shape.config.recipe
    rows_arrive = shape.kernel.runs(DISPATCH)
    position = Int32(0)
    taken = Int32(0)
    running = Int32(shape.kernel.runs(GEMMS))
    waited_tokens, waited_fc1_out = Int64(0), Int64(0)  # ns, if the kernel is built to trace
    while running == 1:
        tile = take_tile(pipes, taken)
        release_tile(pipes, taken, lane)
        block = tile.pool % shape.ring
        began = sync.trace_clock(launch)
        slot = taken % QUEUE_SLOTS
        if tile.phase == schedule.PHASE_FC1:
            if const_expr(rows_arrive):
                sync.wait_for(launch, TOKENS_IN, tile.pool, tile.rows, role)
            waited_tokens += sync.trace_clock(launch) - began
            if taken == 0:
                sync.mark(launch, "first_tile")
            load_metadata(
                launch, pipes, "l1_topk_weights_buffer", tile, block, slot, exchange, lane
            )
            load_rows(
                launch, budget, tokens, smem_a, pipes, position, shape.fc1_k_blocks,
                tile, "l1_scale_buffer" if recipe.tokens.scales_along_k else None, lane,
            )  # fmt: skip
            position += shape.fc1_k_blocks
        elif tile.phase == schedule.PHASE_FC2:
            done = Int32(shape.fc1_done)
            sync.wait_for(launch, FC1_DONE, tile.pool, done, role)
            waited_fc1_out += sync.trace_clock(launch) - began
            load_metadata(launch, pipes, "token_src_metadata", tile, block, slot, exchange, lane)
            load_rows(
                launch, budget, fc1_outs, smem_a, pipes, position, shape.fc2_k_blocks,
                tile, "fc1_output_scale" if recipe.hidden.scales_along_k else None, lane,
            )  # fmt: skip
            position += shape.fc2_k_blocks
        else:
            running = Int32(0)
        taken += 1
    if lane == 0:
        sync.record(launch, "wait_tokens_ns", waited_tokens)
        sync.record(launch, "wait_fc1_out_ns", waited_fc1_out)
