"""Epilogues of tiles with swapped operands: rows of an accumulator are output channels, columns are
tokens.

Accumulator element (q, r, j) of a lane in a block of 64 rows is row lane / 4 + 8 r of the 16 of its
warp, token 8 j + 2 (lane % 4) + q. Which weight rows the two blocks of a warpgroup are:

- packed (`fourbit_layout`): in FC1 row 8 r + g of a warp is the gate (r = 0) or the up value
  (r = 1) of one output, and outputs of the two blocks lie side by side. In FC2 a warp has 32
  neighbouring outputs.
- as they lie in the checkpoint: in FC1 the first block is the gates and the second the ups of 64
  neighbouring outputs; two lanes trade, so that each has two outputs that lie side by side. In FC2
  a warp has 16 neighbouring outputs of each block.

Either way a warp has 16 neighbouring places of each token's row of FC1's output, and a tile 128 of
them, which share a scale.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr, range_constexpr

from megamoe import schedule, wire
from megamoe.activation import SWIGLU
from megamoe.budget import PASS_BYTES, QUEUE_SLOTS, max_tokens
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
    opaque,
    pack_bf16x2,
    pack_e4m3x4,
    select,
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
    back the tile before the last, which had the slot. Maxima of FP8 weights have one place for
    all tiles, for want of memory, and a barrier behind their readers.
    """

    staging: cute.Pointer
    maxima: cute.Pointer
    row_factors: cute.Pointer
    token_scales: cute.Pointer

    def of_slot(self, shape, slot):
        """That of one slot of the tile queue."""
        kernel, maxima = shape.kernel, self.maxima
        if shape.config.recipe.weights.packed:
            maxima += slot * (4 * kernel.num_math_warps * max_tokens(shape.config, kernel))
        return self._replace(
            maxima=maxima,
            row_factors=self.row_factors + slot * (4 * kernel.block_n),
            token_scales=self.token_scales + slot * (4 * kernel.block_m),
        )


