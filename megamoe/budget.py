"""Shared-memory, barrier and register arithmetic of the megakernel, derived from the configurations
alone.

One function gives the map of a CTA's shared memory, with the arrivals of its barriers. The kernel
allocates by it and `check` refuses what does not fit, so a mistake fails the build with its
numbers and not the launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe.config import KernelConfig, MoEConfig, supports
from megamoe.fourbit_layout import CHUNK_BYTES, CHUNK_ROWS
from megamoe.ordering import MBARRIERS
from megamoe.precision import WHOLE_ROW
from megamoe.wire import COUNT_RECORD_BYTES, scale_words

WARP_ROWS = 16  # rows of a tile that one math warp owns
PASS_ROW_BYTES = 128  # of a row in one epilogue pass: 64 bf16
PASS_BYTES = WARP_ROWS * PASS_ROW_BYTES  # shared memory of a math warp's pass
FEW_TOKENS = 32  # of a tile: with so many or less the operands of FP8 weights are swapped
QUEUE_SLOTS = 2  # tiles handed over: the one in work and the next
QUEUE_WORDS = 8  # int32 per handed-over tile
FLAG_WORDS = 4
# This CTA's: no wait failed; last to arrive; end reduce; number of local experts with rows.
FLAG_OK, FLAG_LAST, FLAG_STOP, FLAG_LIVE = 0, 1, 2, 3
ZERO_BYTES = 512  # zeros that dispatch copies to rows that pad a block, at most
WEIGHT_SCALE_BYTES = 16  # of a weight tile for one K block: a float32 per 64 of its columns
EMPTY_BYTES = 16  # of a part that a recipe leaves empty
SHARED_ITEM_BYTES = {"uint8": 1, "int16": 2, "int32": 4, "int64": 8}
NUM_PULL_BUFFERS = 2  # pieces of the dispatch warp: one loading, one being stored


@dataclass(frozen=True)
class Part:
    """A part of a CTA's shared memory. dtype: of its items, as the kernel names them.

    A part of mbarriers also says how many arrivals end a phase of each, and what they are numbered
    by: those of one ring are used in turn.
    """

    name: str
    dtype: str
    num_items: int
    alignment: int
    arrivals: int = 0
    ring: str = ""
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return self.num_items * SHARED_ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


@dataclass(frozen=True)
class Budget:
    """Bytes of one CTA."""

    a_stage_bytes: int
    b_stage_bytes: int
    piece_bytes: int
    zero_bytes: int
    parts: dict[str, Part]  # the map, in the order of addresses

    @property
    def total_bytes(self) -> int:
        return max(part.end for part in self.parts.values())

    @property
    def rings(self) -> dict[str, list[Part]]:
        """Parts of mbarriers by what they are numbered by."""
        rings: dict[str, list[Part]] = {}
        for part in self.parts.values():
            if part.arrivals:
                rings.setdefault(part.ring, []).append(part)
        return rings


def piece_bytes(row_bytes: int, limit: int) -> int:
    """Largest divisor of a token row that is a multiple of 16 bytes and at most `limit`."""
    return max(size for size in range(16, min(row_bytes, limit) + 1, 16) if row_bytes % size == 0)


def weight_scale_bytes(config: MoEConfig) -> int:
    """Block scales of one tile's weights over all of K; 0 for recipes without."""
    weights = config.recipe.weights
    columns = max(config.hidden_size, config.intermediate_size)
    return WEIGHT_SCALE_BYTES * weights.num_scales(columns) if weights.tile_scales else 0


def barriers(kernel: KernelConfig) -> list[Part]:
    """The mbarriers."""
    rings = {
        "stage": kernel.num_stages, "tile": QUEUE_SLOTS, "warpgroup": kernel.num_math_warpgroups,
        "piece": NUM_PULL_BUFFERS,
    }  # fmt: skip
    return [
        Part(row.name, "int64", rings[row.ring], 8, row.arrivals(kernel), row.ring)
        for row in MBARRIERS
    ]


def max_tokens(config: MoEConfig, kernel: KernelConfig) -> int:
    """Tokens of a tile whose operands are swapped, at most."""
    return kernel.block_m if config.recipe.weights.packed else FEW_TOKENS


