"""The math role: products of tiles in the order handed over, each followed by its epilogue."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from megamoe import schedule
from megamoe.architecture import SM90A
from megamoe.budget import FEW_TOKENS, PASS_BYTES, QUEUE_SLOTS, WARP_ROWS
from megamoe.config import GEMMS
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch
from megamoe.kernels.ptx import opaque
from megamoe.kernels.sm90 import epilogue, few_tokens, mainloop, operands
from megamoe.kernels.tiles import Pipes, k_blocks_of, release_tile, report_stored, take_tile
from megamoe.precision import WHOLE_ROW

arch = cute.arch


class Fragments(NamedTuple):
    """Operands of one warpgroup for WGMMAs of some number of columns: descriptors of the rows of A
    that it computes and of the column parts of B in all stages, and the accumulator, whole and in
    the same parts.
    """

    mma: cute.TiledMma
    a: cute.Tensor
    b: list
    accumulator: cute.Tensor
    parts: list


def fragments_of(kernel, columns: int, smem_a, smem_b, accumulator) -> Fragments:
    """The fragments of a math warpgroup in parts of `columns` columns, over the registers of
    `accumulator`; those of A for any warpgroup's rows.
    """
    mma = operands.tiled_mma(smem_a.element_type, columns)
    part = mma.get_slice(0)
    rows_a = cute.logical_divide(mma.make_fragment_A(part.partition_A(smem_a)), (None, 1))
    columns_b = cute.logical_divide(mma.make_fragment_B(part.partition_B(smem_b)), (None, 1))
    shape = part.partition_shape_C((SM90A.group_rows, kernel.block_n))
    accumulator = cute.make_tensor(accumulator.iterator, cute.make_layout(shape))
    divided = cute.logical_divide(accumulator, (None, None, 1))
    parts = range(cute.size(accumulator, mode=[2]))
    return Fragments(
        mma,
        rows_a,
        [columns_b[None, (None, n), None, None] for n in parts],
        accumulator,
        [divided[None, None, (None, n)] for n in parts],
    )


@cute.jit
def multiply_scaled(
    launch: Launch, fragments, alone, pipes, share, taken, position, k_blocks, warp, lane
):
    """The product of this warpgroup's share of a tile, with a scale per K block. `alone`: the
    fragments to take if no other warpgroup computes meanwhile. `warp`: its place among the warps
    that hold the tile's rows.
    """
    kernel, weighted = launch.shape.kernel, launch.shape.config.recipe.weights.scales_along_k
    weights = pipes.weight_scales + taken % QUEUE_SLOTS * launch.shape.weight_scale_bytes
    rows = pipes.row_scales + (warp * WARP_ROWS + lane // 4) * 4
    warps = share.arrivals
    if warps > 1:
        mainloop.accumulate_scaled(
            alone, pipes, rows, weights, weighted, position, k_blocks, lane, warps, kernel
        )
    else:
        mainloop.accumulate_scaled(
            fragments, pipes, rows, weights, weighted, position, k_blocks, lane, warps, kernel
        )


@cute.jit
def multiply(
    launch: Launch, fragments, alone, pipes, tile, share, taken, position, k_blocks, warp, lane
):
    """The product of this warpgroup's share of a tile; see `multiply_scaled`."""
    recipe, kernel = launch.shape.config.recipe, launch.shape.kernel
    rows_a = (None, (None, share.half), None, None)
    fragments = fragments._replace(a=fragments.a[rows_a])
    alone = alone._replace(a=alone.a[rows_a])
    if const_expr(recipe.fc1_promotes):
        multiply_scaled(
            launch, fragments, alone, pipes, share, taken, position, k_blocks, warp, lane
        )
    elif const_expr(not recipe.fc2_promotes):
        mainloop.accumulate(fragments, pipes, position, k_blocks, lane, share.arrivals, kernel)
    elif tile.phase == schedule.PHASE_FC1:  # one scale per row for all of K
        mainloop.accumulate(fragments, pipes, position, k_blocks, lane, share.arrivals, kernel)
    else:
        multiply_scaled(
            launch, fragments, alone, pipes, share, taken, position, k_blocks, warp, lane
        )