@cute.jit
def store(
    launch: Launch, accumulators, fc1: Constexpr, tokens: Constexpr, pipes, smem, tile, taken, warp,
    lane,
):  # fmt: skip
    """The epilogue of FC1 or of FC2, once the tile's metadata is there."""
    kernel, slot = launch.shape.kernel, taken % QUEUE_SLOTS
    arch.mbarrier_wait(pipes.metadata_full + slot, taken // QUEUE_SLOTS % 2)
    lane = opaque(lane)
    metadata, smem = pipes.metadata + slot * kernel.block_m, smem.of_slot(launch.shape, slot)
    if const_expr(fc1):
        store_fc1(launch, accumulators, tokens, smem, metadata, tile, warp, lane)
    else:
        store_fc2(launch, accumulators, tokens, smem, metadata, tile, warp, lane)


def group_of(tokens: int) -> int:
    """Tokens that leave together."""
    return GROUP_TOKENS if tokens % GROUP_TOKENS == 0 else GROUP_TOKENS // 2


def parts_of(accumulators, block: int):
    """(accumulator of the part, index in it) by slab of 8 tokens."""
    size = cute.size(accumulators[block][0]) // 4
    return [(part, 4 * slab) for part in accumulators[block] for slab in range(size)]


def outputs_of(accumulators, packed: bool) -> list:
    """By slab of 8 tokens and q: where the gates and where the ups of two outputs of a token are,
    each a tensor and an index. The outputs take the places of the gates.
    """
    found = []
    for blocks in zip(*(parts_of(accumulators, block) for block in range(2)), strict=True):
        for q in range(2):
            of_blocks = [[(part, index + 2 * r + q) for r in range(2)] for part, index in blocks]
            found.append([*zip(*of_blocks, strict=True)] if packed else of_blocks)
    return found


def role_of(block: int, r: int, packed: bool) -> tuple[int, int]:
    """(1 for an up value or 0 for a gate, which of a lane's two outputs it belongs to) of element r
    of a block.
    """
    return (r, block) if packed else (block, r)


@cute.jit
def bound(accumulators, packed: Constexpr, function: Constexpr, limit):
    """The activation's bounds."""
    for block in range_constexpr(len(accumulators)):
        for part, index in parts_of(accumulators, block):
            for i in range_constexpr(4):
                is_up, _ = role_of(block, i // 2, packed)
                part[index + i] = function(part[index + i], is_up == 1, limit)


def traded(values, odd):
    """Of a lane's values of rows g and g + 8, and those of the lane with g ^ 1: both lanes' values
    of row g, or if g is odd of row g + 8, that of the smaller row first.
    """
    first, second = values
    theirs = arch.shuffle_sync_bfly(select(odd, first, second), offset=4)
    return select(odd, theirs, first), select(odd, second, theirs)


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


def row_factors(launch: Launch, factors, warp, g):
    """Factors of the gates of a lane's two outputs, then of their ups."""
    columns = launch.shape.kernel.block_n // 2
    if launch.shape.config.recipe.weights.packed:
        gate = factors + 4 * column_at(warp * 16 + g * 2)
        return [[as_float(word) for word in load_shared_v2(gate + 4 * n * columns)] for n in (0, 1)]
    gate = factors + 4 * (warp * 16 + g)
    return [
        [as_float(load_shared(gate + 4 * (n * columns + 8 * r))) for r in (0, 1)] for n in (0, 1)
    ]


@cute.jit
def scale_and_activate(launch: Launch, accumulators, factors, warp, g):
    """Times the factors of their rows, then the activation: outputs replace the gates."""
    activation, weights = ACTIVATIONS[SWIGLU.name], launch.shape.config.recipe.weights
    if const_expr(weights.row_factors):
        values = row_factors(launch, factors, warp, g)
        for block in range_constexpr(len(accumulators)):
            for part, index in parts_of(accumulators, block):
                for q in range_constexpr(2):
                    for r in range_constexpr(2):
                        is_up, output = role_of(block, r, weights.packed)
                        element = index + 2 * r + q
                        part[element] = part[element] * values[is_up][output]
    if launch.clamp < NO_LIMIT:  # a branch around the work: most layers have none
        bound(accumulators, weights.packed, activation.bound, launch.clamp)
    for places in outputs_of(accumulators, weights.packed):
        gates, ups = ([part[index] for part, index in kind] for kind in places)
        if const_expr(not weights.packed):
            gates, ups = traded(gates, g % 2), traded(ups, g % 2)
        # Of one token, side by side: outputs of a pair share roundings.
        pair = activation.outputs(gates, ups, ())
        for n in range_constexpr(2):
            part, index = places[0][n]
            part[index] = pair[n]


@cute.jit
def store_maxima(accumulators, packed: Constexpr, maxima, g, t):
    """The largest magnitude of every token among this warp's outputs. `maxima`: shared memory, a
    float32 per token.
    """
    outputs = outputs_of(accumulators, packed)
    for slab in range_constexpr(len(outputs) // 2):
        pair = []
        for q in range_constexpr(2):
            largest = magnitude([part[index] for part, index in outputs[2 * slab + q][0]])
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
    kernel, most = launch.shape.kernel, max_tokens(launch.shape.config, launch.shape.kernel)
    target = address(launch, "fc1_output_scale", tile.pool % launch.shape.ring)
    target += Int64(tile.column) * (4 * kernel.block_m)
    factors = []
    for first in range_constexpr(0, tokens, 32):
        width = min(32, tokens - first)
        token = first + lane % width
        values = [
            as_float(load_shared(smem.maxima + (number * 4 * most + token * 4)))
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
    packed = shape.config.recipe.weights.packed
    g, t = lane // 4, lane % 4
    if const_expr(shape.config.recipe.tokens.scale_columns == WHOLE_ROW):
        scale_tokens(accumulators, smem.token_scales, t)
    scale_and_activate(launch, accumulators, smem.row_factors, warp, g)
    maxima = smem.maxima + warp * (4 * max_tokens(shape.config, kernel))
    store_maxima(accumulators, packed, maxima, g, t)
    sync.cta_barrier(launch, MATH_WARPS)
    factors = quantize(launch, tokens, smem, metadata, tile, warp, lane)
    if const_expr(not packed):
        sync.cta_barrier(launch, MATH_WARPS)  # maxima have been read
    outputs = outputs_of(accumulators, packed)
    staging = smem.staging + warp * PASS_BYTES
    group = group_of(tokens)
    for start in range_constexpr(0, tokens, group):
        matrices = []
        for slab in range_constexpr(start // 8, (start + group) // 8):
            pairs = []
            for q in range_constexpr(2):
                factor = arch.shuffle_sync(factors[slab // 4], slab % 4 * 8 + 2 * t + q)
                for part, index in outputs[2 * slab + q][0]:
                    pairs.append(part[index] * factor)
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
            if const_expr(not packed):
                words = in_order(words)
            store_global_v4(base + Int64(token) * shape.fc1_out_row_bytes, words)


def in_order(words):
    """Pairs of outputs as `traded` has left them, those of lanes with an even g before the rest."""
    first, second = (
        [arch.prmt(low, high, Int32(order)) for low, high in (words[:2], words[2:])]
        for order in (0x5410, 0x7632)
    )
    return [*first, *second]


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
    kernel, weights = launch.shape.kernel, launch.shape.config.recipe.weights
    g = lane // 4
    targets = targets_of(launch, tokens, metadata, tile, lane)
    # The first output of a warp, and where its four groups of eight begin from there on.
    row, groups = warp * 32, (0, 8, 16, 24)
    if const_expr(not weights.packed):
        row, groups = warp // 4 * 128 + warp % 4 * 16, (0, 8, 64, 72)
    if tile.column * kernel.block_n + row < launch.shape.config.hidden_size:
        staging = smem.staging + warp * PASS_BYTES
        of_rows = [None] * 4
        if const_expr(weights.row_factors):
            of_rows = [
                as_float(load_shared(smem.row_factors + 4 * (row + first + g))) for first in groups
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
                        pair = [part[index + 2 * half + q] for q in range(2)]
                        if const_expr(factor is not None):
                            pair = [value * factor for value in pair]
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
                    offset = warp * FC2_BYTES + column * 16
                    if const_expr(not weights.packed):
                        offset = 2 * (row + column // 2 * groups[2] + column % 2 * groups[1])
                    store_global_v4(target + offset, words)
            arch.sync_warp()
