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
from cutlass import Constexpr, Int32, Int64, const_expr, range_constexpr

from megamoe import schedule, wire
from megamoe.activation import SWIGLU
from megamoe.budget import PASS_BYTES
from megamoe.fourbit_layout import column_at
from megamoe.kernels import sync
from megamoe.kernels.activation import ACTIVATIONS, NO_LIMIT
from megamoe.kernels.launch import Launch, address, peer_base
from megamoe.kernels.ptx import (
    as_float,
    as_word,
    load_shared,
    load_shared_v2,
    load_shared_v4,
    pack_bf16x2,
    pack_e4m3x4,
    store_global,
    store_global_v4,
    store_matrices_transposed,
    store_shared_v2,
)
from megamoe.kernels.quantize import magnitude, scale_of
from megamoe.ordering import MATH_WARPS
from megamoe.precision import WHOLE_ROW

arch = cute.arch

GROUP_TOKENS = 32  # that leave together, or half of them
#: Of a token, of one warp.
FC1_BYTES, FC2_BYTES = 16, 64


class Exchange(NamedTuple):
    """Shared memory of the epilogue (`budget.exchange`), and what rows leave through, 2 KB a warp.

    Either slot of the tile queue has its own: who writes that of a tile has seen every warp give
    back the tile before the last, which had the slot.
    """

    staging: cute.Pointer
    maxima: cute.Pointer
    row_factors: cute.Pointer
    token_scales: cute.Pointer

    def of_slot(self, kernel, slot):
        """That of one slot of the tile queue."""
        return self._replace(
            maxima=self.maxima + slot * (4 * kernel.num_math_warps * kernel.block_m),
            row_factors=self.row_factors + slot * (4 * kernel.block_n),
            token_scales=self.token_scales + slot * (4 * kernel.block_m),
        )


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
def scale_tokens(accumulators, scales, t):
    """accumulators *= scale of the token, where a row of tokens has one."""
    blocks = [parts_of(accumulators, block) for block in range(len(accumulators))]
    for slab in range_constexpr(len(blocks[0])):
        pair = [as_float(word) for word in load_shared_v2(scales + (32 * slab + 8 * t))]
        for block in range_constexpr(len(blocks)):
            part, index = blocks[block][slab]
            for i in range_constexpr(4):
                part[index + i] = part[index + i] * pair[i % 2]


@cute.jit
def scale_and_activate(launch: Launch, accumulators, factors, warp, g):
    """Times the factors of their rows, then the activation: outputs replace the gates."""
    activation = ACTIVATIONS[SWIGLU.name]
    columns = launch.shape.kernel.block_n // 2
    gate = factors + 4 * column_at(warp * 16 + g * 2)
    of_gates = [as_float(word) for word in load_shared_v2(gate)]
    of_ups = [as_float(word) for word in load_shared_v2(gate + 4 * columns)]
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
def quantize(launch: Launch, tokens: Constexpr, smem, metadata, tile, warp, lane):
    """Factors of outputs, by group of 32 tokens, for token number `lane` of the group. Every warp
    has all of them; one stores the scales.
    """
    kernel = launch.shape.kernel
    target = address(launch, "fc1_output_scale", tile.pool % launch.shape.ring)
    target += Int64(tile.column) * (4 * kernel.block_m)
    factors = []
    for first in range_constexpr(0, tokens, 32):
        width = min(32, tokens - first)
        token = first + lane % width
        values = [
            as_float(load_shared(smem.maxima + (number * 4 * kernel.block_m + token * 4)))
            for number in range(kernel.num_math_warps)
        ]
        weight = as_float(load_shared(metadata + token))
        # The largest product is the largest value times the weight.
        scale, inverse = scale_of(magnitude(values) * magnitude([weight]))
        factors.append(inverse * weight)
        if warp == 0 and lane < width:
            store_global(target + Int64(token) * 4, as_word(scale))
    return factors


