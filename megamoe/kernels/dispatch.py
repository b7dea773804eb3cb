"""Dispatch: count and publish what this rank sends, then pull what it receives.

`count` runs on the whole CTA before the roles split: histogram of topk_idx, slots by atomics,
routed records into the owners' tables, count records, and the barrier after which every rank may
pull. `pull` is the dispatch role, one warp of a CTA: lane 0 moves token rows peer -> shared -> pool
by bulk copies and publishes each row, all lanes store the rows' scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Int16, Int32, Int64, const_expr, range_constexpr

from megamoe import faults, schedule, wire
from megamoe.budget import FLAG_LIVE, FLAG_OK, NUM_PULL_BUFFERS
from megamoe.config import GEMMS
from megamoe.kernels import sync
from megamoe.kernels.launch import Launch, address, peer_address
from megamoe.kernels.ptx import (
    as_word,
    bulk_load,
    bulk_store,
    global_ptr,
    load_global_v2,
    load_shared,
    store_global,
    store_global_v2,
)
from megamoe.kernels.quantize import quantize_input
from megamoe.ordering import (
    COUNTED,
    DISPATCHED,
    FC2_DONE,
    INPUT_STAGED,
    SCALES_PULLED,
    SLOT_READ,
    TOKENS_IN,
    WHOLE_CTA,
)

arch = cute.arch

ROLE = faults.ROLE_COUNT


class PullBuffers(NamedTuple):
    """Shared memory of a dispatch warp: NUM_PULL_BUFFERS rows or pieces of them, as many rows of
    scales and barriers, the count records of one expert; and sizes in bytes.
    """

    rows: cute.Pointer
    scales: cute.Pointer
    counts: Any  # a pointer to words
    barriers: cute.Pointer
    piece_bytes: int
    zero_bytes: int


@cute.jit
def read_expert(launch: Launch, entry, report: Constexpr) -> Int32:
    """Expert of routed entry `entry` = token * K + k, or -1 if it is masked or its id invalid."""
    experts = launch.shape.config.num_experts
    expert = Int32(0)
    high = Int32(0)  # the other half of an invalid int64
    valid = Int32(1)
    if launch.wide_idx == 1:
        wide = global_ptr(launch.topk_idx + Int64(entry) * 8, Int64, 8)[0]
        expert = Int32(wide)
        high = Int32(wide >> 32)
        if wide < -1 or wide >= experts:
            valid = Int32(0)
    else:
        expert = global_ptr(launch.topk_idx + Int64(entry) * 4)[0]
        high = expert >> 31
        if expert < -1 or expert >= experts:
            valid = Int32(0)
    if valid == 0:
        if const_expr(report):
            sync.report_expert(launch, ROLE, entry, expert, high)
        expert = Int32(-1)
    return expert


@cute.jit
def segment_offsets(launch: Launch, totals, offsets):
    """One warp: exclusive prefix of `totals` (int32 in global memory) over all experts, into shared
    `offsets`.
    """
    experts = launch.shape.config.num_experts
    lane = launch.thread % 32
    carry = Int32(0)
    for start in range(0, experts, 32):
        expert = start + lane
        own = Int32(0)
        if expert < experts:
            own = arch.load(totals + expert, Int32, sem="relaxed", scope="gpu")
        inclusive = own
        for step in range_constexpr(5):
            below = arch.shuffle_sync_up(inclusive, offset=1 << step, mask_and_clamp=0)
            if lane >= (1 << step):
                inclusive += below
        if expert < experts:
            offsets[expert] = carry + inclusive - own
        carry += arch.shuffle_sync(inclusive, 31)


@cute.jit
def count(launch: Launch, scratch, received, expert_ids, flag_smem, epoch):
    """Whole CTA: publish what this rank sends, pass the barrier, and leave the local experts that
    have rows, shared ones first: their number in `flag_smem[FLAG_LIVE]`, their rows in `received`,
    their ids in `expert_ids`.

    `scratch` is shared memory for 3 * E words. If the barrier fails, if a launch before this one
    has failed and nobody has recovered, or if this rank has refused its input, there are none, so
    that every role of the CTA agrees that there is nothing to do.
    """
    shape = launch.shape
    experts, ranks = shape.config.num_experts, shape.config.num_ranks
    routed, shared = shape.config.experts_per_rank, shape.config.num_shared_experts
    threads = shape.kernel.num_threads
    histogram = scratch
    entries = launch.num_tokens * shape.config.top_k
    first = launch.cta * threads + launch.thread
    stride = launch.num_ctas * threads

    aborted = Int32(0)  # on its way during what follows
    if launch.thread == 0:
        aborted = sync.abort_word(launch, sync.ABORT_WORD)
    if const_expr(shape.config.recipe.tokens.has_scales):
        quantize_input(launch)
    for expert in range(launch.thread, experts, threads):
        histogram[expert] = Int32(0)
    arch.sync_threads()
    for entry in range(first, entries, stride):
        expert = read_expert(launch, entry, True)
        if expert >= 0:
            arch.atomic_add(histogram + expert, Int32(1))
    if aborted != 0:
        flag_smem[FLAG_OK] = Int32(0)
        sync.report_unrecovered(launch)
    elif launch.num_tokens < 0 and launch.thread == 0:
        flag_smem[FLAG_OK] = Int32(0)
        sync.refuse(launch)
    arch.sync_threads()
    if flag_smem[FLAG_OK] == 1:
        publish(launch, scratch, flag_smem)

    sync.nvlink_barrier(launch, flag_smem, launch.thread, DISPATCHED, epoch + 1, ROLE, WHOLE_CTA)
    counts = global_ptr(address(launch, "expert_recv_count"))
    layer = launch.layer  # of the rank that has the number of this thread; read beside the counts
    if launch.cta == 0 and launch.thread < ranks:
        if flag_smem[FLAG_OK] == 1:
            layer = global_ptr(address(launch, "launched_layer", launch.thread))[0]
    if const_expr(shared > 0):
        if launch.thread < shared:
            received[launch.thread] = launch.num_tokens * flag_smem[FLAG_OK]
    for expert in range(launch.thread, routed, threads):
        total = Int32(0)
        if flag_smem[FLAG_OK] == 1:
            for rank in range(ranks):
                total += counts[(rank * routed + expert) * 2]
        received[shared + expert] = total
        if launch.cta == 0 and launch.expert_counts != 0:
            statistics = global_ptr(launch.expert_counts + Int64(expert) * 4)
            arch.red(statistics, total, op="add", dtype="s32", sem="relaxed", scope="gpu")
    sync.check_layer(launch, layer)
    arch.sync_threads()
    if launch.thread < 32:
        leave_out_empty(launch, received, expert_ids, flag_smem)
    arch.sync_threads()


@cute.jit
def publish(launch: Launch, scratch, flag_smem):
    """Whole CTA, with the histogram of its entries in `scratch`: reserve room in every expert's
    rows, then write the routed records and, on the first CTA, the count records and the number of
    the layer.
    """
    shape = launch.shape
    config = shape.config
    experts, per_rank, top_k = config.num_experts, config.experts_per_rank, config.top_k
    histogram, base, offsets = scratch, scratch + experts, scratch + 2 * experts
    totals = global_ptr(address(launch, "expert_send_count"))
    threads = shape.kernel.num_threads
    first = launch.cta * threads + launch.thread
    stride = launch.num_ctas * threads

    for expert in range(launch.thread, experts, threads):
        mine = histogram[expert]
        reserved = Int32(0)
        if mine > 0:
            reserved = arch.atomic_add(totals + expert, mine, sem="relaxed", scope="gpu")
        base[expert] = reserved
        histogram[expert] = Int32(0)

    sync.grid_sync(launch, flag_smem, COUNTED, ROLE)
    if launch.thread == 0:
        sync.mark(launch, "counted")
    if launch.thread < 32:
        segment_offsets(launch, totals, offsets)
    arch.sync_threads()

    for token in range(first, launch.num_tokens, stride):
        live = Int32(0)
        for k in range(top_k):
            if read_expert(launch, token * top_k + k, False) >= 0:
                live += 1
        awaited = global_ptr(address(launch, "combine_arrival_count", token))
        arch.store(awaited, -live - config.num_shared_experts, sem="relaxed", scope="gpu")
    for entry in range(first, launch.num_tokens * top_k, stride):
        expert = read_expert(launch, entry, False)
        if expert >= 0:
            owner = expert // per_rank
            running = arch.atomic_add(histogram + expert, Int32(1))
            position = offsets[expert] - offsets[owner * per_rank] + base[expert] + running
            weight = global_ptr(launch.topk_weights + Int64(entry) * 4)[0]
            record = (
                peer_address(launch, "routed_record", owner, launch.rank)
                + Int64(position) * wire.ROUTED_RECORD_BYTES
            )
            slot = entry
            if const_expr(config.num_shared_experts > 0):  # else all slots are columns of topk_idx
                slot = entry + entry // top_k * config.num_shared_experts
            store_global_v2(record, slot, weight)
    if launch.cta == 0:
        for expert in range(launch.thread, experts, threads):
            owner = expert // per_rank
            total = arch.load(totals + expert, Int32, sem="relaxed", scope="gpu")
            record = peer_address(launch, "expert_recv_count", owner, launch.rank)
            record += Int64(expert % per_rank) * wire.COUNT_RECORD_BYTES
            store_global_v2(record, total, offsets[expert] - offsets[owner * per_rank])
        if launch.thread < shape.config.num_ranks:
            owner = peer_address(launch, "launched_layer", launch.thread, launch.rank)
            store_global(owner, launch.layer)


@cute.jit
def leave_out_empty(launch: Launch, received, expert_ids, flag_smem):
    """One warp: move the counts of experts with rows to the front, in order, with their ids: with
    few tokens most experts have none, and every role would walk over them one by one.

    Shared experts, whose weights lie behind those of the routed ones, come first.
    """
    local, lane = launch.shape.local_experts, launch.thread
    shared = launch.shape.config.num_shared_experts
    found = Int32(0)
    for start in range(0, local, 32):
        expert = start + lane
        rows = Int32(0)
        if expert < local:
            rows = received[expert]
        filled = arch.vote_ballot_sync(rows > 0)
        arch.sync_warp()  # a vote orders no accesses: all have read before places are taken
        if rows > 0:
            index = found + arch.popc(filled & ((Int32(1) << lane) - 1))
            received[index] = rows
            number = expert
            if const_expr(shared > 0):
                number = (expert + local - shared) % local
            expert_ids[index] = Int16(number)
        found += arch.popc(filled)
    if lane == 0:
        flag_smem[FLAG_LIVE] = found


class Pulling(NamedTuple):
    """What a dispatch warp has in flight."""

    piece: Int32  # pieces loaded so far
    loading: Int32  # 1 while piece - 1 is loaded but not stored
    target: Int64  # where it goes
    completes: Int32  # pool block whose row it completes, or -1
    scales: Int64  # where the scales of that row go


@cute.jit
def finish_store(launch: Launch, unpublished, lane) -> Int32:
    """Wait in full for the warp's bulk stores; publish the row whose last piece they held.
    Returns "none".
    """
    if lane == 0:
        arch.cp_async_bulk_wait_group(0)
        if unpublished >= 0:
            sync.signal(launch, TOKENS_IN, unpublished)
    return Int32(-1)


@cute.jit
def load_counts(launch: Launch, counts, expert, lane):
    """The count records of all sources for one expert, into the warp's shared memory."""
    arch.sync_warp()  # every lane is done with the last expert's
    for rank in range(lane, launch.shape.config.num_ranks, 32):
        record = address(launch, "expert_recv_count", rank)
        record += Int64(expert) * wire.COUNT_RECORD_BYTES
        count, offset = load_global_v2(record)
        counts[rank * 2] = count
        counts[rank * 2 + 1] = offset
    arch.sync_warp()


