"""The end of a launch: early reduce, barrier over all ranks, clean-up, the rest.

Owns who adds the slots of which token, and when.
"""

from __future__ import annotations

import torch

from megamoe.emulator.memory import SYS, Agent
from megamoe.emulator.prologue import Cta, nvlink_barrier
from megamoe.emulator.runtime import Role
from megamoe.emulator.state import as_bits, as_float, pool_blocks_used
from megamoe.reference import combine as reduce_slots
from workspace.layout import (
    BARRIERS_PER_LAUNCH,
    GRID_COMBINED,
    SIGNAL_STRIDE,
    SLOTS_ADDED,
    SLOTS_IN,
)


def combine(cta: Cta) -> Role:
    """After the math and report warps of the CTA: wait for all ranks, clean up, reduce what is
    left.

    The loaders need not take part: all that they did is ordered before the math that used it. The
    warps that reduce early hand over the tokens that they have not reduced.
    """
    runtime = cta.runtime
    cta.agents.enter_combine()
    counts = cta.counts(cta.agents.leader)
    if runtime.live("combined.reported"):
        while cta.shared.reports_ended.value < 1:
            yield cta.agents.leader, cta.shared.reports_ended, 1
        runtime.hand_over([*cta.agents.threads, *cta.agents.report], "combined.reported")
    if runtime.live("combined.before"):
        ended, warps = cta.shared.math_ended, cta.agents.math
        while ended.value < len(warps):
            yield cta.agents.leader, ended, len(warps)
        lanes = [agent for warp in warps for agent in warp]
        runtime.hand_over([*cta.agents.threads, *lanes], "combined.before")
    yield from nvlink_barrier(cta, "combined", GRID_COMBINED, BARRIERS_PER_LAUNCH)
    yield from _clean_up(cta, counts)
    ended, warps = cta.shared.early_ended, cta.agents.early
    while ended.value < len(warps):
        yield cta.agents.leader, ended, len(warps)
    leaders = [warp.leader for warp in warps]
    runtime.hand_over([*cta.agents.threads, *leaders], "combined.handover")
    yield from _reduce_rest(cta)


def _clean_up(cta: Cta, counts: list[int]) -> Role:
    """Zero this CTA's share of the counters that the launch has used."""
    state, used = cta.state, pool_blocks_used(counts, cta.kernel.block_m)
    shares = {
        "l1_arrival_count": range(cta.index, used, cta.num_ctas),
        "fc1_done_counter": range(cta.index, used, cta.num_ctas),
        "fc2_done_counter": range(cta.index, used, cta.num_ctas),
        "expert_send_count": range(cta.index, cta.config.num_experts, cta.num_ctas),
    }
    if cta.index == 0:
        shares["load_balance_counter"] = range(1)
        shares["grid_sync_counter"] = range(0, state.num_words("grid_sync_counter"), SIGNAL_STRIDE)
    for region, indices in shares.items():
        if region not in cta.resets:
            continue
        for index in indices:
            thread = cta.agents.threads[index % len(cta.agents.threads)]
            state.word(region, index).write(thread, 0)
        yield
    if cta.index == 0 and cta.runtime.live("cleanup.epoch"):
        epoch = cta.epoch + BARRIERS_PER_LAUNCH
        state.word("nvlink_barrier_counter").write(cta.agents.leader, epoch)


def own_tokens(cta: Cta) -> range:
    """Tokens that a CTA reduces."""
    return range(cta.index, cta.state.launch.num_tokens, cta.num_ctas)


def reduce_early(cta: Cta, worker: int) -> Role:
    """The dispatch warp after its last row, the report warp after its last tile: tokens whose slots
    have all come in.

    The kernel takes those that are ready, the report warp also between tiles, and stops when math
    is done; here a warp waits for a fixed half of its share, so that both ways to be reduced are
    taken in every launch.
    """
    agent, runtime = cta.agents.early[worker].leader, cta.runtime
    for token in own_tokens(cta)[worker :: 2 * len(cta.agents.early)]:
        arrived = cta.state.word("combine_arrival_count", token)
        yield from runtime.wait(agent, arrived, SLOTS_IN, "dispatch.slots_wait", scope=SYS)
        _reduce(cta, agent, token)
        yield
        if runtime.live("dispatch.slots_added"):
            arrived.write(agent, SLOTS_ADDED)
    runtime.bump(cta.shared.early_ended)


def _reduce_rest(cta: Cta) -> Role:
    """Tokens of the CTA that nobody has reduced early."""
    threads = cta.agents.threads
    for number, token in enumerate(own_tokens(cta)):
        thread = threads[number % len(threads)]
        if cta.state.word("combine_arrival_count", token).read(thread) == SLOTS_IN:
            _reduce(cta, thread, token)
        yield


def _reduce(cta: Cta, agent: Agent, token: int) -> None:
    """Sum of the slots that are not masked; the others are not read."""
    config, top_k = cta.config, cta.config.top_k
    slots = cta.state.data["combine_output"]
    targets = [cta.target(token * top_k + k) for k in range(top_k)]
    rows = torch.zeros(1, top_k, config.hidden_size, device="cpu")
    for k, expert in enumerate(targets):
        if expert >= 0:
            bits = slots.read(agent, token * top_k + k)
            rows[0, k] = as_float(bits, config.recipe.output)[0]
    summed = reduce_slots(rows, torch.tensor([targets], device="cpu"))
    summed = summed.to(getattr(torch, config.recipe.output))
    cta.state.data["layer_output"].write(agent, token, as_bits(summed))