def exchange(config: MoEConfig, kernel: KernelConfig) -> list[Part]:
    """What an epilogue with swapped operands reads and what its warps tell each other, for either
    slot of the tile queue: the largest output of every token by warp (with FP8 weights once), the
    factors of the tile's weight rows if they have some, and the scales of its tokens if a row has
    one.
    """
    recipe = config.recipe
    maxima = kernel.num_math_warps * max_tokens(config, kernel)
    parts = {
        "maxima": maxima if recipe.weights.packed else maxima // QUEUE_SLOTS,
        "row_factors": kernel.block_n * recipe.weights.row_factors,
        "token_scales": kernel.block_m * (recipe.tokens.scale_columns == WHOLE_ROW),
    }
    return [
        Part(name, "uint8", 4 * QUEUE_SLOTS * words or EMPTY_BYTES, 128)
        for name, words in parts.items()
    ]


def b_stage_bytes(config: MoEConfig, kernel: KernelConfig) -> int:
    """A K block of a tile's weights, with their scales if they are packed."""
    weights = config.recipe.weights
    if weights.packed:
        return kernel.block_n // CHUNK_ROWS * CHUNK_BYTES
    return weights.num_bytes(kernel.block_n * kernel.block_k)


def budget_of(config: MoEConfig, kernel: KernelConfig) -> Budget:
    """The budget; see `check` for what must hold."""
    recipe, local = config.recipe, config.local_experts
    row_bytes = recipe.tokens.num_bytes(config.hidden_size)
    a_stage = recipe.tokens.num_bytes(kernel.block_m * kernel.block_k)
    b_stage = b_stage_bytes(config, kernel)
    piece = piece_bytes(row_bytes, kernel.pull_piece_bytes)
    zeros = piece_bytes(row_bytes, ZERO_BYTES)

    def raw(name: str, num_bytes: int, alignment: int = 128) -> Part:
        return Part(name, "uint8", num_bytes or EMPTY_BYTES, alignment)

    def words(name: str, count: int, dtype: str = "int32") -> Part:
        return Part(name, dtype, count, SHARED_ITEM_BYTES[dtype])

    parts = [
        raw("a", kernel.num_stages * a_stage, 1024),
        raw("b", kernel.num_stages * b_stage, 1024),
        raw("staging", kernel.num_math_warps * PASS_BYTES),
        raw("pull_rows", NUM_PULL_BUFFERS * piece),
        raw("zeros", zeros),
        raw("row_scales", kernel.num_stages * 4 * kernel.block_m * recipe.stages_scales),
        raw("weight_scales", QUEUE_SLOTS * weight_scale_bytes(config)),
        raw("pull_scales", NUM_PULL_BUFFERS * 4 * scale_words(config.token_scales)),
        # Of all sources for the expert that is being pulled.
        words("pull_counts", COUNT_RECORD_BYTES // 4 * config.num_ranks),
        words("metadata", QUEUE_SLOTS * kernel.block_m),
        *(exchange(config, kernel) if recipe.promotes else ()),
        *barriers(kernel),
        words("received", local),
        words("expert_ids", local, "int16"),
        words("queue", QUEUE_SLOTS * QUEUE_WORDS),
        words("flags", FLAG_WORDS),
    ]
    placed, end = {}, 0
    for part in parts:
        placed[part.name] = replace(part, offset=-(-end // part.alignment) * part.alignment)
        end = placed[part.name].end
    return Budget(
        a_stage_bytes=a_stage, b_stage_bytes=b_stage, piece_bytes=piece, zero_bytes=zeros,
        parts=placed,
    )  # fmt: skip


def check(config: MoEConfig, kernel: KernelConfig) -> Budget:
    """The budget, or ValueError naming the field that `supports` refuses or that does not fit."""
    supports(config, kernel)
    budget, target = budget_of(config, kernel), kernel.architecture
    if budget.total_bytes > target.shared_bytes:
        raise ValueError(
            f"num_stages={kernel.num_stages} with {config.local_experts} local experts needs "
            f"{budget.total_bytes} bytes of shared memory; a CTA has {target.shared_bytes}"
        )
    staging_bytes = budget.parts["staging"].num_bytes
    if 3 * 4 * config.num_experts > staging_bytes:
        raise ValueError(
            f"num_experts={config.num_experts} is too large: counting needs 12 bytes of shared "
            "memory per expert, "
            f"{staging_bytes} are free before the roles start"
        )
    registers = kernel.frontend_registers + kernel.num_math_warpgroups * kernel.math_registers
    if registers > target.registers:
        raise ValueError(
            f"frontend_registers={kernel.frontend_registers} and "
            f"math_registers={kernel.math_registers} add up to "
            f"{registers} > {target.registers}: setmaxnreg would hang"
        )
    return budget
