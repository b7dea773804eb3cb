"""Shared-memory, barrier and register arithmetic of the megakernel, derived from the configurations
alone.

One function gives the shared-memory map in bytes; the kernel allocates at most its total, and
`check` refuses what does not fit, so a mistake fails the build with its numbers and not the launch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.config import KernelConfig, MoEConfig, supports
from workspace.wire import COUNT_RECORD_BYTES, scale_words

SHARED_MEMORY_BYTES = 232448  # of one CTA on sm_90
REGISTERS_PER_TRIPLE = (
    504  # 168 x 3: setmaxnreg values of three warpgroups may not add up to more, or the CTA hangs
)
WARP_ROWS = 16  # rows of a tile that one math warp owns
PASS_ROW_BYTES = 128  # of a row in one epilogue pass: 64 bf16
PASS_BYTES = WARP_ROWS * PASS_ROW_BYTES  # shared memory of a math warp's pass
QUEUE_SLOTS = 2  # tiles handed over: the one in work and the next
QUEUE_WORDS = 8  # int32 per handed-over tile
WARPGROUP_ROWS = 64  # rows of a tile that one math warpgroup computes
FLAG_WORDS = 4
# This CTA's: no wait failed; last to arrive; end reduce; number of local experts with rows.
FLAG_OK, FLAG_LAST, FLAG_STOP, FLAG_LIVE = 0, 1, 2, 3
ZERO_BYTES = 512  # zeros that dispatch copies to rows that pad a block, at most
WEIGHT_SF_BYTES = 16  # scales of a weight tile for one K block: one float32 per 64 of its columns
ALIGNMENT_SLACK = 1024  # between parts of shared memory, and for parts that a recipe leaves empty
NUM_PULL_BUFFERS = 2  # pieces of the dispatch warp: one loading, one being stored


@dataclass(frozen=True)
class Budget:
    """Bytes and arrival counts of one CTA."""

    a_stage_bytes: int
    b_stage_bytes: int
    sf_stage_bytes: int  # scales of the rows of A for one K block
    weight_sf_bytes: int  # scales of a tile's weights, in a slot of the tile queue
    staging_bytes: int
    piece_bytes: int
    pull_bytes: int
    pull_sf_bytes: int  # scales of the rows that are being pulled
    pull_count_bytes: int  # count records of all sources for the expert that is being pulled
    metadata_bytes: int  # padding metadata of the tiles in the queue: a word per row
    zero_bytes: int
    count_words: int
    num_barriers: int
    full_arrivals: int  # per stage: the token loader and the weight loader
    empty_arrivals: int  # per stage: every math warp
    queue_empty_arrivals: int  # per tile: the token loader, the report warp and every math warp
    total_bytes: int


def piece_bytes(row_bytes: int, limit: int) -> int:
    """Largest divisor of a token row that is a multiple of 16 bytes and at most `limit`."""
    return max(size for size in range(16, min(row_bytes, limit) + 1, 16) if row_bytes % size == 0)


def weight_sf_bytes(config: MoEConfig) -> int:
    """Block scales of one tile's weights over all of K; 0 for recipes without."""
    weights = config.recipe.weights
    columns = max(config.hidden_size, config.intermediate_size)
    return WEIGHT_SF_BYTES * weights.num_scales(columns) if weights.scales_along_k else 0


def budget_of(config: MoEConfig, kernel: KernelConfig) -> Budget:
    """The budget; see `check` for what must hold."""
    recipe = config.recipe
    row_bytes = recipe.tokens.num_bytes(config.hidden_size)
    a_stage = recipe.tokens.num_bytes(kernel.block_m * kernel.block_k)
    b_stage = recipe.weights.num_bytes(kernel.block_n * kernel.block_k)
    staging = kernel.num_math_warps * PASS_BYTES
    piece = piece_bytes(row_bytes, kernel.pull_chunk_bytes)
    pull = NUM_PULL_BUFFERS * piece
    sf_stage = 4 * kernel.block_m if recipe.stages_scales else 0
    weight_sf = weight_sf_bytes(config)
    pull_sf = 4 * scale_words(config.token_scales) * NUM_PULL_BUFFERS
    pull_counts = COUNT_RECORD_BYTES * config.num_ranks
    metadata = QUEUE_SLOTS * 4 * kernel.block_m
    zeros = piece_bytes(row_bytes, ZERO_BYTES)
    barriers = 2 * kernel.num_stages + 4 * QUEUE_SLOTS + NUM_PULL_BUFFERS
    barriers += kernel.num_math_warpgroups
    words = config.experts_per_rank + QUEUE_SLOTS * QUEUE_WORDS + FLAG_WORDS
    total = (
        kernel.num_stages * (a_stage + b_stage + sf_stage)
        + QUEUE_SLOTS * weight_sf
        + staging
        + pull
        + pull_sf
        + pull_counts
        + metadata
        + zeros
        + 8 * barriers
        + 4 * words
        + 2 * config.experts_per_rank
        + ALIGNMENT_SLACK
    )
    return Budget(
        a_stage_bytes=a_stage,
        b_stage_bytes=b_stage,
        sf_stage_bytes=sf_stage,
        weight_sf_bytes=weight_sf,
        staging_bytes=staging,
        piece_bytes=piece,
        pull_bytes=pull,
        pull_sf_bytes=pull_sf,
        pull_count_bytes=pull_counts,
        metadata_bytes=metadata,
        zero_bytes=zeros,
        count_words=config.experts_per_rank,
        num_barriers=barriers,
        full_arrivals=2,
        empty_arrivals=kernel.num_math_warps,
        queue_empty_arrivals=2 + kernel.num_math_warps,
        total_bytes=total,
    )


def check(config: MoEConfig, kernel: KernelConfig) -> Budget:
    """The budget, or ValueError naming the field that `supports` refuses or that does not fit."""
    supports(config, kernel)
    budget = budget_of(config, kernel)
    if budget.total_bytes > SHARED_MEMORY_BYTES:
        raise ValueError(
            f"num_stages={kernel.num_stages} with {config.experts_per_rank} experts per rank needs "
            f"{budget.total_bytes} bytes of shared memory; a CTA has {SHARED_MEMORY_BYTES}"
        )
    if 3 * 4 * config.num_experts > budget.staging_bytes:
        raise ValueError(
            f"num_experts={config.num_experts} is too large: counting needs 12 bytes of shared "
            "memory per expert, "
            f"{budget.staging_bytes} are free before the roles start"
        )
    registers = kernel.frontend_registers + kernel.num_math_warpgroups * kernel.math_registers
    if registers > REGISTERS_PER_TRIPLE:
        raise ValueError(
            f"frontend_registers={kernel.frontend_registers} and "
            f"math_registers={kernel.math_registers} add up to "
            f"{registers} > {REGISTERS_PER_TRIPLE}: setmaxnreg would hang"
        )
    return budget
