"""The parallel roles of a CTA: dispatch, load_weights (tile scheduler), load_tokens and math.

Owns the middle of the protocol, between the dispatch barrier and the combine barrier. Tile order
and dispatch arithmetic come from `megamoe.schedule`, numbers from `megamoe.reference`; what is here
is who waits for what.
"""

from __future__ import annotations

import numpy as np
import torch

from megamoe import reference
from megamoe.budget import NUM_PULL_BUFFERS, QUEUE_SLOTS, WARP_ROWS, WARPGROUP_ROWS
from megamoe.emulator.combine import reduce_early
from megamoe.emulator.errors import PaddingNotInert
from megamoe.emulator.memory import Agent
from megamoe.emulator.prologue import Cta
from megamoe.emulator.runtime import Role
from megamoe.emulator.state import (
    NUM_TILE_STAGES,
    OPERANDS,
    POISON,
    RankState,
    Tile,
    Warp,
    as_bits,
    as_float,
)
from megamoe.precision import WHOLE_ROW
from megamoe.schedule import (
    PHASE_DONE,
    PHASE_FC1,
    PullWalk,
    advance_walk,
    padding_rows,
    pick_source,
    ring_row,
    rows_in_block,
    seek_pull,
    seek_walk,
    share_of,
    start_walk,
    tile_of,
)  # fmt: skip
from megamoe.shape import Shape
from workspace.wire import PADDING, encode_source, source_rank, source_slot


class Pull:
    """The pipeline of one dispatch warp: a piece is loading while the one before it is stored.

    With the last piece of a row come its scales, which all lanes store.
    """

    def __init__(self, cta: Cta, warp: Warp):
        self.cta, self.warp, self.agent = cta, warp, warp.leader
        self.poison = POISON[cta.config.recipe.token]
        self.buffers = [[None] for _ in range(NUM_PULL_BUFFERS)]
        self.number = 0  # pieces loaded so far
        # (buffer, what lands in it, its scales, ring row, columns, block)
        self.loading: tuple | None = None
        self.unpublished: int | None = None  # pool block of a row that is stored, not published

    def finish_store(self, label: str) -> Role:
        """Wait in full for the stores; publish the row whose last piece they held."""
        self.cta.runtime.wait_bulk(self.agent, 0, label)
        block, self.unpublished = self.unpublished, None
        if block is not None:
            word = self.cta.state.word("l1_arrival_count", block)
            yield from self.cta.runtime.add(self.agent, word, "dispatch.arrive", release=True)

    def load(self, source, token: int, row: int, columns: tuple[int, int], block: int | None):
        """Start the load of a piece; `block` is its pool block if it completes a row."""
        buffer = self.buffers[self.number % NUM_PULL_BUFFERS]
        self.number += 1
        buffer[0] = self.poison
        landed = source.data["input_token_buffer"].read(self.agent, token, columns, True)
        recipe, scales = self.cta.config.recipe, None
        num_bytes = (columns[1] - columns[0]) * recipe.token_bytes
        if recipe.scaled and block is not None:
            scales = source.data["input_sf_buffer"].read(self.agent, token, asynchronous=True)[0]
            num_bytes += self.cta.shape.token_scale_bytes
        self.cta.traffic.count(source.rank, self.cta.rank, num_bytes)
        return buffer, landed, scales, row, columns, block

    def store(self, piece: tuple) -> Role:
        """Wait for the load of a piece and start its store; returns the block it completes."""
        buffer, landed, scales, row, columns, block = piece
        yield
        if self.cta.runtime.live("dispatch.load_wait"):
            buffer[0] = landed
        self.cta.state.data["l1_token_buffer"].bulk_write(self.agent, row, buffer, columns)
        if scales is not None:
            yield
            self.store_scales(scales, row)
        self.cta.runtime.hand_over(list(self.warp), "dispatch.warp_sync")
        return block

    def store_scales(self, scales, row: int) -> None:
        """Scatter the scales of a row: scale k goes to [ring block][k][row of the block]."""
        runtime, num_scales = self.cta.runtime, self.cta.config.token_scales
        values = scales[:num_scales, None]
        if not runtime.live("dispatch.scale_wait"):
            values = POISON["float32"]
        ring_block, in_block = divmod(row, self.cta.kernel.block_m)
        rows = slice(ring_block * num_scales, (ring_block + 1) * num_scales)
        columns = (in_block, in_block + 1)
        self.cta.state.data["l1_sf_buffer"].write(self.warp.lanes, rows, values, columns)
        runtime.proxy_fence(self.warp.lanes, "dispatch.scale_proxy")

    def zero(self, row: int) -> None:
        """Start to store zeros to a row that pads its warpgroup."""
        columns = (0, self.cta.config.hidden_size)
        self.cta.state.data["l1_token_buffer"].bulk_write(self.agent, row, [0], columns)

    def drain(self, label: str) -> Role:
        """Store and publish everything that is under way."""
        yield from self.finish_store(label)
        if self.loading:
            piece, self.loading = self.loading, None
            self.unpublished = yield from self.store(piece)
            yield from self.finish_store(label)

    def row(self, source, token: int, row: int, block: int) -> Role:
        """Pull one row; it is published during the next one."""
        hidden, width = self.cta.config.hidden_size, self.cta.state.pull_columns
        for begin in range(0, hidden, width):
            yield from self.finish_store("dispatch.group_wait")
            end = begin + width
            completes = block if end == hidden else None
            before, self.loading = (
                self.loading,
                self.load(source, token, row, (begin, end), completes),
            )
            if before:
                self.unpublished = yield from self.store(before)


