"""The integer logic of the kernel, written once: which tile next, where a token goes, how many
arrivals a block needs.

Every function here is plain Python to the tests, and device code to the kernel (see `dsl`).
`counts` is anything indexable by an integer: a list here, a pointer into shared or global memory
there. Integers only; no division of negative numbers.

The task stream. Received tokens of a rank lie in its *pool*, grouped by local expert, each expert
padded to whole *pool blocks* of `block_m` rows. A *unit* is up to `group` consecutive blocks of one
expert. FC1 units are emitted in pool order; FC2 of a unit follows as soon as more than `lag` FC1
tiles are outstanding, or when the ring of pool blocks would overflow. Inside a unit tiles run
block-fastest, so that neighbouring CTAs share a weight tile. Hence every FC2 tile follows its FC1
tiles, and FC1 of block b follows FC2 of block b - ring: no cycle of waits.
"""

from __future__ import annotations

from typing import NamedTuple

from megamoe import dsl

PHASE_DONE = 0
PHASE_FC1 = 1
PHASE_FC2 = 2


class Walk(NamedTuple):
    """Position in the task stream: the current segment (all tiles of one unit in one phase) and
    both cursors.
    """

    phase: int  # PHASE_* of the segment
    begin: int  # ticket of its first tile
    size: int  # tiles in it
    expert: int  # local expert of its unit
    block: int  # first block of the unit within the expert
    pool: int  # the same block counted over the whole pool
    blocks: int  # blocks in the unit
    fc1_expert: int  # next FC1 unit
    fc1_block: int
    fc1_pool: int
    fc2_expert: int  # next FC2 unit
    fc2_block: int
    fc2_pool: int
    outstanding: int  # FC1 tiles emitted whose FC2 unit is not


class PullWalk(NamedTuple):
    """Position of a dispatch warp: the local expert of its row, that expert's first row and first
    pool block.
    """

    expert: int
    first_row: int
    first_block: int


class Tile(NamedTuple):
    """One output tile of a segment."""

    block: int  # block within the expert
    pool: int  # block over the whole pool
    column: int  # tile column


@dsl.jit
def ceil_div(a, b):
    return (a + b - 1) // b


@dsl.jit
def rows_in_block(count, block, block_m):
    """Real rows of block `block` of an expert that received `count` rows."""
    rows = count - block * block_m
    if rows > block_m:
        rows = block_m
    return rows


@dsl.jit
def padding_rows(count, granule):
    """Rows between `count` and the next multiple of `granule`."""
    return (count + granule - 1) // granule * granule - count


@dsl.jit
def skip_empty(counts, num_experts, expert):
    """First expert >= `expert` with rows, or `num_experts`."""
    running = 1
    while running == 1:
        # Not one condition with `and`: the traced form reads counts[expert] in any case.
        if expert >= num_experts:
            running = 0
        elif counts[expert] > 0:
            running = 0
        else:
            expert = expert + 1
    return expert


@dsl.jit
def unit_blocks(counts, num_experts, expert, block, block_m, group):
    """Blocks of the unit that starts at (`expert`, `block`); 0 past the last expert."""
    size = 0
    if expert < num_experts:
        size = ceil_div(counts[expert], block_m) - block
        if size > group:
            size = group
    return size


@dsl.jit
def next_unit(counts, num_experts, expert, block, block_m, group):
    """(expert, block) of the unit after the one at (`expert`, `block`)."""
    after = block + group
    if after * block_m >= counts[expert]:
        expert = skip_empty(counts, num_experts, expert + 1)
        after = 0
    return expert, after


@dsl.jit
def start_walk(counts, num_experts):
    """The walk before the first segment; call `advance_walk` once to enter it."""
    first = skip_empty(counts, num_experts, 0)
    return Walk(PHASE_DONE, 0, 0, 0, 0, 0, 0, first, 0, 0, first, 0, 0, 0)


@dsl.jit
def advance_walk(walk, counts, num_experts, block_m, group, fc1_columns, fc2_columns, lag, ring):
    """The next segment of the stream; its phase is PHASE_DONE once both cursors are past the last
    expert.
    """
    phase = PHASE_DONE
    begin = walk.begin + walk.size
    size = 0
    expert = walk.expert
    block = walk.block
    pool = walk.pool
    blocks = 0
    fc1_expert = walk.fc1_expert
    fc1_block = walk.fc1_block
    fc1_pool = walk.fc1_pool
    fc2_expert = walk.fc2_expert
    fc2_block = walk.fc2_block
    fc2_pool = walk.fc2_pool
    outstanding = walk.outstanding

    fc1_size = unit_blocks(counts, num_experts, fc1_expert, fc1_block, block_m, group)
    fits = fc1_pool + fc1_size - fc2_pool <= ring
    if fc1_size > 0 and outstanding <= lag and fits:
        phase = PHASE_FC1
        expert = fc1_expert
        block = fc1_block
        pool = fc1_pool
        blocks = fc1_size
        size = fc1_size * fc1_columns
        outstanding = outstanding + size
        fc1_pool = fc1_pool + fc1_size
        fc1_expert, fc1_block = next_unit(
            counts, num_experts, fc1_expert, fc1_block, block_m, group
        )
    elif fc2_expert < num_experts:
        phase = PHASE_FC2
        expert = fc2_expert
        block = fc2_block
        pool = fc2_pool
        blocks = unit_blocks(counts, num_experts, fc2_expert, fc2_block, block_m, group)
        size = blocks * fc2_columns
        outstanding = outstanding - blocks * fc1_columns
        fc2_pool = fc2_pool + blocks
        fc2_expert, fc2_block = next_unit(
            counts, num_experts, fc2_expert, fc2_block, block_m, group
        )
    return Walk(
        phase, begin, size, expert, block, pool, blocks,
        fc1_expert, fc1_block, fc1_pool, fc2_expert, fc2_block, fc2_pool, outstanding,
    )  # fmt: skip


