"""The memory model: agents with vector clocks, held-back stores, and a shadow of every byte.

Owns what "ordered" and "visible" mean. An agent is one thread as far as ordering goes. Its clock
counts, per agent, how much of that agent's past is ordered before it; a release hands the clock to
a word, an acquire takes it from there. A release of gpu scope is seen on its own rank only. Stores
stay in the agent's buffer until an ordered reader or writer comes (or, by seed, until its release);
bulk copies stay in a separate group until the group wait. What the async proxy reads after ordinary
stores needs a proxy fence on both sides: after the store, by the writer or by an agent that comes
after it, and by the reader after its acquire.

Invariant: an access that the clocks do not order is an error, whatever the interleaving happened to
be. Neighbours: `runtime` schedules and names operations, `roles` make the accesses.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

from megamoe.emulator.errors import OutOfBounds, UnorderedAccess, UnwrittenRead

NEVER = np.iinfo(np.int64).max
GPU, SYS = "gpu", "sys"  # the smaller scope is the smaller string


class Agent:
    """One thread of one rank (or its host): clock, store buffer and bulk groups."""

    def __init__(self, index: int, num_agents: int, rank: int, cta: int, role: str):
        self.index, self.rank, self.cta, self.role = index, rank, cta, role
        self.clock = np.zeros(num_agents, np.int64)
        self.clock[index] = 1
        self.launch = 0
        self.pending: list[tuple] = []  # stores that others cannot see: (time, target, payload)
        self.bulk: list[tuple] = []  # asynchronous stores in flight, oldest first
        self.settled = False  # no store that is ordered before this agent is still held back
        self.unfenced: list[tuple] = []  # stores that the async proxy of others must not read yet
        self.clear()

    def clear(self) -> None:
        """State at the start of a kernel, which is a full fence of every kind."""
        self.async_clock = self.clock.copy()  # what its async-proxy reads are ordered after
        self.fenced: np.ndarray | None = None  # clock at the last fence, and its scope
        self.fence_scope = GPU
        self.observed: np.ndarray | None = None  # what a fence would acquire

    @property
    def time(self) -> int:
        return int(self.clock[self.index])

    def __str__(self) -> str:
        return f"rank {self.rank}, CTA {self.cta}, role {self.role}"


class Memory:
    """All agents, their store buffers, and release/acquire between them."""

    def __init__(self) -> None:
        self.agents: list[Agent] = []
        self.pending_since = np.empty(0, np.int64)
        self.eager = 0.0  # probability that a release makes the stores visible at once
        self.random = random.Random(0)
        self.check_order = True

    def build(self, places: list[tuple[int, int, str]]) -> list[Agent]:
        """One agent per (rank, cta, role)."""
        self.agents = [Agent(i, len(places), *place) for i, place in enumerate(places)]
        self.pending_since = np.full(len(places), NEVER, np.int64)
        return self.agents

    def hold(self, agent: Agent, target, payload) -> None:
        """Put a store into the agent's buffer."""
        if not agent.pending:
            self.pending_since[agent.index] = agent.time
        agent.pending.append((agent.time, target, payload))

    def flush(self, agent: Agent, upto: int) -> None:
        """Make the agent's stores up to a time visible."""
        count = 0
        for time, target, payload in agent.pending:
            if time > upto:
                break
            target.apply(payload)
            count += 1
        del agent.pending[:count]
        self.pending_since[agent.index] = agent.pending[0][0] if agent.pending else NEVER

    def settle(self, agent: Agent) -> None:
        """Make every store of others that is ordered before the agent visible."""
        if agent.settled:
            return
        agent.settled = True
        for index in np.flatnonzero(self.pending_since <= agent.clock):
            if index != agent.index:
                self.flush(self.agents[index], int(agent.clock[index]))

    def forward(self, agent: Agent, target) -> None:
        """A thread sees its own stores."""
        if agent.pending and any(held[1] is target for held in agent.pending):
            self.flush(agent, agent.time)

    def join(self, agent: Agent, clock: np.ndarray) -> None:
        np.maximum(agent.clock, clock, out=agent.clock)
        agent.settled = False

    def tick(self, agent: Agent) -> None:
        """What the agent does from here on is not covered by clocks it has handed out."""
        if self.eager and self.random.random() < self.eager:
            self.flush(agent, agent.time)
        agent.clock[agent.index] += 1

    def release(self, agent: Agent, word: Word, scope: str) -> None:
        word.publish(agent.rank, scope, agent.clock)
        self.tick(agent)

    def acquire(self, agent: Agent, word: Word, scope: str) -> None:
        for clock in word.visible_to(agent.rank, scope):
            self.join(agent, clock)

    def relaxed(self, agent: Agent, word: Word, scope: str, reads: bool, writes: bool) -> None:
        """Orders only together with a fence: before it for a write, after it for a read."""
        if reads:
            for clock in word.visible_to(agent.rank, scope):
                seen = agent.observed
                agent.observed = clock.copy() if seen is None else np.maximum(seen, clock)
        if writes and agent.fenced is not None:
            word.publish(agent.rank, min(scope, agent.fence_scope), agent.fenced)

    def fence(self, agent: Agent, scope: str = SYS) -> None:
        """fence.acq_rel of the given scope."""
        if agent.observed is not None:
            self.join(agent, agent.observed)
        agent.fenced, agent.fence_scope = agent.clock.copy(), scope
        self.tick(agent)

    def proxy_fence(self, agent: Agent, writers: Iterable[Agent] = ()) -> None:
        """fence.proxy.async: async-proxy reads come after what the generic proxy has acquired, and
        those of others may come after this fence for what the agent has stored, or `writers` whose
        stores are ordered before it.
        """
        agent.async_clock = agent.clock.copy()
        for writer in (agent, *writers):
            reached = int(agent.clock[writer.index])
            later = [store for store in writer.unfenced if store[0] > reached]
            for time, data, rows, pieces in writer.unfenced:
                if time <= reached:
                    data.enter_async_proxy(agent, writer, rows, pieces)
            writer.unfenced[:] = later

    def hand_over(self, agents: list[Agent]) -> None:
        """A barrier of these agents: each comes after all."""
        joined = agents[0].clock.copy()
        for agent in agents[1:]:
            np.maximum(joined, agent.clock, out=joined)
        for agent in agents:
            agent.clock[:] = joined
            agent.settled = False
            self.tick(agent)