@cute.jit
def store_fc1(launch: Launch, accumulators, tokens: Constexpr, smem, metadata, tile, warp, lane):
    """FC1 tile: 128 outputs of each of `tokens` tokens to `fc1_output`, and their scale."""
    shape, kernel = launch.shape, launch.shape.kernel
    g, t = lane // 4, lane % 4
    if const_expr(shape.config.recipe.tokens.scale_columns == WHOLE_ROW):
        scale_tokens(accumulators, smem.token_scales, t)
    scale_and_activate(launch, accumulators, smem.row_factors, warp, g)
    store_maxima(accumulators, smem.maxima + warp * (4 * kernel.block_m), g, t)
    sync.cta_barrier(launch, MATH_WARPS)
    factors = quantize(launch, tokens, smem, metadata, tile, warp, lane)
    first, second = (parts_of(accumulators, block) for block in range(2))
    staging = smem.staging + warp * PASS_BYTES
    group = group_of(tokens)
    for start in range_constexpr(0, tokens, group):
        matrices = []
        for slab in range_constexpr(start // 8, (start + group) // 8):
            pairs = []
            for q in range_constexpr(2):
                factor = arch.shuffle_sync(factors[slab // 4], slab % 4 * 8 + 2 * t + q)
                for part, index in (first[slab], second[slab]):
                    pairs.append(part[index + q] * factor)
            matrices.append(pack_e4m3x4(pairs))
        token = start + lane % group
        store_matrices_transposed(staging + token * FC1_BYTES, matrices)
    arch.sync_warp()
    first_row = schedule.ring_row(tile.pool, shape.ring, kernel.block_m)
    base = address(launch, "fc1_output", first_row)
    base += tile.column * (kernel.block_n // 2) + warp * FC1_BYTES
    for start in range_constexpr(0, tokens, 32):
        token = start + lane
        if token < tokens:
            words = load_shared_v4(staging + token * FC1_BYTES)
            store_global_v4(base + Int64(token) * shape.fc1_out_row_bytes, words)


@cute.jit
def targets_of(launch: Launch, tokens: Constexpr, metadata, tile, lane) -> list:
    """Where rows go, by group of 32 tokens, for token number `lane` of the group, in two words; 0
    for none.
    """
    shape = launch.shape
    max_slots = shape.config.max_slots_per_rank
    targets = []
    for first in range_constexpr(0, tokens, 32):
        code = load_shared(metadata + (first + lane % min(32, tokens - first)))
        target = Int64(0)
        if code != wire.PADDING:
            slot = wire.source_slot(code, max_slots)
            target = peer_base(launch, wire.source_rank(code, max_slots))
            target += Int64(shape.layout["combine_output"].offset)
            target += Int64(slot) * shape.output_row_bytes + Int64(tile.column) * (
                2 * shape.kernel.block_n
            )
        targets.append((Int32(target), Int32(target >> 32)))
    return targets


@cute.jit
def store_fc2(launch: Launch, accumulators, tokens: Constexpr, smem, metadata, tile, warp, lane):
    """FC2 tile: real rows to `combine_output` of their source rank."""
    kernel = launch.shape.kernel
    g = lane // 4
    targets = targets_of(launch, tokens, metadata, tile, lane)
    row = warp * 32
    if tile.column * kernel.block_n + row < launch.shape.config.hidden_size:
        staging = smem.staging + warp * PASS_BYTES
        of_rows = [
            as_float(load_shared(smem.row_factors + 4 * (row + 8 * number + g)))
            for number in range(4)
        ]
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
                store_matrices_transposed(staging + (token * FC2_BYTES + chunk * 16), matrices)
            arch.sync_warp()
            for step in range_constexpr(group // 8):
                token, column = step * 8 + lane // 4, lane % 4
                words = load_shared_v4(
                    staging + (token * FC2_BYTES + (column ^ (token // 2 % 4)) * 16)
                )
                low, high = [
                    arch.shuffle_sync(word, start % 32 + token) for word in targets[start // 32]
                ]
                target = (Int64(high) << 32) | (Int64(low) & Int64(0xFFFFFFFF))
                if target != 0:
                    store_global_v4(target + (warp * FC2_BYTES + column * 16), words)
            arch.sync_warp()