@cute.jit
def multiply_and_store(
    launch: Launch, fragments, alone, staging, pipes, tile, share, turn, taken, position, k_blocks,
    warp, lane,
):  # fmt: skip
    """This warpgroup's share of a tile. `turn`: number of the tile among those that one warpgroup
    computes alone. Returns when its product was done.
    """
    shape, recipe, slot = launch.shape, launch.shape.config.recipe, taken % QUEUE_SLOTS
    place = share.half * 4 + warp % 4
    multiply(launch, fragments, alone, pipes, tile, share, taken, position, k_blocks, place, lane)
    if share.arrivals > 1 and lane == 0:
        number, _ = schedule.turn_barrier(turn, shape.kernel.num_math_warpgroups)
        arch.mbarrier_arrive(pipes.multiplied + number)
    multiplied = sync.trace_clock(launch)
    arch.mbarrier_wait(pipes.metadata_full + slot, taken // QUEUE_SLOTS % 2)
    # The epilogue's addresses would be hoisted and fill the mainloop's registers.
    lane = opaque(lane)
    accumulator, mine = fragments.accumulator, staging + warp * PASS_BYTES
    metadata = pipes.metadata + slot * shape.kernel.block_m
    if tile.phase == schedule.PHASE_FC1:
        if const_expr(recipe.tokens.scale_columns == WHOLE_ROW):
            epilogue.scale_rows(launch, accumulator, tile, place, lane)
        epilogue.combine_fc1(launch, accumulator, tile, lane)
        epilogue.store_fc1(launch, accumulator, mine, metadata, place, lane, tile.pool, tile.column)
    else:
        epilogue.combine_fc2(launch, accumulator, tile, lane)
        epilogue.store_fc2(launch, accumulator, mine, metadata, place, lane, tile.pool, tile.column)
    return multiplied


@cute.jit
def compute_in_turn(
    launch: Launch, fragments, alone, staging, pipes, tile, share, turn, taken, position, k_blocks,
    warp, lane,
):  # fmt: skip
    """As `multiply_and_store`, or wait until the warpgroup has multiplied whose turn it is."""
    multiplied = Int64(0)
    if share.active == 1:
        multiplied = multiply_and_store(
            launch, fragments, alone, staging, pipes, tile, share, turn, taken, position, k_blocks,
            warp, lane,
        )  # fmt: skip
    else:
        # Only now may this warpgroup wait for stages: it has not followed their phases.
        number, parity = schedule.turn_barrier(turn, launch.shape.kernel.num_math_warpgroups)
        arch.mbarrier_wait(pipes.multiplied + number, parity)
    return multiplied


@cute.jit
def math(launch: Launch, smem_a, smem_b, staging, exchange, pipes: Pipes, warp, lane):
    """One math warp, 0..7 of the CTA: 16 rows of every tile that its warpgroup has a share in, or
    of FP8 tiles with few tokens, by `few_tokens`, 16 weight rows of each of its blocks.
    """
    shape, recipe = launch.shape, launch.shape.config.recipe
    warpgroups = shape.kernel.num_math_warpgroups
    accumulator = cute.make_rmem_tensor((shape.kernel.block_n // 2,), Float32)
    # With scales per K block the sums of one block need registers of their own.
    columns = shape.kernel.block_n // (2 if recipe.promotes else 1)
    fragments = fragments_of(shape.kernel, columns, smem_a, smem_b, accumulator)
    alone = fragments_of(shape.kernel, columns // 2, smem_a, smem_b, accumulator)
    position = Int32(0)
    taken = Int32(0)
    turn = Int32(0)
    running = Int32(shape.kernel.runs(GEMMS))
    while running == 1:
        tile = take_tile(pipes, taken)
        begin = sync.trace_clock(launch)
        if tile.phase == schedule.PHASE_DONE:
            running = Int32(0)
        else:
            k_blocks = k_blocks_of(launch, tile)
            share = schedule.share_of(tile.rows, warp // 4, turn, SM90A.group_rows, warpgroups)
            in_turn = launch, fragments, alone, staging, pipes, tile, share, turn
            run = taken, position, k_blocks, warp, lane
            multiplied = begin
            if const_expr(recipe.promotes):
                if tile.rows <= FEW_TOKENS:
                    share = schedule.Share(Int32(1), warp // 4, Int32(1))
                    multiplied = few_tokens.multiply_and_store(
                        launch, smem_a, smem_b, pipes, exchange, tile, *run
                    )
                else:
                    multiplied = compute_in_turn(*in_turn, *run)
            else:
                multiplied = compute_in_turn(*in_turn, *run)
            if share.active == 1:
                place, times = share.half * 4 + warp % 4, [begin, multiplied]
                report_stored(launch, pipes, tile, taken, share.arrivals, place, times, lane)
            if share.arrivals > 1:
                turn += 1
            position += k_blocks
        release_tile(pipes, taken, lane)
        taken += 1
    if warp == 0 and lane == 0:
        sync.mark(launch, "last_tile")