class Word:
    """One 32-bit word that is used atomically: a counter, a barrier word or an mbarrier."""

    __slots__ = (
        "memory", "region", "rank", "index", "array", "slot",
        "write_agent", "write_time", "atomics", "polls", "released", "waiters",
    )  # fmt: skip

    def __init__(self, memory: Memory, region: str, rank: int, index: int, array, slot: int):
        self.memory, self.region, self.rank, self.index = memory, region, rank, index
        self.array, self.slot = array, slot
        self.write_agent = self.write_time = 0  # last plain write
        self.atomics: dict[int, int] = {}  # agent -> time of its last atomic since then
        self.polls: dict[int, int] = {}  # agent -> time of its last read since then
        self.released: dict[tuple[int, str], np.ndarray] = {}
        self.waiters: list = []

    @property
    def value(self) -> int:
        return int(self.array[self.slot])

    def publish(self, rank: int, scope: str, clock: np.ndarray) -> None:
        held = self.released.get((rank, scope))
        self.released[rank, scope] = clock.copy() if held is None else np.maximum(held, clock)

    def visible_to(self, rank: int, scope: str) -> list[np.ndarray]:
        """Clocks that an acquire takes: both sides must name a scope that holds the other."""
        return [
            clock
            for (source, released), clock in self.released.items()
            if source == rank or (released == SYS and scope == SYS)
        ]

    def _after(self, agent: Agent, accesses: dict[int, int], what: str) -> None:
        if not self.memory.check_order:
            return
        for other, time in accesses.items():
            if agent.clock[other] < time and other != agent.index:
                self._fail(agent, what, self.memory.agents[other])

    def _fail(self, agent: Agent, what: str, other: Agent) -> None:
        raise UnorderedAccess(
            f"{agent}: {what} {self.region}[{self.index}] of rank {self.rank} "
            f"is not ordered after {other}"
        )

    def touch(self, agent: Agent, accesses: dict[int, int], what: str) -> None:
        """An atomic access: comes after the last plain write."""
        self.memory.settle(agent)
        self.memory.forward(agent, self)
        self._after(agent, {self.write_agent: self.write_time}, what)
        accesses[agent.index] = agent.time

    def read(self, agent: Agent) -> int:
        """A plain load: comes after every atomic and the last plain write."""
        self.touch(agent, self.polls, "read of")
        self._after(agent, self.atomics, "read of")
        return self.value

    def write(self, agent: Agent, value: int) -> None:
        """A plain store: comes after every access."""
        self.memory.settle(agent)
        self._after(agent, {self.write_agent: self.write_time}, "write to")
        self._after(agent, self.atomics, "write to")
        self._after(agent, self.polls, "write to")
        if self.waiters and self.memory.check_order:
            self._fail(agent, "write to", self.waiters[0].blocked[0])
        self.write_agent, self.write_time = agent.index, agent.time
        self.atomics, self.polls, self.released = {}, {}, {}
        self.memory.hold(agent, self, value)

    def apply(self, value: int) -> None:
        self.array[self.slot] = value


