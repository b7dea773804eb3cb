"""Tiles with few tokens and FP8 weights: operands are swapped, so that the tensor cores multiply as
many tokens as there are, and not 64 rows.

A tile's 256 weight rows are four blocks of 64, as they lie in shared memory: of FC1 gate and up in
turn, so that a warpgroup, which has two of them, holds the gates of 64 outputs and their ups. An
accumulator holds the rows of a block by the tile's tokens, as many as there are: a multiple of 16.
Both warpgroups work on every such tile; with more tokens the time that both spend on epilogues
would count (H200: 3 % with 48 to 64), so that then they take tiles in turn. Every number is
computed as there (`mainloop`, `epilogue`), in the same order, so a token's bits do not depend on
how many there are.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Constexpr, Float32, Int64, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup

from megamoe import schedule
from megamoe.architecture import SM90A
from megamoe.budget import FEW_TOKENS, QUEUE_SLOTS, WEIGHT_SCALE_BYTES
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch
from megamoe.kernels.ptx import as_float, load_shared_v2
from megamoe.kernels.sm90.mainloop import issue, release
from megamoe.kernels.sm90.swapped_epilogue import Exchange, store
from megamoe.kernels.tiles import Pipes

arch = cute.arch

BLOCKS = 2  # of 64 weight rows, of a warpgroup
#: Tokens of a tile that there are variants for.
VARIANTS = range(16, FEW_TOKENS + 1, 16)


class Factors(NamedTuple):
    """What `mainloop.issue` multiplies: descriptors of a block of weights, and of the tile's tokens
    as the only part, in all stages.
    """

    mma: cute.TiledMma
    a: cute.Tensor
    b: list


class Operands(NamedTuple):
    """Of one warpgroup, by block: factors, sums of a K block, accumulators."""

    blocks: list
    sums: list
    accumulators: list


def operands_of(smem_tokens, smem_weights, tokens: int, group) -> Operands:
    """Operands of warpgroup `group` for `tokens` tokens, for one tile."""
    major, dtype = cute.nvgpu.OperandMajorMode.K, smem_tokens.element_type
    mma = sm90.make_trivial_tiled_mma(
        dtype, dtype, major, major, Float32, atom_layout_mnk=(1, 1, 1), tiler_mn=(64, tokens)
    )
    part = mma.get_slice(0)
    shape = part.partition_shape_C((SM90A.group_rows, tokens))
    rows = cute.logical_divide(mma.make_fragment_A(part.partition_A(smem_weights)), (None, 1))
    columns = cute.logical_divide(mma.make_fragment_B(part.partition_B(smem_tokens)), (None, 1))
    tokens_b = [columns[None, (None, 0), None, None]]
    blocks = [rows[None, (None, BLOCKS * group + n), None, None] for n in range(BLOCKS)]
    return Operands(
        [Factors(mma, block, tokens_b) for block in blocks],
        [cute.make_rmem_tensor(shape, Float32) for _ in range(BLOCKS)],
        [cute.make_rmem_tensor(shape, Float32) for _ in range(BLOCKS)],
    )


@cute.jit
def await_stage(pipes, place, stages: Constexpr):
    """Wait for the K block at ring position `place`; its stage."""
    stage = place % stages
    arch.mbarrier_wait(pipes.full + stage, place // stages % 2)
    return stage


@cute.jit
def accumulate(operands, pipes, position, k_blocks, lane, kernel: Constexpr):
    """accumulators = weights @ tokens^T over `k_blocks` K blocks, the first of which is number
    `position` of the ring.
    """
    stages = kernel.num_stages
    for block in cutlass.range(k_blocks, unroll=1):
        stage = await_stage(pipes, position + block, stages)
        for number in range_constexpr(BLOCKS):
            issue(operands.blocks[number], [operands.accumulators[number]], 0, stage, False)
        warpgroup.wait_group(0)
        release(pipes.empty, stage, lane, 1)


def promote(accumulator, sums, of_tokens, of_block):
    """accumulator += sums * scale of the token * that of the block."""
    for slab in range(len(of_tokens)):
        scales = [scale * of_block for scale in of_tokens[slab]]
        for i in range(4):
            index = 4 * slab + i
            promoted = sums[index] * scales[i % 2]
            accumulator[index] = accumulator[index] + promoted


def load_token_scales(scales, slabs: int) -> list:
    """Scales of this lane's tokens, two of every 8. `scales`: shared pointer to the first."""
    return [
        [as_float(word) for word in load_shared_v2(scales + 32 * slab)] for slab in range(slabs)
    ]


