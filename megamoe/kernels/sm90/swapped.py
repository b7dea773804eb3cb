"""The math role with its operands swapped, for weights that are stored in 4 bits: a tile's weights
are A, which each thread dequantises into registers, and its tokens are B in shared memory.

A warpgroup has two blocks of 64 weight rows, the tile's 128 between them and the other warpgroup's;
an accumulator holds the block's rows by the tile's tokens, as many as there are: a multiple of 8
for which there is a variant. Both warpgroups work on every tile. Sums of a K block start fresh and
are promoted, times the scale of their token and that of their row, if there is one per K block;
without either the tensor cores add up over all of K. Exponents of weights are in their e4m3
already, but for one factor per row, which the epilogue applies.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Constexpr, Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup

from megamoe import schedule
from megamoe.architecture import SM90A
from megamoe.config import GEMMS
from megamoe.fourbit_layout import CHUNK_BYTES, CHUNK_COLUMNS
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch
from megamoe.kernels.ptx import as_float, load_shared_v2
from megamoe.kernels.sm90.dequantize import decoder_of, expand, load_codes
from megamoe.kernels.sm90.mainloop import release
from megamoe.kernels.sm90.swapped_epilogue import store
from megamoe.kernels.tiles import Pipes, k_blocks_of, release_tile, report_stored, take_tile
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


def fragments_of(tokens: int) -> int:
    """Fragments of weights that there are registers for, with sums of each."""
    return BLOCKS if tokens <= MAX_PART else 1


class Operands(NamedTuple):
    """One warpgroup's for some number of tokens: `a` are registers of fragments of weights, `words`
    the same as Int32; `b` descriptors of the tokens, by part; `sums` of one part, as many as
    fragments; `accumulators` by block and part.
    """

    mma: cute.TiledMma
    a: list
    words: list
    b: list
    sums: list
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
    parts, fragments = range(tokens // width), range(fragments_of(tokens))
    a_shape = part.partition_shape_A((SM90A.group_rows, CHUNK_COLUMNS))
    a = [mma.make_fragment_A(a_shape) for _ in fragments]
    return Operands(
        mma,
        a,
        [cute.recast_tensor(fragment, Int32) for fragment in a],
        [columns[None, (None, n), None, None] for n in parts],
        [cute.make_rmem_tensor(shape, Float32) for _ in fragments],
        [[cute.make_rmem_tensor(shape, Float32) for _ in parts] for _ in range(BLOCKS)],
    )


@cute.jit
def issue(operands, fragment: Constexpr, parts: Constexpr, outputs: Constexpr, stage,
          fresh: Constexpr):  # fmt: skip
    """`outputs`, by part, = or += a fragment of weights @ tokens of `parts`, as one WGMMA group."""
    a = operands.a[fragment]
    atom = cute.make_mma_atom(operands.mma.op)
    warpgroup.fence()
    for number in range_constexpr(len(parts)):
        b, out = operands.b[parts[number]], outputs[number]
        for k in range_constexpr(cute.size(a, mode=[2])):
            atom.set(warpgroup.Field.ACCUMULATE, not (fresh and k == 0))
            cute.gemm(atom, out, a[None, None, k], b[None, None, k, stage], out)
    warpgroup.commit_group()


@cute.jit
def promote(accumulator, sums, scales, row_scales):
    """accumulator += sums * scale of the token * that of the row, unless `row_scales` is None.
    `scales`: shared pointer to the scale of this lane's first token in the part; every 8 tokens it
    has two more.
    """
    for slab in range_constexpr(cute.size(accumulator) // 4):
        pair = [as_float(word) for word in load_shared_v2(scales + 32 * slab)]
        for i in range_constexpr(4):
            index = 4 * slab + i
            scaled = sums[index] * pair[i % 2]
            if const_expr(row_scales is not None):
                scaled = scaled * row_scales[i // 2]
            accumulator[index] = accumulator[index] + scaled


@cute.jit
def accumulate(
    launch: Launch, operands, promotes: Constexpr, pipes, chunks, thread, position, k_blocks, lane
):
    """accumulators = weights @ tokens^T over `k_blocks` K blocks, the first of which is number
    `position` of the ring. `chunks`: shared memory of the warpgroup's first chunk in stage 0;
    `thread`: in the warpgroup. `promotes`: tokens have a scale per K block, whose sums start fresh;
    else the tensor cores add up over all of K.
    """
    for block in operands.accumulators:
        for part in block:
            part.fill(0.0)
    run = launch, operands, promotes, pipes, chunks, thread, position, k_blocks, lane
    if const_expr(len(operands.a) == BLOCKS):
        accumulate_together(*run)
    else:
        accumulate_in_turn(*run)


@cute.jit
def accumulate_together(
    launch: Launch, operands, promotes: Constexpr, pipes, chunks, thread, position, k_blocks, lane
):
    """See `accumulate`. Products of both blocks are in flight together: of few tokens they take
    less time than it takes to start one and to wait for it.
    """
    stages, parts = launch.shape.kernel.num_stages, list(range(len(operands.b)))
    stage_bytes, scale_bytes = launch.shape.b_stage_bytes, 4 * launch.shape.kernel.block_m
    scales = pipes.row_scales + lane % 4 * 8
    stage = position % stages
    arch.mbarrier_wait(pipes.full + stage, (position // stages) % 2)
    for number in range_constexpr(BLOCKS):
        here = chunks + (stage * stage_bytes + number * CHUNK_BYTES)
        codes, exponents = load_codes(launch, here, thread)
        expand(launch, operands.words[number], codes, exponents)
    for block in cutlass.range(k_blocks, unroll=1):
        stage = (position + block) % stages
        for number in range_constexpr(BLOCKS):
            outputs = operands.accumulators[number]
            if const_expr(promotes):
                outputs = [operands.sums[number]]
            issue(operands, number, parts, outputs, stage, promotes)
        ahead = min(block + 1, k_blocks - 1)  # behind the last, it again: its stage is still held
        next_stage = (position + ahead) % stages
        arch.mbarrier_wait(pipes.full + next_stage, (position + ahead) // stages % 2)
        loaded = [
            load_codes(launch, chunks + (next_stage * stage_bytes + number * CHUNK_BYTES), thread)
            for number in range(BLOCKS)
        ]
        for number in range_constexpr(BLOCKS):
            warpgroup.wait_group(BLOCKS - 1 - number)
            if const_expr(promotes):
                sums, accumulator = operands.sums[number], operands.accumulators[number][0]
                own = chunks + (stage * stage_bytes + number * CHUNK_BYTES)
                row_scales = decoder_of(launch).row_scales(own, thread)
                promote(accumulator, sums, scales + stage * scale_bytes, row_scales)
            expand(launch, operands.words[number], *loaded[number])
        arch.sync_warp()  # every lane has read its scales and codes
        release(pipes.empty, stage, lane, 1)


@cute.jit
def accumulate_in_turn(
    launch: Launch, operands, promotes: Constexpr, pipes, chunks, thread, position, k_blocks, lane
):
    """See `accumulate`. A fragment is dequantised when the tensor cores are done with the last one;
    the other warpgroup keeps them busy meanwhile. A second fragment, or sums of two parts in
    flight, were no faster with promotion, and without it leave too few registers for 128 tokens.
    """
    stages = launch.shape.kernel.num_stages
    stage_bytes, scale_bytes = launch.shape.b_stage_bytes, 4 * launch.shape.kernel.block_m
    scales = pipes.row_scales + lane % 4 * 8
    sums, words = operands.sums[0], operands.words[0]
    parts, slabs = list(range(len(operands.b))), cute.size(sums) // 4
    groups = [[part] for part in parts] if promotes else [parts]
    stage = position % stages
    arch.mbarrier_wait(pipes.full + stage, (position // stages) % 2)
    codes, exponents = load_codes(launch, chunks + stage * stage_bytes, thread)
    expand(launch, words, codes, exponents)
    for block in cutlass.range(k_blocks, unroll=1):
        stage = (position + block) % stages
        ahead = min(block + 1, k_blocks - 1)  # behind the last, it again: its stage is still held
        next_stage = (position + ahead) % stages
        for number in range_constexpr(BLOCKS):
            accumulators = operands.accumulators[number]
            codes, exponents, row_scales = [], None, None
            for group in groups:
                issue(operands, 0, group, [sums] if promotes else accumulators, stage, promotes)
                if const_expr(group == groups[0]):  # under the tensor cores
                    own = chunks + (stage * stage_bytes + number * CHUNK_BYTES)
                    row_scales = decoder_of(launch).row_scales(own, thread)
                    here = chunks + (stage * stage_bytes + CHUNK_BYTES)
                    if const_expr(number == BLOCKS - 1):
                        parity = (position + ahead) // stages % 2
                        arch.mbarrier_wait(pipes.full + next_stage, parity)
                        here = chunks + next_stage * stage_bytes
                    codes, exponents = load_codes(launch, here, thread)
                warpgroup.wait_group(0)
                if const_expr(promotes):
                    of_part = scales + (stage * scale_bytes + group[0] * (32 * slabs))
                    promote(accumulators[group[0]], sums, of_part, row_scales)
            expand(launch, words, codes, exponents)
        arch.sync_warp()  # every lane has read its scales and codes
        release(pipes.empty, stage, lane, 1)


@cute.jit
def multiply_and_store(
    launch: Launch, smem_tokens, tokens: Constexpr, pipes, smem, tile, taken, position, k_blocks,
    chunks, warp, lane,
):  # fmt: skip
    """A tile with up to `tokens` tokens. Returns when its product was done."""
    recipe = launch.shape.config.recipe
    run = pipes, chunks, warp % 4 * 32 + lane, position, k_blocks, lane
    rest = tokens, pipes, smem, tile, taken, warp, lane
    multiplied = Int64(0)
    if const_expr(recipe.fc1_promotes == recipe.fc2_promotes):  # the same instructions
        operands = operands_of(smem_tokens, tokens)
        accumulate(launch, operands, recipe.fc1_promotes, *run)
        multiplied = sync.trace_clock(launch)
        if tile.phase == schedule.PHASE_FC1:
            store(launch, operands.accumulators, True, *rest)
        else:
            store(launch, operands.accumulators, False, *rest)
    else:
        for fc1 in (True, False):
            if (tile.phase == schedule.PHASE_FC1) == fc1:
                operands = operands_of(smem_tokens, tokens)
                promotes = recipe.fc1_promotes if fc1 else recipe.fc2_promotes
                accumulate(launch, operands, promotes, *run)
                multiplied = sync.trace_clock(launch)
                store(launch, operands.accumulators, fc1, *rest)
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
            report_stored(launch, pipes, tile, taken, 1, warp, [begin, multiplied], lane)
            position += k_blocks
        release_tile(pipes, taken, lane)
        taken += 1
    if warp == 0 and lane == 0:
        sync.mark(launch, "last_tile")