def dispatch(cta: Cta) -> Role:
    """Pull rows, then reduce tokens that are in."""
    yield from pull_rows(cta)
    yield from reduce_early(cta, 0)


def pull_rows(cta: Cta) -> Role:
    """Pull the rows of the local experts, round-robin over CTAs, in dense row order."""
    runtime, state, config = cta.runtime, cta.state, cta.config
    (agent, lanes), shape = cta.agents.dispatch, cta.shape
    experts, slots, num_ranks = config.experts_per_rank, config.max_slots_per_rank, config.num_ranks
    counts = cta.counts(agent)
    sources = np.arange(num_ranks) * experts
    position = PullWalk(0, 0, 0)
    pull = Pull(cta, cta.agents.dispatch)
    runtime.proxy_fence(agent, "dispatch.input_proxy")
    for row in range(cta.index, sum(counts), cta.num_ctas):
        position = seek_pull(position, row, counts, experts, shape.kernel.block_m)
        expert, index = position.expert, row - position.first_row
        block = position.first_block + index // shape.kernel.block_m
        # Not before the first row: a warp without rows publishes nothing, so nobody waits for it.
        received = state.data["expert_recv_count"].read(agent, sources + expert).ravel().tolist()
        rank, turn = pick_source(received, 0, 2, num_ranks, index)
        record = rank * slots + received[2 * rank + 1] + turn
        slot, weight = state.data["routed_record"].read(agent, record)[0].tolist()
        if block >= shape.ring:
            freed = state.word("fc2_done_counter", block - shape.ring)
            yield
            if freed.value < shape.slot_free and runtime.live("dispatch.ring_drain"):
                yield from pull.drain("dispatch.drain_wait")
            yield from runtime.wait(
                agent, freed, shape.slot_free, "dispatch.ring_wait", also=(lanes,)
            )
        ring_index = (
            ring_row(block, shape.ring, shape.kernel.block_m) + index % shape.kernel.block_m
        )
        yield
        state.data["l1_topk_weights_buffer"].write(agent, ring_index, weight)
        code = encode_source(rank, slot, slots)
        state.data["token_src_metadata"].write(agent, ring_index, code)
        if index == counts[expert] - 1 and index >= shape.kernel.block_m:
            for padding in range(padding_rows(index + 1, WARPGROUP_ROWS)):
                pull.zero(ring_index + 1 + padding)
        yield from pull.row(cta.ranks[rank], slot // config.top_k, ring_index, block)
    yield from pull.drain("dispatch.last_wait")


def load_weights(cta: Cta) -> Role:
    """Take tickets in stream order, hand their tiles to the other roles of the CTA and load their
    weights.
    """
    runtime, shared, agent = cta.runtime, cta.shared, cta.agents.load_weights
    shape, counts = cta.shape, cta.counts(agent)
    stream = shape.stream(cta.num_ctas)
    walk = advance_walk(start_walk(counts, shape.experts), counts, *stream)
    number = 0
    while True:
        tickets = cta.state.word("load_balance_counter")
        ticket = yield from runtime.add(agent, tickets, "load_weights.ticket")
        if walk.phase != PHASE_DONE:
            walk = seek_walk(walk, ticket, counts, *stream)
        words = [walk.phase, 0, 0, 0, 0, 0]
        if walk.phase != PHASE_DONE:
            tile = tile_of(walk, ticket)
            rows = rows_in_block(counts[walk.expert], tile.block, shape.kernel.block_m)
            words = [walk.phase, walk.expert, tile.block, tile.pool, tile.column, rows]
        slot, turn = number % QUEUE_SLOTS, number // QUEUE_SLOTS
        free = turn * cta.budget.queue_empty_arrivals
        yield from runtime.wait(agent, shared.queue_empty[slot], free, "load_weights.queue_empty")
        shared.queue.write(agent, slot, [words])
        yield from runtime.add(
            agent, shared.queue_full[slot], "load_weights.queue_full", release=True
        )
        if words[0] == PHASE_DONE:
            return
        yield from await_stage(cta, agent, number, "load_weights")
        yield from fill_stage(cta, agent, number, "load_weights")
        number += 1


def await_stage(cta: Cta, agent: Agent, number: int, role: str) -> Role:
    """Wait until the stage of tile `number` is free."""
    stage, turn = number % NUM_TILE_STAGES, number // NUM_TILE_STAGES
    empty, free = cta.shared.stage_empty[stage], turn * cta.budget.empty_arrivals
    yield from cta.runtime.wait(agent, empty, free, f"{role}.stage_empty")


def fill_stage(cta: Cta, agent: Agent, number: int, role: str) -> Role:
    """Put the operand of a loader into the stage of tile `number`."""
    stage = number % NUM_TILE_STAGES
    cta.shared.stage.write(agent, stage, number, OPERANDS[role])
    full = cta.shared.stage_full[stage]
    yield from cta.runtime.add(agent, full, f"{role}.stage_full", release=True)


def read_tile(cta: Cta, agent: Agent, number: int, role: str, also: tuple[Agent, ...] = ()) -> Role:
    """Next tile of the CTA: phase, expert, block in expert, pool block, column, rows."""
    slot, turn = number % QUEUE_SLOTS, number // QUEUE_SLOTS
    full = cta.shared.queue_full[slot]
    yield from cta.runtime.wait(agent, full, turn + 1, f"{role}.queue_full", also=also)
    return cta.shared.queue.read(agent, slot)[0].tolist()


def release_tile(cta: Cta, agent: Agent, number: int, role: str) -> Role:
    empty = cta.shared.queue_empty[number % QUEUE_SLOTS]
    yield from cta.runtime.add(agent, empty, f"{role}.queue_empty", release=True)


def load_tokens(cta: Cta) -> Role:
    """Wait until the tokens of a tile are there, put the padding metadata that its epilogue needs
    into its queue slot, and load its real rows into a stage.
    """
    runtime, state, shared, config = cta.runtime, cta.state, cta.shared, cta.config
    (agent, lanes), shape, dtype = cta.agents.load_tokens, cta.shape, config.recipe.token
    block_m = shape.kernel.block_m
    number = 0
    while True:
        tile = yield from read_tile(cta, agent, number, "load_tokens", also=(lanes,))
        phase, _, _, block, _, rows = tile
        yield from release_tile(cta, agent, number, "load_tokens")
        if phase == PHASE_DONE:
            return
        if phase == PHASE_FC1:
            label, ready, target = "load_tokens.fc1", "l1_arrival_count", rows
            words = "l1_topk_weights_buffer"
            region, scale_region = "l1_token_buffer", "l1_sf_buffer"
            # A scale of the whole row is for the epilogue.
            num_scales = config.token_scales if config.recipe.token_block > 0 else 0
        else:
            label, ready, target = "load_tokens.fc2", "fc1_done_counter", shape.fc1_done
            words = "token_src_metadata"
            region, scale_region, num_scales = "fc1_output", "fc1_output_sf", config.hidden_scales
        arrived = state.word(ready, block)
        yield from runtime.wait(agent, arrived, target, f"{label}_wait", also=(lanes,))
        first, scales = ring_row(block, shape.ring, block_m), None
        metadata = state.data[words].read(lanes, slice(first, first + block_m))
        yield
        slot = number % QUEUE_SLOTS
        shared.metadata.write(lanes, slot, metadata.T)
        full = shared.metadata_full[slot]
        yield from runtime.add(lanes, full, "load_tokens.metadata_full", release=True)
        runtime.proxy_fence(agent, f"{label}_proxy")
        yield from await_stage(cta, agent, number, "load_tokens")
        bits = state.data[region].read(agent, slice(first, first + rows), asynchronous=True)
        if num_scales:
            first = ring_row(block, shape.ring, num_scales)
            which = slice(first, first + num_scales)
            found = state.data[scale_region].read(agent, which, (0, rows), asynchronous=True)
            scales = as_float(found, "float32").T
        shared.tiles[number % NUM_TILE_STAGES] = Tile(as_float(bits, dtype), scales)
        yield from fill_stage(cta, agent, number, "load_tokens")
        number += 1


def _tile_weights(shape: Shape, state: RankState, words: list[int]) -> tuple:
    """(weights in float32, their scales or None) of a tile: for FC1 the gate rows and then the up
    rows of as many columns, for FC2 the rows of the columns.
    """
    phase, expert, _, _, column, _ = words
    weights = state.experts[expert]
    if phase == PHASE_FC1:
        width, groups = shape.kernel.block_n // 2, 2
        matrix, scales = weights.w13, weights.w13_scale
    else:
        width, groups = shape.kernel.block_n, 1
        matrix, scales = weights.w2, weights.w2_scale
    columns = slice(column * width, (column + 1) * width)

    def pick(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(groups, -1, rows.shape[1])[:, columns].float().flatten(0, 1)

    return pick(matrix), None if scales is None else pick(scales)


def math(cta: Cta, warp: int) -> Role:
    """One math warp: its rows of every tile of the CTA that its warpgroup has a share in."""
    runtime, shape = cta.runtime, cta.shape
    leader, lanes = cta.agents.math[warp]
    warpgroup, rank = divmod(warp, WARPGROUP_ROWS // WARP_ROWS)
    number = turn = 0
    while True:
        words = yield from read_tile(cta, leader, number, "math", also=(lanes,))
        phase, *_, rows = words
        if phase == PHASE_DONE:
            return
        share = share_of(rows, warpgroup, turn, WARPGROUP_ROWS, shape.kernel.num_math_warpgroups)
        turn += share.arrivals > 1
        kept = runtime.live("math.keep_slot")
        if not kept:
            yield from release_tile(cta, leader, number, "math")
        if share.active:
            place = share.half * WARPGROUP_ROWS + rank * WARP_ROWS
            yield from _compute(cta, warp, number, words, place, share.arrivals)
        if kept:
            yield from release_tile(cta, leader, number, "math")
        number += 1


def _compute(cta: Cta, warp: int, number: int, words: list[int], place: int, arrivals: int) -> Role:
    """The product and the epilogue of the rows of tile `number` from `place` on."""
    runtime, shared, state, shape = cta.runtime, cta.shared, cta.state, cta.shape
    leader, lanes = cta.agents.math[warp]
    phase, _, _, block, column, rows = words
    stage, pass_ = number % NUM_TILE_STAGES, number // NUM_TILE_STAGES
    slot, turn = number % QUEUE_SLOTS, number // QUEUE_SLOTS
    full, filled = shared.stage_full[stage], (pass_ + 1) * cta.budget.full_arrivals
    yield from runtime.wait(leader, full, filled, "math.stage_full", also=(lanes,))
    shared.stage.read(leader, stage)
    tile = shared.tiles[stage]
    own = slice(place, place + WARP_ROWS)
    real = max(0, min(rows - own.start, WARP_ROWS))
    if real and tile.product is None:
        tile.multiply(*_tile_weights(shape, state, words))
    product = tile.product[own] if real else None
    empty = shared.stage_empty[stage]
    yield from runtime.add(leader, empty, "math.stage_empty", arrivals, release=True)
    full = shared.metadata_full[slot]
    yield from runtime.wait(leader, full, turn + 1, "math.metadata_full", also=(lanes,))
    metadata = shared.metadata.read(lanes, slot, (own.start, own.stop))[0]
    first = ring_row(block, shape.ring, shape.kernel.block_m) + own.start
    epilogue = _fc1_epilogue if phase == PHASE_FC1 else _fc2_epilogue
    yield from epilogue(cta, shape, lanes, product, metadata, first, real, block, column)
    runtime.hand_over([leader, lanes], "math.warp_sync")
    stored = shared.stored[slot]
    yield from runtime.add(leader, stored, "math.stored", arrivals, release=True)


def _fc1_epilogue(
    cta: Cta, shape: Shape, lanes: Agent, product, metadata, first: int, real: int, block: int,
    column: int,
) -> Role:  # fmt: skip
    """Scales of whole rows, SwiGLU, router weight, one rounding, store."""
    state, recipe = cta.state, cta.config.recipe
    in_block = first % shape.kernel.block_m
    weights = as_float(metadata, "float32")
    if weights[real:].any():
        row = first + real + int(weights[real:].nonzero()[0])
        raise PaddingNotInert(
            f"{lanes}: l1_topk_weights_buffer[{row}] is {weights[row - first]} "
            f"in a row that pads pool block {block}"
        )
    if real:
        if recipe.token_block == WHOLE_ROW:
            ring_block, place = block % shape.ring, (in_block, in_block + real)
            found = state.data["l1_sf_buffer"].read(lanes, ring_block, place)
            product = product * as_float(found, "float32").T
        hidden = reference.swiglu(product, state.launch.clamp) * weights[:real, None]
        values, scales = reference.stored(hidden, recipe.token, recipe.hidden_block)
        width = shape.kernel.block_n // 2
        yield
        columns, rows = (column * width, (column + 1) * width), slice(first, first + real)
        state.data["fc1_output"].write(lanes, rows, as_bits(values), columns)
        if scales is not None:
            # One scale per row and tile, because a tile has as many columns as share one.
            target = ring_row(block, shape.ring, cta.config.hidden_scales) + column
            columns = (in_block, in_block + real)
            yield
            state.data["fc1_output_sf"].write(lanes, target, as_bits(scales[:, 0]), columns)


def _fc2_epilogue(
    cta: Cta, shape: Shape, lanes: Agent, product, codes, first: int, real: int, block: int,
    column: int,
) -> Role:  # fmt: skip
    """Store real rows to their sources."""
    config = cta.config
    wrong = np.flatnonzero((codes != PADDING) != (np.arange(WARP_ROWS) < real))
    if len(wrong):
        row = int(wrong[0])
        raise PaddingNotInert(
            f"{lanes}: token_src_metadata[{first + row}] is {codes[row]} in a "
            f"{'real row' if row < real else 'row that pads'} of pool block {block}"
        )
    if real:
        values = as_bits(product.to(getattr(torch, config.recipe.output)))
        ranks = source_rank(codes[:real].astype(np.int64), config.max_slots_per_rank)
        slots = source_slot(codes[:real].astype(np.int64), config.max_slots_per_rank)
        begin, width = column * shape.kernel.block_n, values.shape[1]
        columns = (begin, begin + width)
        for rank in np.unique(ranks).tolist():
            mine = np.flatnonzero(ranks == rank)
            yield
            cta.ranks[rank].data["combine_output"].write(lanes, slots[mine], values[mine], columns)
            cta.traffic.count(cta.rank, rank, len(mine) * width * config.recipe.output_bytes)