class Data:
    """Rows of plain bytes, with a shadow per row and piece of `piece` columns.

    The shadow knows the last writer, its launch, and the readers since.
    `fresh`: a read needs a write of the same launch (data regions); else only order is checked.
    `bucket`: rows whose reads are filed together.
    `copied`: bulk copies or TMA read it, so the shadow also knows since when they may.
    """

    def __init__(
        self, memory: Memory, name: str, rank: int, array, piece: int, bucket: int, fresh=True,
        copied=False,
    ):  # fmt: skip
        self.memory, self.name, self.rank, self.array = memory, name, rank, array
        self.piece, self.bucket, self.fresh, self.copied = piece, bucket, fresh, copied
        self.rows, self.columns = array.shape
        shape = (self.rows, -(-self.columns // piece))
        self.write_agent = np.zeros(shape, np.int32)
        self.write_time = np.zeros(shape, np.int64)
        # Of the proxy fence after the last write.
        self.async_agent, self.async_time = self.write_agent, self.write_time
        if copied:
            self.async_agent = np.zeros(shape, np.int32)
            self.async_time = np.zeros(shape, np.int64)
        self.issued = np.zeros(shape, np.int32)  # launch of the last write
        self.visible = np.zeros(
            shape, np.int32
        )  # launch of the last write that left its store buffer
        self.reads: dict[int, dict[tuple, int]] = {}

    def _where(self, agent: Agent, rows, columns):
        """Rows as an index, the pieces of the columns, and both bounds checked."""
        if isinstance(rows, (int, np.integer)):
            rows = slice(int(rows), int(rows) + 1)
        first, last = (
            (rows.start, rows.stop - 1) if isinstance(rows, slice) else (rows.min(), rows.max())
        )
        begin, end = columns or (0, self.columns)
        if first < 0 or last >= self.rows or begin < 0 or end > self.columns:
            raise OutOfBounds(
                f"{agent}: row {first if first < 0 else last}, columns {begin}..{end} of "
                f"{self.name} on rank {self.rank}, which has {self.rows} rows of {self.columns}"
            )
        return rows, begin, end, slice(begin // self.piece, -(-end // self.piece))

    def _first(self, rows, bad: np.ndarray) -> tuple[int, int]:
        """Row and column piece of the first bad entry."""
        row, piece = np.argwhere(bad)[0]
        return (rows.start + int(row) if isinstance(rows, slice) else int(rows[row])), int(piece)

    def _spans(self, rows) -> list[tuple[int, int]]:
        """Row intervals that do not cross buckets."""
        if not isinstance(rows, slice):
            return [(int(row), int(row) + 1) for row in rows]
        edges = range(rows.start // self.bucket * self.bucket, rows.stop, self.bucket)
        return [(max(rows.start, edge), min(rows.stop, edge + self.bucket)) for edge in edges]

    def _check_written(
        self, agent: Agent, rows, pieces, what: str, asynchronous: bool = False
    ) -> None:
        """The access comes after the last write: a read of the async proxy by its own clock, and
        after the proxy fence that follows the write.
        """
        clock = agent.async_clock if asynchronous else agent.clock
        agents = self.async_agent if asynchronous else self.write_agent
        times = self.async_time if asynchronous else self.write_time
        late = clock[agents[rows, pieces]] < times[rows, pieces]
        if self.memory.check_order and late.any():
            row, piece = self._first(rows, late)
            other = self.memory.agents[self.write_agent[rows, pieces][late][0]]
            event = "the write and a proxy fence" if asynchronous else "the write"
            raise UnorderedAccess(
                f"{agent}: {what} {self.name}[{row}] (piece {pieces.start + piece}) of rank "
                f"{self.rank} is not ordered after {event} of {other}"
            )

    def _check_reads(self, agent: Agent, rows, pieces) -> None:
        for begin, end in self._spans(rows):
            bucket = self.reads.get(begin // self.bucket)
            if not bucket:
                continue
            for key, time in list(bucket.items()):
                first, last, left, right, other = key
                if first >= end or last <= begin or left >= pieces.stop or right <= pieces.start:
                    continue
                if agent.clock[other] < time and other != agent.index and self.memory.check_order:
                    raise UnorderedAccess(
                        f"{agent}: write to {self.name}[{max(first, begin)}] of rank {self.rank} "
                        f"is not ordered after the read of {self.memory.agents[other]}"
                    )
                if begin <= first and last <= end and pieces.start <= left and right <= pieces.stop:
                    del bucket[key]

    def read(self, agent: Agent, rows, columns=None, asynchronous: bool = False) -> np.ndarray:
        """Load rows (int, slice or index array) and a column range; a copy."""
        memory = self.memory
        rows, begin, end, pieces = self._where(agent, rows, columns)
        memory.settle(agent)
        memory.forward(agent, self)
        shadow = self.issued if memory.check_order else self.visible
        if self.fresh and (shadow[rows, pieces] != agent.launch).any():
            row, piece = self._first(rows, shadow[rows, pieces] != agent.launch)
            raise UnwrittenRead(
                f"{agent}: read of {self.name}[{row}] (piece {pieces.start + piece}) of rank "
                f"{self.rank}, which nobody wrote in launch {agent.launch}"
            )
        self._check_written(agent, rows, pieces, "read of", asynchronous)
        for first, last in self._spans(rows):
            bucket = self.reads.setdefault(first // self.bucket, {})
            bucket[first, last, pieces.start, pieces.stop, agent.index] = agent.time
        return self.array[rows, begin:end].copy()

    def _claim(self, agent: Agent, rows, pieces, time: int) -> None:
        self._check_written(agent, rows, pieces, "write to")
        self._check_reads(agent, rows, pieces)
        self.write_agent[rows, pieces] = agent.index
        self.write_time[rows, pieces] = time
        if self.copied:
            self.async_time[rows, pieces] = NEVER
        self.issued[rows, pieces] = agent.launch

    def write(self, agent: Agent, rows, values, columns=None) -> None:
        """Store values to rows (int, slice or index array) and a column range."""
        rows, begin, end, pieces = self._where(agent, rows, columns)
        self.memory.settle(agent)
        self._claim(agent, rows, pieces, agent.time)
        if self.copied:
            agent.unfenced.append((agent.time, self, rows, pieces))
        self.memory.hold(agent, self, (rows, begin, end, pieces, values, agent.launch))

    def enter_async_proxy(self, agent: Agent, writer: Agent, rows, pieces) -> None:
        """The agent's proxy fence after a store of the writer: from here on the async proxy may
        read it.
        """
        last = self.write_agent[rows, pieces] == writer.index
        for shadow, value in ((self.async_agent, agent.index), (self.async_time, agent.time)):
            shadow[rows, pieces] = np.where(last, value, shadow[rows, pieces])

    def bulk_write(self, agent: Agent, row: int, source: list, columns) -> None:
        """Issue an asynchronous store of ``source[0]``, which is read when the copy completes."""
        rows, begin, end, pieces = self._where(agent, row, columns)
        self.memory.settle(agent)
        self._claim(agent, rows, pieces, NEVER)
        agent.bulk.append((self, rows, begin, end, pieces, source))

    def complete(self, agent: Agent, rows, begin, end, pieces, source) -> None:
        """The group wait: from here on the copy is a store of the agent."""
        self.write_time[rows, pieces] = self.async_time[rows, pieces] = agent.time
        self.async_agent[rows, pieces] = agent.index
        self.memory.hold(agent, self, (rows, begin, end, pieces, source[0], agent.launch))

    def apply(self, payload) -> None:
        rows, begin, end, pieces, values, launch = payload
        self.array[rows, begin:end] = values
        self.visible[rows, pieces] = launch

    def refill(self, launch: int, value: int) -> None:
        """Overwrite what nobody has written for `launch` yet; no role does this: no clock moves."""
        stale = self.issued < launch
        if stale.all():
            self.array.fill(value)
        else:
            self.array[np.repeat(stale, self.piece, axis=1)[:, : self.columns]] = value

    def forget_reads(self, clock: np.ndarray) -> None:
        """Drop reads that are ordered before `clock`."""
        for bucket, reads in list(self.reads.items()):
            left = {key: time for key, time in reads.items() if time > clock[key[4]]}
            if left:
                self.reads[bucket] = left
            else:
                del self.reads[bucket]
