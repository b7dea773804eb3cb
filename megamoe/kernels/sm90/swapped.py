"""The math role with its operands swapped, for weights that are stored in 4 bits: a tile's weights
are A, which each thread dequantises into registers, and its tokens are B in shared memory.

A warpgroup has two blocks of 64 weight rows, the tile's 128 between them and the other warpgroup's;
an accumulator holds the block's rows by the tile's tokens, as many as there are: a multiple of 8
for which there is a variant. Both warpgroups work on every tile. Sums of a K block start fresh and
are promoted, times the scale of their token and that of their row, if the weights have one per K
block; exponents of weights are in their e4m3 already, but for one factor per row, which the
epilogue applies.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Constexpr, Float32, Int32, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup

from megamoe import schedule
from megamoe.architecture import SM90A
from megamoe.budget import QUEUE_SLOTS
from megamoe.config import GEMMS
from megamoe.fourbit_layout import CHUNK_BYTES, CHUNK_COLUMNS
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch
from megamoe.kernels.ptx import as_float, load_shared_v2, opaque
from megamoe.kernels.sm90 import swapped_epilogue
from megamoe.kernels.sm90.dequantize import decoder_of, expand, load_codes
from megamoe.kernels.sm90.mainloop import release
from megamoe.kernels.tiles import Pipes, k_blocks_of, release_tile, take_tile
from megamoe.launch_shape import LaunchShape

arch = cute.arch

BLOCKS = 2  # of 64 weight rows, of a warpgroup
#: Tokens of a tile that there are variants for.
SWAPPED_TOKENS = (16, 32, 48, 64, 96, 128)
MAX_PART = 64  # tokens of a block whose sums have registers beside the accumulators


def variants_of(shape: LaunchShape) -> tuple[int, ...]:
    """Those of SWAPPED_TOKENS that some routing of the layer needs."""
    most = shape.config.num_ranks * shape.config.max_slots_per_rank
    needed = [tokens for tokens in SWAPPED_TOKENS if tokens < most]
    return SWAPPED_TOKENS[: len(needed) + 1]


def part_tokens(tokens: int) -> int:
    """Tokens of a part, of which there are as few as can be."""
    return tokens // -(-tokens // MAX_PART)


class Operands(NamedTuple):
    """One warpgroup's for some number of tokens: `a` are the registers of a fragment of weights,
    `words` the same as Int32; `b` descriptors of the tokens, by part; `sums` of one part;
    `accumulators` by block and part.
    """

    mma: cute.TiledMma
    a: cute.Tensor
    words: cute.Tensor
    b: list
    sums: cute.Tensor
    accumulators: list


def operands_of(smem_tokens, tokens: int) -> Operands:
    """Operands for `tokens` tokens, for one tile: registers that outlived it would be carried
    around the loop over tiles, sums too, which WGMMAs are said to read; ptxas then serialised them
    (C7511).
    """
    width = part_tokens(tokens)
    major, dtype = cute.nvgpu.OperandMajorMode.K, smem_tokens.element_type
    mma = sm90.make_trivial_tiled_mma(
        dtype, dtype, major, major, Float32, atom_layout_mnk=(1, 1, 1), tiler_mn=(64, width),
        a_source=warpgroup.OperandSource.RMEM,
    )  # fmt: skip
    part = mma.get_slice(0)
    shape = part.partition_shape_C((SM90A.group_rows, width))
    columns = cute.logical_divide(mma.make_fragment_B(part.partition_B(smem_tokens)), (None, 1))
    parts = range(tokens // width)
    a = mma.make_fragment_A(part.partition_shape_A((SM90A.group_rows, CHUNK_COLUMNS)))
    return Operands(
        mma,
        a,
        cute.recast_tensor(a, Int32),
        [columns[None, (None, n), None, None] for n in parts],
        cute.make_rmem_tensor(shape, Float32),
        [[cute.make_rmem_tensor(shape, Float32) for _ in parts] for _ in range(BLOCKS)],
    )


@cute.jit
def issue(operands, part: Constexpr, stage):
    """sums = the fragment of weights @ tokens of part `part`, as one WGMMA group."""
    a, b = operands.a, operands.b[part]
    atom = cute.make_mma_atom(operands.mma.op)
    warpgroup.fence()
    for k in range_constexpr(cute.size(a, mode=[2])):
        atom.set(warpgroup.Field.ACCUMULATE, k != 0)
        cute.gemm(atom, operands.sums, a[None, None, k], b[None, None, k, stage], operands.sums)
    warpgroup.commit_group()


@cute.jit
def promote(operands, block: Constexpr, part: Constexpr, scales, row_scales):
    """accumulator += sums * scale of the token * that of the row, unless `row_scales` is None.
    `scales`: shared pointer to the scale of this lane's first token in the part; every 8 tokens it
    has two more.
    """
    accumulator = operands.accumulators[block][part]
    for slab in range_constexpr(cute.size(accumulator) // 4):
        pair = [as_float(word) for word in load_shared_v2(scales + 32 * slab)]
        for i in range_constexpr(4):
            index = 4 * slab + i
            scaled = operands.sums[index] * pair[i % 2]
            if const_expr(row_scales is not None):
                scaled = scaled * row_scales[i // 2]
            accumulator[index] = accumulator[index] + scaled


@cute.jit
def accumulate(launch: Launch, operands, pipes, chunks, thread, position, k_blocks, lane):
    """accumulators = weights @ tokens^T over `k_blocks` K blocks, the first of which is number
    `position` of the ring. `chunks`: shared memory of the warpgroup's first chunk in stage 0;
    `thread`: in the warpgroup.

    A fragment is dequantised when the tensor cores are done with the last one; the other warpgroup
    keeps them busy meanwhile. A second fragment, or sums of two parts in flight, were no faster.
    """
    stages = launch.shape.kernel.num_stages
    stage_bytes, scale_bytes = launch.shape.b_stage_bytes, 4 * launch.shape.kernel.block_m
    scales = pipes.row_scales + lane % 4 * 8
    parts, slabs = len(operands.b), cute.size(operands.sums) // 4
    for block in operands.accumulators:
        for part in block:
            part.fill(0.0)
    stage = position % stages
    arch.mbarrier_wait(pipes.full + stage, (position // stages) % 2)
    codes, exponents = load_codes(launch, chunks + stage * stage_bytes, thread)
    expand(launch, operands.words, codes, exponents)
    for block in cutlass.range(k_blocks, unroll=1):
        stage = (position + block) % stages
        ahead = min(block + 1, k_blocks - 1)  # behind the last, it again: its stage is still held
        next_stage = (position + ahead) % stages
        for number in range_constexpr(BLOCKS):
            codes, exponents, row_scales = [], None, None
            for part in range_constexpr(parts):
                issue(operands, part, stage)
                if const_expr(part == 0):  # under the tensor cores
                    own = chunks + (stage * stage_bytes + number * CHUNK_BYTES)
                    row_scales = decoder_of(launch).row_scales(own, thread)
                    here = chunks + (stage * stage_bytes + CHUNK_BYTES)
                    if const_expr(number == BLOCKS - 1):
                        parity = (position + ahead) // stages % 2
                        arch.mbarrier_wait(pipes.full + next_stage, parity)
                        here = chunks + next_stage * stage_bytes
                    codes, exponents = load_codes(launch, here, thread)
                warpgroup.wait_group(0)
                of_part = scales + (stage * scale_bytes + part * (32 * slabs))
                promote(operands, number, part, of_part, row_scales)
            expand(launch, operands.words, codes, exponents)
        arch.sync_warp()  # every lane has read its scales and codes
        release(pipes.empty, stage, lane, 1)


@cute.jit
def multiply_and_store(
    launch: Launch, smem_tokens, tokens: Constexpr, pipes, smem, tile, taken, position, k_blocks,
    chunks, warp, lane,
):  # fmt: skip
    """A tile with up to `tokens` tokens. Returns when its product was done."""
    operands = operands_of(smem_tokens, tokens)
    accumulate(launch, operands, pipes, chunks, warp % 4 * 32 + lane, position, k_blocks, lane)
    multiplied = sync.trace_clock(launch)
    slot = taken % QUEUE_SLOTS
    arch.mbarrier_wait(pipes.metadata_full + slot, taken // QUEUE_SLOTS % 2)
    lane = opaque(lane)
    metadata = pipes.metadata + slot * launch.shape.kernel.block_m
    sums = operands.accumulators
    if tile.phase == schedule.PHASE_FC1:
        swapped_epilogue.store_fc1(launch, sums, tokens, smem, metadata, tile, warp, lane)
    else:
        swapped_epilogue.store_fc2(launch, sums, tokens, smem, metadata, slot, tile, warp, lane)
    return multiplied


@cute.jit
def math(launch: Launch, smem_tokens, smem_weights, smem, pipes: Pipes, warp, lane):
    """One math warp, 0..7 of the CTA: 16 rows of each of its warpgroup's blocks, in every tile.
    `smem`: shared memory of the epilogue.
    """
    shape, kernel = launch.shape, launch.shape.kernel
    chunks = smem_weights + warp // 4 * (BLOCKS * CHUNK_BYTES)
    variants = variants_of(shape)
    position, taken = Int32(0), Int32(0)
    running = Int32(kernel.runs(GEMMS))
    while running == 1:
        tile = take_tile(pipes, taken)
        begin = sync.trace_clock(launch)
        if tile.phase == schedule.PHASE_DONE:
            running = Int32(0)
        else:
            k_blocks = k_blocks_of(launch, tile)
            multiplied = begin
            for number in range_constexpr(len(variants)):
                tokens = variants[number]
                fewer = variants[number - 1] if number else 0
                if tile.rows > fewer and tile.rows <= tokens:
                    multiplied = multiply_and_store(
                        launch, smem_tokens, tokens, pipes, smem, tile, taken, position,
                        k_blocks, chunks, warp, lane,
                    )  # fmt: skip
            arch.sync_warp()
            if lane == 0:
                arch.mbarrier_arrive(pipes.stored + taken % QUEUE_SLOTS)
            if warp == 0 and lane == 0:
                times = [begin, multiplied, sync.trace_clock(launch)]
                sync.record_tile(launch, taken, tile.phase, tile.pool, tile.column, times)
            position += k_blocks
        release_tile(pipes, taken, lane)
        taken += 1
    if warp == 0 and lane == 0:
        sync.mark(launch, "last_tile")
