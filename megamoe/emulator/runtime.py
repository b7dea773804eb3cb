"""The runtime: coroutines under a seeded scheduler, and the ordering operations by label.

Owns who runs next and what a dropped operation leaves out. A role is a generator: it yields before
every visible write and atomic, and yields (agent, word, expected) to sleep until a word reaches a
value. Nothing spins, so a launch in which nobody can run is a deadlock and is reported as such.

Neighbours: `memory` says what an operation orders, `operations` lists the labels, the roles call
both.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Generator, Iterable

from megamoe.emulator.errors import Deadlock, StepLimit
from megamoe.emulator.memory import GPU, SYS, Agent, Memory, Word
from megamoe.emulator.operations import OPERATIONS
from megamoe.faults import describe_wait

Role = Generator


class Task:
    """One coroutine; `blocked` is (agent, word, expected) while it sleeps."""

    __slots__ = ("steps", "blocked", "priority")

    def __init__(self, steps: Role):
        self.steps, self.blocked, self.priority = steps, None, 0.0


class Runtime:
    """Runs tasks to the end; every ordering operation of a role goes through here."""

    def __init__(self, memory: Memory, dropped: Iterable[str] = ()):
        self.memory = memory
        self.dropped = frozenset(dropped)
        unknown = self.dropped - OPERATIONS.keys()
        if unknown:
            raise ValueError(
                f"drop={sorted(unknown)} names no operation; see megamoe.emulator.OPERATIONS"
            )
        self.max_steps = 20_000_000
        self.random = random.Random(0)
        self._by_priority = False
        self._ready: list = []
        self._tasks: set[Task] = set()

    # Scheduling

    def start(self, seed: int) -> None:
        """Forget all tasks and choose, by seed, how tasks and store buffers behave."""
        self.random = random.Random(seed)
        self._by_priority = self.random.random() < 0.5
        self.memory.random = self.random
        self.memory.eager = self.random.choice((0.0, 0.5, 1.0))
        self._ready, self._tasks = [], set()

    def spawn(self, steps: Role) -> None:
        task = Task(steps)
        task.priority = self.random.random()
        self._tasks.add(task)
        self._push(task)

    def _push(self, task: Task) -> None:
        if self._by_priority:
            heapq.heappush(self._ready, (task.priority, self.random.random(), task))
        else:
            self._ready.append(task)

    def _pop(self) -> Task:
        """A random task, or the first by priority, where priorities change now and then."""
        ready = self._ready
        if self._by_priority:
            task = heapq.heappop(ready)[2]
            if self.random.random() < 0.02:
                task.priority = self.random.random()
            return task
        chosen = int(self.random.random() * len(ready))
        ready[chosen], ready[-1] = ready[-1], ready[chosen]
        return ready.pop()

    def run(self) -> None:
        """Run until every task has ended."""
        steps = 0
        while self._tasks:
            if not self._ready:
                raise Deadlock(self.waits())
            steps += 1
            if steps > self.max_steps:
                raise StepLimit(f"no end after {self.max_steps} steps")
            task = self._pop()
            try:
                task.blocked = next(task.steps)
            except StopIteration:
                self._tasks.remove(task)
                continue
            if task.blocked is None:
                self._push(task)
            else:
                task.blocked[1].waiters.append(task)

    def waits(self) -> list[str]:
        """Every wait that is not satisfied, one line each; those on workspace regions first."""
        lines = []
        for task in self._tasks:
            if task.blocked is None:
                continue
            agent, word, expected = task.blocked
            wait = agent.rank, agent.role, word.region, word.index, expected, word.value
            cta = f" (CTA {agent.cta})" if agent.cta >= 0 else ""
            lines.append((word.region.startswith("shared."), describe_wait(*wait) + cta))
        return [line for _, line in sorted(lines)]

    def _wake(self, word: Word) -> None:
        value, sleeping = word.value, []
        for task in word.waiters:
            if value >= task.blocked[2]:
                task.blocked = None
                self._push(task)
            else:
                sleeping.append(task)
        word.waiters = sleeping

    # Operations

    def live(self, label: str) -> bool:
        """True unless the operation is dropped."""
        assert label in OPERATIONS, label
        return label not in self.dropped

    def scope(self, label: str, scope: str) -> str:
        """The scope of an operation, gpu if its sys scope is dropped."""
        return GPU if scope == SYS and not self.live(f"{label}.sys") else scope

    def fence(self, agent: Agent, label: str) -> None:
        """fence.acq_rel.sys"""
        if self.live(label):
            self.memory.fence(agent, self.scope(label, SYS))

    def proxy_fence(self, agent: Agent, label: str, writers: Iterable[Agent] = ()) -> None:
        """fence.proxy.async, also for what `writers` have handed over"""
        if self.live(label):
            self.memory.proxy_fence(agent, writers)

    def wait(
        self,
        agent: Agent,
        word: Word,
        expected: int,
        label: str,
        scope: str = GPU,
        also: Iterable[Agent] = (),
    ):
        """Sleep until the word reaches `expected`, then acquire; `also`: lanes that wait too."""
        yield
        if not self.live(label):
            return
        scope = self.scope(label, scope)
        while word.value < expected:
            yield agent, word, expected
        for waiter in (agent, *also):
            word.touch(waiter, word.polls, "wait on")
            if self.live(f"{label}.acquire"):
                self.memory.acquire(waiter, word, scope)
            else:
                self.memory.relaxed(waiter, word, scope, reads=True, writes=False)

    def add(
        self, agent: Agent, word: Word, label: str, amount: int = 1,
        scope: str = GPU, release: bool = False, acquire: bool = False,
    ):  # fmt: skip
        """Atomic add; returns the old value."""
        yield
        old = word.value
        if not self.live(label):
            return old
        scope = self.scope(label, scope)
        word.touch(agent, word.atomics, "atomic on")
        acquire = acquire and self.live(f"{label}.acquire")
        release = release and self.live(f"{label}.release")
        self.memory.relaxed(agent, word, scope, reads=not acquire, writes=not release)
        if not release and agent.fenced is not None:  # the fence before it orders the atomic too
            word.atomics[agent.index] = int(agent.fenced[agent.index])
        if acquire:
            self.memory.acquire(agent, word, scope)
        old = word.value
        word.apply(old + amount)
        if release:
            self.memory.release(agent, word, scope)
        self._wake(word)
        return old

    def bump(self, word: Word) -> None:
        """Count something that is no operation of the protocol (a coroutine ended)."""
        word.apply(word.value + 1)
        self._wake(word)

    def hand_over(self, agents: list[Agent], label: str) -> None:
        """CTA barrier or warp sync."""
        if self.live(label):
            self.memory.hand_over(agents)

    def wait_bulk(self, agent: Agent, in_flight: int, label: str) -> int:
        """Wait until at most `in_flight` bulk stores are left; returns how many have completed."""
        done = max(0, len(agent.bulk) - in_flight)
        if self.live(label):
            for data, *copy in agent.bulk[:done]:
                data.complete(agent, *copy)
            del agent.bulk[:done]
        return done
