"""The report warp: tells other CTAs and ranks which tiles are stored; then it reduces."""

from __future__ import annotations

from megamoe.budget import QUEUE_SLOTS
from megamoe.emulator.combine import reduce_early
from megamoe.emulator.memory import SYS, Agent
from megamoe.emulator.prologue import SIGNAL_BYTES, Cta
from megamoe.emulator.roles import read_tile, release_tile
from megamoe.emulator.runtime import Role
from megamoe.schedule import PHASE_DONE, PHASE_FC1, ring_row
from workspace.wire import PADDING, source_rank, source_slot


def report(cta: Cta) -> Role:
    """Report every tile once its math warps have stored it."""
    runtime, shared, state = cta.runtime, cta.shared, cta.state
    leader, lanes = cta.agents.report
    number = 0
    while True:
        tile = yield from read_tile(cta, leader, number, "report", also=(lanes,))
        phase, _, _, block, _, _ = tile
        if phase == PHASE_DONE:
            break
        kept = runtime.live("report.keep_slot")
        if not kept:
            yield from release_tile(cta, leader, number, "report")
        stored = shared.stored[number % QUEUE_SLOTS]
        arrivals = (number // QUEUE_SLOTS + 1) * cta.kernel.num_math_warps
        yield from runtime.wait(leader, stored, arrivals, "report.stored", also=(lanes,))
        if kept:
            yield from release_tile(cta, leader, number, "report")
        if phase == PHASE_FC1:
            writers = [warp.lanes for warp in cta.agents.math]
            runtime.proxy_fence(leader, "report.fc1_proxy", writers)
            done = state.word("fc1_done_counter", block)
            yield from runtime.add(leader, done, "report.fc1_done", release=True)
        else:
            yield from _report_fc2(cta, block)
        number += 1
    runtime.bump(shared.reports_ended)
    yield from reduce_early(cta, 1)


def _report_fc2(cta: Cta, block: int) -> Role:
    """The last report of a block tells the source of every row that it is in, cleans the padding
    metadata and frees the ring slot.
    """
    runtime, state, shape = cta.runtime, cta.state, cta.shape
    leader, lanes = cta.agents.report
    done = state.word("fc2_done_counter", block)
    before = yield from runtime.add(leader, done, "report.fc2_done", release=True, acquire=True)
    if before != shape.fc2_done - 1:
        return
    runtime.hand_over([leader, lanes], "report.clean_begin")
    first = ring_row(block, shape.ring, shape.kernel.block_m)
    rows = slice(first, first + shape.kernel.block_m)
    yield from _report_rows(cta, lanes, rows)
    for region in ("l1_topk_weights_buffer", "token_src_metadata"):
        if region in cta.resets:
            yield
            state.data[region].write(lanes, rows, 0)
    runtime.hand_over([leader, lanes], "report.clean_end")
    yield from runtime.add(leader, done, "report.clean_done", release=True)


def _report_rows(cta: Cta, lanes: Agent, rows: slice) -> Role:
    """Tell the source of every row of a finished block that the row is in its slot."""
    runtime, config = cta.runtime, cta.config
    codes = cta.state.data["token_src_metadata"].read(lanes, rows)[:, 0]
    runtime.fence(lanes, "report.rows_fence")
    for code in codes[codes != PADDING].tolist():
        rank = source_rank(code, config.max_slots_per_rank)
        token = source_slot(code, config.max_slots_per_rank) // config.top_k
        arrived = cta.ranks[rank].word("combine_arrival_count", token)
        yield from runtime.add(lanes, arrived, "report.rows_in", scope=SYS)
        cta.traffic.count(cta.rank, rank, SIGNAL_BYTES)
