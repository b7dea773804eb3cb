"""The math role: products of tiles in the order handed over, each followed by its epilogue."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from megamoe import schedule
from megamoe.budget import PASS_BYTES, QUEUE_SLOTS, WARP_ROWS, WARPGROUP_ROWS
from megamoe.config import GEMMS
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch
from megamoe.kernels.ptx import opaque
from megamoe.kernels.sm90 import epilogue, mainloop
from megamoe.kernels.sm90.loaders import Pipes, release_tile, take_tile

arch = cute.arch


class Fragments(NamedTuple):
    """Operands of one warpgroup: descriptors of the rows of A that it computes and of the column
    parts of B in all stages, and the accumulator, whole and in the same parts.
    """

    a: cute.Tensor
    b: list
    accumulator: cute.Tensor
    parts: list


def fragments_of(kernel, mma, smem_a, smem_b) -> Fragments:
    """The fragments of a math warpgroup; those of A for any warpgroup's rows."""
    part = mma.get_slice(0)
    rows_a = cute.logical_divide(mma.make_fragment_A(part.partition_A(smem_a)), (None, 1))
    columns_b = cute.logical_divide(mma.make_fragment_B(part.partition_B(smem_b)), (None, 1))
    accumulator = cute.make_rmem_tensor(
        part.partition_shape_C((WARPGROUP_ROWS, kernel.block_n)), Float32
    )
    divided = cute.logical_divide(accumulator, (None, None, 1))
    parts = range(cute.size(accumulator, mode=[2]))
    return Fragments(
        rows_a,
        [columns_b[None, (None, n), None, None] for n in parts],
        accumulator,
        [divided[None, None, (None, n)] for n in parts],
    )


@cute.jit
def multiply(
    launch: Launch, mma, fragments, pipes, tile, share, taken, position, k_blocks, warp, lane
):
    """The product of this warpgroup's share of a tile, with the scales of its K blocks. `warp`: its
    place among the warps that hold the tile's rows.
    """
    recipe = launch.shape.config.recipe
    warps = share.arrivals
    rows_a = fragments.a[None, (None, share.half), None, None]
    fragments = Fragments(rows_a, fragments.b, fragments.accumulator, fragments.parts)
    if const_expr(not recipe.scaled):
        mainloop.accumulate(
            mma, fragments, pipes, position, k_blocks, lane, warps, launch.shape.kernel
        )
    else:
        slot = taken % QUEUE_SLOTS
        weights = pipes.weight_scales + slot * launch.shape.weight_sf_bytes
        rows = pipes.row_scales + (warp * WARP_ROWS + lane // 4) * 4
        if const_expr(recipe.token_block > 0):
            mainloop.accumulate_scaled(
                mma, fragments, pipes, rows, weights, True, position, k_blocks, lane,
                warps, launch.shape.kernel,
            )  # fmt: skip
        elif tile.phase == schedule.PHASE_FC1:
            mainloop.accumulate(
                mma, fragments, pipes, position, k_blocks, lane, warps, launch.shape.kernel
            )
        else:
            mainloop.accumulate_scaled(
                mma, fragments, pipes, rows, weights, False, position, k_blocks, lane,
                warps, launch.shape.kernel,
            )  # fmt: skip


@cute.jit
def math(launch: Launch, mma, smem_a, smem_b, staging, pipes: Pipes, warp, lane):
    """One math warp, 0..7 of the CTA: 16 rows of every tile that its warpgroup has a share in."""
    shape = launch.shape
    weight_block, warpgroups = shape.config.recipe.weight_block, shape.kernel.num_math_warpgroups
    fragments = fragments_of(shape.kernel, mma, smem_a, smem_b)
    accumulator = fragments.accumulator
    mine = staging + warp * PASS_BYTES
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
            k_blocks = Int32(shape.fc1_k_blocks)
            if tile.phase == schedule.PHASE_FC2:
                k_blocks = Int32(shape.fc2_k_blocks)
            slot = taken % QUEUE_SLOTS
            share = schedule.share_of(tile.rows, warp // 4, turn, WARPGROUP_ROWS, warpgroups)
            metadata = pipes.metadata + slot * shape.kernel.block_m
            if share.active == 1:
                place = share.half * 4 + warp % 4
                multiply(
                    launch, mma, fragments, pipes, tile, share, taken, position, k_blocks, place,
                    lane,
                )  # fmt: skip
                if share.arrivals > 1 and lane == 0:
                    number, _ = schedule.turn_barrier(turn, warpgroups)
                    arch.mbarrier_arrive(pipes.multiplied + number)
                multiplied = sync.trace_clock(launch)
                arch.mbarrier_wait(pipes.metadata_full + slot, taken // QUEUE_SLOTS % 2)
                # The epilogue's addresses would be hoisted and fill the mainloop's registers.
                lane = opaque(lane)
                if tile.phase == schedule.PHASE_FC1:
                    if const_expr(weight_block[0] == 1):
                        epilogue.scale_fc1(launch, accumulator, tile, place, lane)
                    epilogue.store_fc1(
                        launch, accumulator, mine, metadata, place, lane, tile.pool, tile.column
                    )
                else:
                    if const_expr(weight_block[0] == 1):
                        epilogue.scale_fc2(launch, accumulator, tile, lane)
                    epilogue.store_fc2(
                        launch, accumulator, mine, metadata, place, lane, tile.pool, tile.column
                    )
                arch.sync_warp()
                if lane == 0:
                    arch.mbarrier_arrive(pipes.stored + slot, arrive_count=share.arrivals)
                if place == 0 and lane == 0:
                    times = [begin, multiplied, sync.trace_clock(launch)]
                    sync.record_tile(launch, taken, tile.phase, tile.pool, tile.column, times)
            else:
                # Only now may this warpgroup wait for stages: it has not followed their phases.
                number, parity = schedule.turn_barrier(turn, warpgroups)
                arch.mbarrier_wait(pipes.multiplied + number, parity)
            if share.arrivals > 1:
                turn += 1
            position += k_blocks
        release_tile(pipes, taken, lane)
        taken += 1
    if warp == 0 and lane == 0:
        sync.mark(launch, "last_tile")