@dsl.jit
def seek_walk(
    walk, ticket, counts, num_experts, block_m, group, fc1_columns, fc2_columns, lag, ring
):
    """The segment that holds `ticket`, from any earlier position; PHASE_DONE past the end of the
    stream.
    """
    running = 1
    while running == 1:
        if ticket < walk.begin + walk.size:
            running = 0
        else:
            walk = advance_walk(
                walk, counts, num_experts, block_m, group, fc1_columns, fc2_columns, lag, ring
            )
            if walk.phase == PHASE_DONE:
                running = 0
    return walk


@dsl.jit
def tile_of(walk, ticket):
    """The tile of `ticket` in the current segment: blocks fastest, then columns."""
    index = ticket - walk.begin
    member = index % walk.blocks
    return Tile(walk.block + member, walk.pool + member, index // walk.blocks)


@dsl.jit
def seek_pull(position, row, counts, num_experts, block_m):
    """Move to the expert that owns dense row `row` (padding not counted); `expert == num_experts`
    past the last row.
    """
    expert = position.expert
    first_row = position.first_row
    first_block = position.first_block
    running = 1
    while running == 1:
        if expert >= num_experts:
            running = 0
        elif row < first_row + counts[expert]:
            running = 0
        else:
            first_row = first_row + counts[expert]
            first_block = first_block + ceil_div(counts[expert], block_m)
            expert = expert + 1
    return PullWalk(expert, first_row, first_block)


@dsl.jit
def pick_source(counts, base, stride, num_ranks, index):
    """Source of row `index` of an expert: (rank, position among that rank's rows), round-robin over
    ranks with rows left.

    Row counts of the ranks are ``counts[base + rank * stride]``. Round-robin keeps every link busy
    at any moment; whole rounds are peeled off at once, as DeepGEMM's mega-MoE does, so the cost is
    O(W^2) and not O(index).
    """
    taken = 0  # rows already given out by every rank that still has some
    source = 0
    left = index
    running = 1
    while running == 1:
        active = 0
        shortest = 0
        for rank in range(num_ranks):
            remaining = counts[base + rank * stride] - taken
            if remaining > 0:
                active = active + 1
                if shortest == 0 or remaining < shortest:
                    shortest = remaining
        if left < shortest * active or active == 0:
            seen = 0
            turn = 0
            if active > 0:
                turn = left % active
                taken = taken + left // active
            for rank in range(num_ranks):
                if counts[base + rank * stride] - taken > 0:
                    if seen == turn:
                        source = rank
                    seen = seen + 1
            running = 0
        else:
            left = left - shortest * active
            taken = taken + shortest
    return source, taken


class Share(NamedTuple):
    """Part of a math warpgroup in a tile."""

    active: int  # 1 if it computes
    half: int  # number of the rows that it computes, in units of a warpgroup's
    arrivals: int  # how many warps each of its warps arrives for


@dsl.jit
def share_of(rows, warpgroup, turn, granule, num_warpgroups):
    """Share of `warpgroup` in a tile with `rows` real rows.

    Rows that one warpgroup holds are computed by one alone, in turn: while it stores its results,
    the next one multiplies the next tile, so that loads of weights never pause for an epilogue
    (the ping-pong schedule of CUTLASS). `turn`: number of such tiles before this one.
    """
    active = 1
    half = warpgroup
    arrivals = 1
    if rows <= granule:
        half = 0
        arrivals = arrivals * num_warpgroups
        if turn % num_warpgroups != warpgroup:
            active = 0
    return Share(active, half, arrivals)


@dsl.jit
def turn_barrier(turn, num_warpgroups):
    """(number, parity) of the mbarrier that completes when the tile of `turn` has been multiplied.

    One for each warpgroup that computes: a warp that waits on it has seen all its earlier phases.
    """
    return turn % num_warpgroups, turn // num_warpgroups % 2


@dsl.jit
def ring_row(pool_block, ring, block_m):
    """First row of a pool block in the ring buffers."""
    return (pool_block % ring) * block_m
