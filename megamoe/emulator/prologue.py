"""The role `count` of the whole CTA, and the NVLink barrier that it shares with `combine`.

Owns steps of the protocol in which ranks meet. The threads of a CTA are stood for by two agents,
one of which does the arrivals and waits; work is divided between them so that every CTA barrier has
something to hand over.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.budget import Budget
from megamoe.emulator.memory import GPU, SYS, Agent
from megamoe.emulator.runtime import Role, Runtime
from megamoe.emulator.state import CtaAgents, RankState, Shared
from megamoe.shape import Shape
from workspace.layout import (
    GRID_COUNTED,
    GRID_DISPATCHED,
    SIGNAL_STRIDE,
)
from workspace.wire import COUNT_RECORD_BYTES, ROUTED_RECORD_BYTES

SIGNAL_BYTES = 4
LAYER, LAYER_BYTES = 0, 4  # all ranks run the same layer here


@dataclass
class Traffic:
    """What a launch is measured by."""

    nvlink_bytes: int
    invalid_experts: list[tuple[int, int, int]]

    def count(self, source: int, target: int, num_bytes: int) -> None:
        if source != target:
            self.nvlink_bytes += num_bytes


@dataclass
class Cta:
    """One CTA during one launch."""

    index: int
    num_ctas: int
    runtime: Runtime
    ranks: list[RankState]
    state: RankState
    agents: CtaAgents
    shared: Shared
    resets: set[str]
    traffic: Traffic
    epoch: int = 0

    @property
    def config(self):
        return self.state.layout.config

    @property
    def kernel(self):
        return self.state.layout.kernel

    @property
    def budget(self) -> Budget:
        return self.state.budget

    @property
    def shape(self) -> Shape:
        return Shape(self.config, self.kernel, self.state.layout)

    @property
    def rank(self) -> int:
        return self.state.rank

    def counts(self, agent: Agent) -> list[int]:
        """Rows of every local expert, from shared memory."""
        return self.shared.counts.read(agent, slice(0, self.config.experts_per_rank))[:, 0].tolist()

    def _share(self, thread: int, count: int) -> range:
        """Those of `count` items that one thread of the whole grid takes."""
        num_threads = len(self.agents.threads)
        first = self.index * num_threads + thread
        return range(first, count, self.num_ctas * num_threads)

    def entries(self, thread: int) -> range:
        """Entries q = token * K + k of one thread."""
        return self._share(thread, len(self.state.launch.experts))

    def tokens(self, thread: int) -> range:
        """Own tokens of one thread."""
        return self._share(thread, self.state.launch.num_tokens)

    def target(self, entry: int) -> int:
        """Expert of an entry, -1 if masked or not an expert."""
        expert = self.state.launch.experts[entry]
        return expert if 0 <= expert < self.config.num_experts else -1


def nvlink_barrier(cta: Cta, name: str, grid_index: int, step: int) -> Role:
    """All CTAs of all ranks meet: what any did before comes before what any does after.

    Thread 0 arrives; one thread per peer signals it, if this CTA is the last, and waits for it.
    """
    runtime, threads, state = cta.runtime, cta.agents.threads, cta.state
    leader = cta.agents.leader
    runtime.fence(leader, f"{name}.fence_arrive")
    grid = state.word("grid_sync_counter", grid_index * SIGNAL_STRIDE)
    arrived = yield from runtime.add(
        leader, grid, f"{name}.arrive", scope=GPU, release=True, acquire=True
    )
    runtime.hand_over(threads, f"{name}.elected")
    for peer in cta.ranks:
        if arrived != cta.num_ctas - 1:
            break
        signal = peer.word("nvlink_barrier_signal", cta.rank * SIGNAL_STRIDE)
        thread = threads[peer.rank % len(threads)]
        yield from runtime.add(thread, signal, f"{name}.signal", scope=SYS, release=True)
        cta.traffic.count(cta.rank, peer.rank, SIGNAL_BYTES)
    for rank in range(cta.config.num_ranks):
        signal = state.word("nvlink_barrier_signal", rank * SIGNAL_STRIDE)
        thread = threads[rank % len(threads)]
        yield from runtime.wait(thread, signal, cta.epoch + step, f"{name}.wait", scope=SYS)
    runtime.hand_over(threads, f"{name}.after")


def grid_sync(cta: Cta) -> Role:
    """All CTAs of the rank meet."""
    runtime, leader = cta.runtime, cta.agents.leader
    runtime.hand_over(cta.agents.threads, "grid_sync.before")
    word = cta.state.word("grid_sync_counter", GRID_COUNTED * SIGNAL_STRIDE)
    yield from runtime.add(leader, word, "grid_sync.arrive", release=True)
    yield from runtime.wait(leader, word, cta.num_ctas, "grid_sync.wait")
    runtime.hand_over(cta.agents.threads, "grid_sync.after")


def count(cta: Cta) -> Role:
    """Tell every owner how many rows it gets for each expert, and where they come from."""
    cta.epoch = cta.state.word("nvlink_barrier_counter").read(cta.agents.leader)
    early = cta.runtime.live("count.quantize")
    if early:
        yield from _quantize(cta)
    yield from _reserve(cta)
    yield from grid_sync(cta)
    yield from _offsets(cta)
    cta.runtime.hand_over(cta.agents.threads, "count.offsets_barrier")
    yield from _records(cta)
    cta.runtime.hand_over(cta.agents.threads, "dispatched.before")
    yield from nvlink_barrier(cta, "dispatched", GRID_DISPATCHED, 1)
    if not early:
        yield from _quantize(cta)

    experts, num_ranks = cta.config.experts_per_rank, cta.config.num_ranks
    received = cta.state.data["expert_recv_count"]
    if cta.index == 0:
        for rank in range(num_ranks):
            thread = cta.agents.threads[rank % len(cta.agents.threads)]
            assert cta.state.data["launched_layer"].read(thread, rank)[0, 0] == LAYER
    for number, thread in enumerate(cta.agents.threads):
        for expert in range(number, experts, len(cta.agents.threads)):
            rows = [
                received.read(thread, rank * experts + expert)[0, 0] for rank in range(num_ranks)
            ]
            total = sum(map(int, rows))
            cta.shared.counts.write(thread, expert, total)
            if cta.index == 0 and cta.state.launch.expert_counts is not None:
                cta.state.launch.expert_counts[expert] += total
    cta.runtime.hand_over(cta.agents.all, "count.counts_barrier")


def _quantize(cta: Cta) -> Role:
    """Rows and scales that peers pull, unless the host has staged them."""
    launch, state, threads = cta.state.launch, cta.state, cta.agents.threads
    if launch.staged:
        return
    for number, thread in enumerate(threads):
        for token in cta.tokens(number):
            yield
            state.data["input_token_buffer"].write(thread, token, launch.row_bits[token])
            state.data["input_sf_buffer"].write(thread, token, launch.scale_bits[token])
        cta.runtime.proxy_fence(thread, "count.quantize_proxy")


def _reserve(cta: Cta) -> Role:
    """Local histogram, then one reservation per expert that has entries in this CTA."""
    runtime, shared, experts = cta.runtime, cta.shared, cta.config.num_experts
    threads = cta.agents.threads
    for number, thread in enumerate(threads):
        local = [[0] for _ in range(experts)]
        for entry in cta.entries(number):
            expert, value = cta.target(entry), cta.state.launch.experts[entry]
            if expert >= 0:
                local[expert][0] += 1
            elif value != -1:
                cta.traffic.invalid_experts.append((cta.rank, entry, value))
        shared.histogram.write(thread, slice(number * experts, (number + 1) * experts), local)
    yield
    runtime.hand_over(threads, "count.histogram_barrier")
    for number, thread in enumerate(threads):
        histogram = shared.histogram.read(thread, slice(0, len(threads) * experts))
        local = histogram.reshape(len(threads), experts).sum(0)
        for expert in range(number, experts, len(threads)):
            base, amount = 0, int(local[expert])
            if amount:
                word = cta.state.word("expert_send_count", expert)
                base = yield from runtime.add(thread, word, "count.reserve", amount)
            shared.base.write(thread, expert, base)


def _offsets(cta: Cta) -> Role:
    """Totals of all CTAs and, inside the segment of each owner, their exclusive prefix sums."""
    experts = cta.config.experts_per_rank
    for owner in range(cta.config.num_ranks):
        thread = cta.agents.threads[owner % len(cta.agents.threads)]
        offset = 0
        for expert in range(owner * experts, (owner + 1) * experts):
            total = cta.state.word("expert_send_count", expert).read(thread)
            cta.shared.total.write(thread, expert, total)
            cta.shared.offset.write(thread, expert, offset)
            offset += total
    yield


def _records(cta: Cta) -> Role:
    """What the reduce waits for; routed records and count records, stored on their owners."""
    experts, slots = cta.config.experts_per_rank, cta.config.max_slots_per_rank
    everything = slice(0, cta.config.num_experts)
    launch, running = cta.state.launch, [0] * cta.config.num_experts
    top_k = cta.config.top_k
    for number, thread in enumerate(cta.agents.threads):
        for token in cta.tokens(number):
            live = sum(cta.target(token * top_k + k) >= 0 for k in range(top_k))
            if cta.runtime.live("count.expect"):
                cta.state.word("combine_arrival_count", token).write(thread, -live)
    for number, thread in enumerate(cta.agents.threads):
        first = (
            cta.shared.offset.read(thread, everything) + cta.shared.base.read(thread, everything)
        )[:, 0]
        for entry in cta.entries(number):
            expert = cta.target(entry)
            if expert < 0:
                continue
            position = int(first[expert]) + running[expert]
            running[expert] += 1
            owner = cta.ranks[expert // experts]
            yield
            record = [[entry, launch.weight_bits[entry]]]
            owner.data["routed_record"].write(thread, cta.rank * slots + position, record)
            cta.traffic.count(cta.rank, owner.rank, ROUTED_RECORD_BYTES)
    if cta.index == 0:
        for owner in cta.ranks:
            thread = cta.agents.threads[owner.rank % len(cta.agents.threads)]
            segment = slice(owner.rank * experts, (owner.rank + 1) * experts)
            totals = cta.shared.total.read(thread, segment)[:, 0]
            offsets = cta.shared.offset.read(thread, segment)[:, 0]
            records = [list(pair) for pair in zip(totals, offsets, strict=True)]
            rows = slice(cta.rank * experts, (cta.rank + 1) * experts)
            yield
            owner.data["expert_recv_count"].write(thread, rows, records)
            owner.data["launched_layer"].write(thread, cta.rank, LAYER)
            cta.traffic.count(cta.rank, owner.rank, COUNT_RECORD_BYTES * experts + LAYER_BYTES)