def load_block_scales(weight_scales, weighted: bool, block) -> list:
    """Scales of this warpgroup's two blocks of weights in K block number `block`."""
    if not weighted:
        return [Float32(1.0)] * BLOCKS
    return [as_float(word) for word in load_shared_v2(weight_scales + block * WEIGHT_SCALE_BYTES)]


@cute.jit
def accumulate_scaled(
    operands, pipes, row_scales, weight_scales, weighted: Constexpr, position, k_blocks, lane,
    kernel: Constexpr,
):  # fmt: skip
    """accumulators = sum over K blocks of scale * (weights @ tokens^T), element by element.

    `row_scales`: shared pointer to the scale of this lane's first token in stage 0.
    `weight_scales`: shared pointer to the scales of this warpgroup's two blocks of the tile's
    weights in the first K block, unless not `weighted`.
    """
    stages, scale_bytes = kernel.num_stages, 4 * kernel.block_m
    accumulators, sums = operands.accumulators, operands.sums
    for block in cutlass.range(k_blocks, unroll=1):
        stage = await_stage(pipes, position + block, stages)
        for number in range_constexpr(BLOCKS):
            issue(operands.blocks[number], [sums[number]], 0, stage, True)
        rows = row_scales + stage * scale_bytes  # under the tensor cores
        of_tokens = load_token_scales(rows, cute.size(sums[0]) // 4)
        of_blocks = load_block_scales(weight_scales, weighted, block)
        for number in range_constexpr(BLOCKS):
            warpgroup.wait_group(BLOCKS - 1 - number)
            if const_expr(number == BLOCKS - 1):
                arch.sync_warp()  # every lane has read its scales
                release(pipes.empty, stage, lane, 1)
            promote(accumulators[number], sums[number], of_tokens, of_blocks[number])


@cute.jit
def multiply(
    launch: Launch, operands, pipes: Pipes, tile, taken, position, k_blocks, group, lane
):  # fmt: skip
    """The product of a tile: the sums of this warpgroup's blocks."""
    recipe, kernel = launch.shape.config.recipe, launch.shape.kernel
    for accumulator in operands.accumulators:
        accumulator.fill(0.0)
    weights = pipes.weight_scales + taken % QUEUE_SLOTS * launch.shape.weight_scale_bytes
    rows, weights = pipes.row_scales + lane % 4 * 8, weights + group * 8
    weighted = recipe.weights.scales_along_k
    scaled = operands, pipes, rows, weights, weighted, position, k_blocks, lane, kernel
    if const_expr(recipe.fc1_promotes):
        accumulate_scaled(*scaled)
    elif tile.phase == schedule.PHASE_FC1:  # one scale per row for all of K
        accumulate(operands, pipes, position, k_blocks, lane, kernel)
    else:
        accumulate_scaled(*scaled)


@cute.jit
def multiply_and_store(
    launch: Launch, smem_tokens, smem_weights, pipes: Pipes, smem: Exchange, tile, taken, position,
    k_blocks, warp, lane,
):  # fmt: skip
    """A tile with at most FEW_TOKENS tokens. Returns when its product was done."""
    multiplied = Int64(0)
    for tokens in VARIANTS:
        if tile.rows > tokens - 16 and tile.rows <= tokens:
            group = warp // 4
            operands = operands_of(smem_tokens, smem_weights, tokens, group)
            multiply(launch, operands, pipes, tile, taken, position, k_blocks, group, lane)
            multiplied = sync.trace_clock(launch)
            parts = [[accumulator] for accumulator in operands.accumulators]
            if tile.phase == schedule.PHASE_FC1:
                store(launch, parts, True, tokens, pipes, smem, tile, taken, warp, lane)
            else:
                store(launch, parts, False, tokens, pipes, smem, tile, taken, warp, lane)
    return multiplied
