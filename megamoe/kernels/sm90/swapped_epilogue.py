"""Epilogues of tiles with swapped operands: rows of an accumulator are output channels, columns are
tokens.

Accumulator element (q, r, j) of a lane in a block of 64 rows is row lane / 4 + 8 r of the 16 of its
warp, token 8 j + 2 (lane % 4) + q. In FC1 row 8 r + g of a warp is the gate (r = 0) or the up value
(r = 1) of one output, and outputs of the two blocks of a warpgroup lie side by side; so a warp has
16 neighbouring places of each token's row, and a tile 128 of them, which share a scale. In FC2 a
warp has 32 neighbouring outputs. `fourbit_layout` says which weight rows these are.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, range_constexpr

from megamoe import schedule, wire
from megamoe.activation import SWIGLU
from megamoe.fourbit_layout import column_at
from megamoe.kernels import sync
from megamoe.kernels.activation import ACTIVATIONS, NO_LIMIT
from megamoe.kernels.launch import Launch, address, peer_base
from megamoe.kernels.ptx import (
    as_float,
    as_word,
    global_ptr,
    load_global_v2,
    load_shared,
    load_shared_v2,
    load_shared_v4,
    pack_bf16x2,
    pack_e4m3x4,
    store_global,
    store_global_v4,
    store_matrices_transposed,
    store_shared,
    store_shared_v2,
)
from megamoe.kernels.quantize import magnitude, scale_of
from megamoe.ordering import MATH_WARPS

arch = cute.arch

GROUP_TOKENS = 32  # that leave together, or half of them
ROW_BYTES = 128  # of a token in a tile of FC1
WARP_BYTES = 64  # of a token in FC2, of one warp


class Exchange(NamedTuple):
    """Shared memory of the epilogue (`budget.exchange`), and what rows leave through."""

    staging: cute.Pointer
    maxima: cute.Pointer
    factors: cute.Pointer
    targets: cute.Pointer


def group_of(tokens: int) -> int:
    """Tokens that leave together."""
    return GROUP_TOKENS if tokens % GROUP_TOKENS == 0 else GROUP_TOKENS // 2


def parts_of(accumulators, block: int):
    """(accumulator of the part, index in it) by slab of 8 tokens."""
    size = cute.size(accumulators[block][0]) // 4
    return [(part, 4 * slab) for part in accumulators[block] for slab in range(size)]


@cute.jit
def bound(accumulators, function: Constexpr, limit):
    """The activation's bounds."""
    for block in range_constexpr(len(accumulators)):
        for part, index in parts_of(accumulators, block):
            for i in range_constexpr(4):
                part[index + i] = function(part[index + i], i >= 2, limit)


@cute.jit
def scale_and_activate(launch: Launch, accumulators, tile, warp, g):
    """Times the factors of their rows, then the activation: outputs replace the gates."""
    activation = ACTIVATIONS[SWIGLU.name]
    intermediate, columns = launch.shape.config.intermediate_size, launch.shape.kernel.block_n // 2
    factors = launch.w13_scales + Int64(tile.expert) * (4 * SWIGLU.fc1_columns(intermediate))
    gate = tile.column * columns + column_at(warp * 16 + g * 2)
    of_gates = [as_float(word) for word in load_global_v2(factors + Int64(gate) * 4)]
    of_ups = [as_float(word) for word in load_global_v2(factors + Int64(gate + intermediate) * 4)]
    for block in range_constexpr(len(accumulators)):
        for part, index in parts_of(accumulators, block):
            for q in range_constexpr(2):
                part[index + q] = part[index + q] * of_gates[block]
                part[index + 2 + q] = part[index + 2 + q] * of_ups[block]
    if launch.clamp < NO_LIMIT:  # a branch around the work: most layers have none
        bound(accumulators, activation.bound, launch.clamp)
    first, second = (parts_of(accumulators, block) for block in range(2))
    for slab in range_constexpr(len(first)):
        pair = first[slab], second[slab]  # of one token: outputs of a pair share roundings
        for q in range_constexpr(2):
            gates, ups = ([part[index + r + q] for part, index in pair] for r in (0, 2))
            outputs = activation.outputs(gates, ups, ())
            for block in range_constexpr(2):
                part, index = pair[block]
                part[index + q] = outputs[block]


@cute.jit
def store_maxima(accumulators, maxima, g, t):
    """The largest magnitude of every token among this warp's outputs. `maxima`: shared memory, a
    float32 per token.
    """
    first, second = (parts_of(accumulators, block) for block in range(2))
    for slab in range_constexpr(len(first)):
        pair = []
        for q in range_constexpr(2):
            values = [part[index + q] for part, index in (first[slab], second[slab])]
            largest = magnitude(values)
            for step in (4, 8, 16):
                largest = arch.fmax(largest, arch.shuffle_sync_bfly(largest, offset=step))
            pair.append(as_word(largest))
        if g == 0:
            store_shared_v2(maxima + (32 * slab + 8 * t), *pair)


@cute.jit
def store_scales(launch: Launch, tokens: Constexpr, smem, metadata, tile, thread):
    """One thread per token: its scale to global memory, the factor of its outputs to shared
    memory.
    """
    kernel = launch.shape.kernel
    if thread < tokens:
        values = [
            as_float(load_shared(smem.maxima + (warp * 4 * kernel.block_m + thread * 4)))
            for warp in range(kernel.num_math_warps)
        ]
        weight = as_float(load_shared(metadata + thread))
        # The largest product is the largest value times the weight.
        scale, inverse = scale_of(magnitude(values) * magnitude([weight]))
        store_shared(smem.factors + thread * 4, as_word(inverse * weight))
        target = address(launch, "fc1_output_scale", tile.pool % launch.shape.ring)
        row = Int64(tile.column * kernel.block_m + thread)
        store_global(target + row * 4, as_word(scale))