@cute.jit
def routed_row(launch: Launch, counts, index):
    """(source rank, its slot, router weight as a word) of row `index` of the routed expert whose
    count records are `counts`.
    """
    source, turn = schedule.pick_source(counts, 0, 2, launch.shape.config.num_ranks, index)
    offset = counts[source * 2 + 1]
    record = (
        address(launch, "routed_record", source) + Int64(offset + turn) * wire.ROUTED_RECORD_BYTES
    )
    slot, weight = load_global_v2(record)
    return source, slot, weight


@cute.jit
def row_of(launch: Launch, counts, expert, index):
    """As `routed_row`, of a local expert: a shared one has this rank's tokens, in order."""
    config = launch.shape.config
    if const_expr(config.num_shared_experts == 0):
        source, slot, weight = routed_row(launch, counts, index)
    else:
        column = config.top_k + expert - config.experts_per_rank
        source, slot = launch.rank, index * config.slots_per_token + column
        weight = as_word(launch.shared_weight)
        if expert < config.experts_per_rank:
            source, slot, weight = routed_row(launch, counts, index)
    return source, slot, weight


@cute.jit
def store_piece(launch: Launch, buffers: PullBuffers, state: Pulling, lane):
    """Wait for the load of the last piece and start its store; with it, store the row's scales."""
    last = state.piece - 1
    slot = last % NUM_PULL_BUFFERS
    arch.mbarrier_wait(buffers.barriers + slot, (last // NUM_PULL_BUFFERS) % 2)
    if lane == 0:
        bulk_store(state.target, buffers.rows + slot * buffers.piece_bytes, buffers.piece_bytes)
    if const_expr(launch.shape.config.recipe.tokens.has_scales):
        if state.completes >= 0:
            words = buffers.scales + slot * launch.shape.token_scale_bytes
            for index in range(lane, launch.shape.config.token_scales, 32):
                scale = load_shared(words + index * 4)
                store_global(state.scales + Int64(index) * (4 * launch.shape.kernel.block_m), scale)
            arch.fence_proxy(SCALES_PULLED.kind)
    # Every lane has seen this phase of the barrier before lane 0 may begin the next but one.
    arch.sync_warp()


@cute.jit
def pull(
    launch: Launch,
    received,
    expert_ids,
    num_live,
    buffers: PullBuffers,
    zeros,
    worker,
    num_workers,
    lane,
):
    """Dispatch role, one warp: pull rows `worker`, `worker` + `num_workers`, ... of the dense
    order. Lane 0 issues the copies; the other lanes help with scales.

    A row moves in pieces through two buffers: while one piece is loading, the one before is being
    stored. A row is published when the store of its last piece has completed, during the next row.
    Before a wait for a ring slot the pipeline is drained: the slot may depend on the row that is
    still unpublished. `zeros` is shared memory with zeros for `budget.zero_bytes`.
    """
    shape = launch.shape
    block_m = shape.kernel.block_m
    has_scales = shape.config.recipe.tokens.has_scales
    row_bytes, piece_bytes = shape.token_row_bytes, buffers.piece_bytes
    pieces = row_bytes // piece_bytes
    zero_bytes = buffers.zero_bytes
    free = shape.slot_free
    slots_are_freed = shape.kernel.runs(GEMMS)  # by tiles; else rows overwrite what a slot holds

    state = Pulling(Int32(0), Int32(0), Int64(0), Int32(-1), Int64(0))
    unpublished = Int32(-1)  # pool block of a row that is stored but not published, or -1

    # Nothing global may be read before the first row: a warp without rows is waited for by nobody,
    # so a fast peer may already be writing the next launch's records.
    arch.fence_proxy(INPUT_STAGED.kind)
    row = Int32(worker)
    counted = Int32(-1)  # place of the expert whose count records lie in shared memory,
    expert = Int32(0)  # and the expert
    position = schedule.seek_pull(
        schedule.PullWalk(Int32(0), Int32(0), Int32(0)), row, received, num_live, block_m
    )
    while position.expert < num_live:
        if position.expert != counted:
            expert = Int32(expert_ids[position.expert])
            if const_expr(shape.config.num_shared_experts == 0):
                load_counts(launch, buffers.counts, expert, lane)
            elif expert < shape.config.experts_per_rank:
                load_counts(launch, buffers.counts, expert, lane)
            counted = position.expert
        index = row - position.first_row
        source, slot, weight = row_of(launch, buffers.counts, expert, index)
        block = position.first_block + index // block_m
        row_in_block = index % block_m
        ring_row = schedule.ring_row(block, shape.ring, block_m) + row_in_block

        if const_expr(slots_are_freed):
            if block >= shape.ring:
                freed = global_ptr(address(launch, FC2_DONE.region, block - shape.ring))
                done = arch.shuffle_sync(arch.load(freed, Int32, sem="relaxed", scope="gpu"), 0)
                if done < free:
                    unpublished = finish_store(launch, unpublished, lane)
                    if state.loading == 1:
                        store_piece(launch, buffers, state, lane)
                        unpublished = finish_store(launch, state.completes, lane)
                        state = Pulling(
                            state.piece, Int32(0), state.target, state.completes, state.scales
                        )
                role = faults.ROLE_DISPATCH
                sync.wait_for(launch, FC2_DONE, block - shape.ring, free, role)
                arch.sync_warp()
                arch.fence_proxy(SLOT_READ.kind)

        if lane == 0:
            store_global(address(launch, "l1_topk_weights_buffer", ring_row), weight)
            code = wire.encode_source(source, slot, shape.config.max_slots_per_rank)
            store_global(address(launch, "token_src_metadata", ring_row), code)

        token = slot // shape.config.slots_per_token
        origin = launch.x + Int64(token) * row_bytes
        if const_expr(has_scales):
            origin = peer_address(launch, "input_token_buffer", source, token)
        elif source != launch.rank:
            origin = peer_address(launch, "input_token_buffer", source, token)
        destination = address(launch, "l1_token_buffer", ring_row)
        if index == received[position.expert] - 1 and index >= block_m and lane == 0:
            # The last row of an expert with a full block: rows that pad its group become zero.
            # Only power depends on it, which bounds large GEMMs (H200: +2 % at 512 rows an expert);
            # multiplying rows that an earlier launch left costs as much as real ones.
            padding = schedule.padding_rows(index + 1, shape.row_group)
            for part in range(padding * (row_bytes // zero_bytes)):
                bulk_store(destination + row_bytes + Int64(part) * zero_bytes, zeros, zero_bytes)
        for part in range(pieces):
            unpublished = finish_store(launch, unpublished, lane)
            buffer = state.piece % NUM_PULL_BUFFERS
            completes = Int32(-1)
            if part == pieces - 1:
                completes = block
            if lane == 0:
                barrier = buffers.barriers + buffer
                num_bytes = Int32(piece_bytes)
                if const_expr(has_scales):
                    if completes >= 0:
                        num_bytes += shape.token_scale_bytes
                arch.mbarrier_arrive_and_expect_tx(barrier, num_bytes)
                bulk_load(
                    buffers.rows + buffer * piece_bytes,
                    origin + Int64(part) * piece_bytes,
                    barrier,
                    piece_bytes,
                )
                if const_expr(has_scales):
                    if completes >= 0:
                        bulk_load(
                            buffers.scales + buffer * shape.token_scale_bytes,
                            peer_address(launch, "input_scale_buffer", source, token),
                            barrier,
                            shape.token_scale_bytes,
                        )
            if state.loading == 1:
                store_piece(launch, buffers, state, lane)
                unpublished = state.completes
            scales = Int64(0)
            if const_expr(has_scales):
                scales = address(launch, "l1_scale_buffer", block % shape.ring)
                scales += Int64(row_in_block) * 4
            state = Pulling(
                state.piece + 1,
                Int32(1),
                destination + Int64(part) * piece_bytes,
                completes,
                scales,
            )
        row += num_workers
        position = schedule.seek_pull(position, row, received, num_live, block_m)

    unpublished = finish_store(launch, unpublished, lane)
    if state.loading == 1:
        store_piece(launch, buffers, state, lane)
        unpublished = finish_store(launch, state.completes, lane)