@cute.jit
def store_fc1(launch: Launch, accumulators, tokens: Constexpr, smem, metadata, tile, warp, lane):
    """FC1 tile: 128 outputs of each of `tokens` tokens to `fc1_output`, and their scale."""
    shape, kernel = launch.shape, launch.shape.kernel
    g, t = lane // 4, lane % 4
    thread = warp * 32 + lane
    scale_and_activate(launch, accumulators, tile, warp, g)
    store_maxima(accumulators, smem.maxima + warp * (4 * kernel.block_m), g, t)
    sync.cta_barrier(launch, MATH_WARPS)
    store_scales(launch, tokens, smem, metadata, tile, thread)
    sync.cta_barrier(launch, MATH_WARPS)
    first, second = (parts_of(accumulators, block) for block in range(2))
    group = group_of(tokens)
    for start in range_constexpr(0, tokens, group):
        matrices = []
        for slab in range_constexpr(start // 8, (start + group) // 8):
            factors = [
                as_float(word) for word in load_shared_v2(smem.factors + (32 * slab + 8 * t))
            ]
            pairs = []
            for q in range_constexpr(2):
                for part, index in (first[slab], second[slab]):
                    pairs.append(part[index + q] * factors[q])
            matrices.append(pack_e4m3x4(pairs))
        token = start + lane % group
        chunk = warp ^ (token % 8)
        store_matrices_transposed(smem.staging + (token * ROW_BYTES + chunk * 16), matrices)
    sync.cta_barrier(launch, MATH_WARPS)
    row_bytes = shape.fc1_out_row_bytes
    first_row = schedule.ring_row(tile.pool, shape.ring, kernel.block_m)
    base = address(launch, "fc1_output", first_row) + tile.column * ROW_BYTES
    threads = MATH_WARPS.threads(kernel)
    for step in range_constexpr(-(-tokens * 8 // threads)):
        number = step * threads + thread
        token, column = number // 8, number % 8
        if token < tokens:
            words = load_shared_v4(smem.staging + (token * ROW_BYTES + (column ^ (token % 8)) * 16))
            store_global_v4(base + (Int64(token) * row_bytes + column * 16), words)


@cute.jit
def store_targets(launch: Launch, tokens: Constexpr, targets, metadata, tile, thread):
    """One thread per token: where its row goes, to shared memory; 0 for none."""
    shape = launch.shape
    max_slots = shape.config.max_slots_per_rank
    if thread < tokens:
        code = load_shared(metadata + thread)
        target = Int64(0)
        if code != wire.PADDING:
            slot = wire.source_slot(code, max_slots)
            target = peer_base(launch, wire.source_rank(code, max_slots))
            target += Int64(shape.layout["combine_output"].offset)
            target += Int64(slot) * shape.output_row_bytes + Int64(tile.column) * (
                2 * shape.kernel.block_n
            )
        store_shared_v2(targets + thread * 8, Int32(target), Int32(target >> 32))


@cute.jit
def store_fc2(
    launch: Launch, accumulators, tokens: Constexpr, smem, metadata, slot, tile, warp, lane
):
    """FC2 tile: real rows to `combine_output` of their source rank."""
    shape, kernel = launch.shape, launch.shape.kernel
    g = lane // 4
    targets = smem.targets + slot * (8 * kernel.block_m)
    store_targets(launch, tokens, targets, metadata, tile, warp * 32 + lane)
    channel = tile.column * kernel.block_n + warp * 32
    inside = channel < shape.config.hidden_size
    factors = launch.w2_scales + Int64(tile.expert) * (4 * shape.config.hidden_size)
    row = channel
    if not inside:
        row = Int32(0)  # what is read is not stored
    sync.cta_barrier(launch, MATH_WARPS)
    staging = smem.staging + warp * (GROUP_TOKENS * WARP_BYTES)
    of_rows = []
    for block in range_constexpr(2):
        for half in range_constexpr(2):
            number = row + (block * 16 + half * 8) + g
            of_rows.append(arch.load(global_ptr(factors + Int64(number) * 4, Float32), Float32))
    blocks = [parts_of(accumulators, block) for block in range(2)]
    group = group_of(tokens)
    for start in range_constexpr(0, tokens, group):
        for slab in range_constexpr(start // 8, (start + group) // 8):
            matrices = []
            for block in range_constexpr(2):
                for half in range_constexpr(2):
                    part, index = blocks[block][slab]
                    factor = of_rows[2 * block + half]
                    pair = [part[index + 2 * half + q] * factor for q in range(2)]
                    matrices.append(pack_bf16x2(*pair))
            token = slab * 8 - start + lane % 8
            chunk = (lane // 8) ^ (token // 2 % 4)
            store_matrices_transposed(staging + (token * WARP_BYTES + chunk * 16), matrices)
        arch.sync_warp()
        for step in range_constexpr(group // 8):
            token, column = step * 8 + lane // 4, lane % 4
            words = load_shared_v4(
                staging + (token * WARP_BYTES + (column ^ (token // 2 % 4)) * 16)
            )
            low, high = load_shared_v2(targets + (start + token) * 8)
            target = (Int64(high) << 32) | (Int64(low) & Int64(0xFFFFFFFF))
            if target != 0 and inside:
                store_global_v4(target + (warp * WARP_BYTES + column * 16), words)
        arch.sync_warp()
