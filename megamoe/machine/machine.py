"""The machine: streams of launches, CTAs, warps of 32 lanes, and who runs when.

A rank has a stream; its launches run one after the other, those of different ranks side by side. In
a round every warp that can run executes up to `budget` instructions, so time, which is counted in
instructions, is that of warps side by side. An engine executes instructions; where it stops at a
service, the machine performs it.

Policies of what is asynchronous: "eager", copies at once; "late", copies some rounds later;
"tardy", tensor cores and bulk stores read at their waits; "random", any of it. A seed other than 0
also shuffles warps and cuts their turns.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megamoe.machine import barriers, copies, report, tensorcores
from megamoe.machine.barriers import LEFT, NEXT, PAUSE
from megamoe.machine.core import ENDED, FAULT, FAULTS, POLLED, RAN, SERVICE, WarpState, World
from megamoe.machine.decode import PARAM_BASE, SHARED_BASE, Code, Operand
from megamoe.machine.faults import Deadlock, Fault, StepLimit
from megamoe.machine.memory import Memory, Segment

POLICIES = ("eager", "late", "tardy", "random")
ALL = 0xFFFFFFFF
KINDS = {"e4m3": 0, "bf16": 1}
#: What the clock jumps by when everybody only waits: more than any timeout.
PATIENCE = 10**14
#: Rounds in which nothing happens before that is a deadlock: a wait looks at the clock now and then.
IDLE_ROUNDS = 400


class Launch:
    """One grid. `parameters`: the bytes that the kernel finds as its parameters."""

    def __init__(self, code: Code, grid: int, parameters: bytes, rank: int, dynamic_shared: int):
        self.code, self.grid, self.rank, self.parameters = code, grid, rank, parameters
        self.shared_end = SHARED_BASE + code.shared_bytes + dynamic_shared
        self.maps = {
            offset: copies.TensorMap(parameters[offset : offset + size])
            for offset, size in code.entry.params.values()
            if size == 128
        }
        self.ctas: list[CTA] = []
        self.number = 0  # in its stream
        self.running = self.early = grid  # CTAs that have not ended, or let dependents start
        self.waiting: list[Warp] = []  # of the launch behind it


class CTA:
    def __init__(self, launch: Launch, index: int):
        self.launch, self.index, self.rank = launch, index, launch.rank
        raw = np.full(launch.shared_end + 1024, 0xCB, np.uint8)
        self.shared = raw[-raw.ctypes.data % 1024 :][: launch.shared_end + 15 & ~15]
        self.barriers: dict[int, barriers.Barrier] = {}
        self.meetings: dict[int, barriers.Meeting] = {}
        self.parameters = np.frombuffer(launch.parameters + bytes(8), np.uint8)
        self.warps: list[Warp] = []
        self.early = False

    def __str__(self) -> str:
        return f"rank {self.rank}, CTA {self.index}"


class Warp:
    def __init__(self, machine: Machine, cta: CTA, index: int):
        self.machine, self.cta, self.index = machine, cta, index
        code = self.code = cta.launch.code
        self.blocked = None  # what it waits for
        self.done = False
        self.bulk: list[list[Callable]] = [[]]  # groups of bulk stores; the last is open
        self.mma: list[list[Callable]] = [[]]
        self.late_products = 0
        self.wrote = False
        self.rows = np.full((code.num_rows, 32), 0xDEADBEEF, np.uint32)
        self.predicates = np.zeros(code.num_predicates, np.uint32)
        self.predicates[1] = ALL
        lanes = np.arange(32)
        threads = code.entry.threads
        special = {
            "%tid.x": 32 * index + lanes, "%ctaid.x": cta.index, "%nctaid.x": cta.launch.grid,
            "%ntid.x": threads, "%laneid": lanes, "%warpid": index,
        }  # fmt: skip
        for name, value in special.items():
            self.rows[code.special[name]] = value
        self._flat, self._wide = self.rows.reshape(-1), self.rows.reshape(-1).view(np.uint64)
        self._pool = code.constants.reshape(-1)
        pointers = {
            "code": code.instructions, "extra": code.extra, "constants": code.constants,
            "rows": self.rows, "predicates": self.predicates, "shared": cta.shared,
            "parameters": cta.parameters,
        }  # fmt: skip
        self.s = WarpState(
            world=ctypes.pointer(machine.world), rank=cta.rank, rejoin=-1, mask=ALL,
            shared_end=cta.launch.shared_end,
            **{name: array.ctypes.data for name, array in pointers.items()},
        )  # fmt: skip
        self.reference = ctypes.byref(self.s)

    def __str__(self) -> str:
        role = self.machine.names.role(self.index)
        return f"{self.cta}, warp {self.index}" + (f" ({role})" if role else "")

    @property
    def instr(self):
        return self.code.origin[min(self.s.pc, len(self.code.origin) - 1)]

    @property
    def first(self) -> int:
        """The first active lane."""
        active = self.s.active
        return (active & -active).bit_length() - 1

    def lanes(self) -> list[int]:
        active = self.s.active
        return [lane for lane in range(32) if active >> lane & 1]

    def value(self, operand: Operand, lane: int) -> int:
        row = operand.row
        if row >= 0:
            return int(self._wide[16 * row + lane] if operand.bits == 64 else self._flat[32 * row + lane])
        return int(self._pool[32 * (-1 - row) + lane])

    def signed(self, operand: Operand, lane: int) -> int:
        value = self.value(operand, lane)
        return value - (1 << 32) if value >> 31 else value

    def predicate(self, number: int, lane: int) -> int:
        return int(self.predicates[number]) >> lane & 1

    def set_predicate(self, number: int, value: bool) -> None:
        active = self.s.active
        self.predicates[number] = int(self.predicates[number]) & ~active | (active if value else 0)

    def advance(self) -> None:
        self.machine.engine.advance(self.reference)

    def crosses(self, segment: Segment, num_bytes: int) -> None:
        if segment.rank >= 0 and segment.rank != self.cta.rank:
            self.s.remote += num_bytes


class Machine:
    """`engine`: what executes instructions. `roles`: names of a CTA's warps. `patient`: a launch in
    which everybody waits goes on at a later time, so that its own timeouts end it.
    """

    def __init__(
        self,
        engine,
        policy: str = "eager",
        seed: int = 0,
        roles: Sequence[str] = (),
        patient: bool = False,
        max_steps: int = 0,
        budget: int = 1000,
    ):
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not one of {POLICIES}")
        self.engine, self.policy, self.seed, self.budget = engine, policy, seed, budget
        self.patient, self.max_steps = patient, max_steps
        self.random = random.Random(seed)
        self.memory, self.names, self.world = Memory(), report.Names(roles), World()
        self.order = None
        self.streams: dict[int, deque] = {}
        self.current: dict[int, Launch] = {}
        self.delay = 8  # rounds that a late copy takes
        self.steps = self.rounds = self.remote_bytes = 0
        self._ready: list[Warp] = []
        self._flight: list[tuple[int, Callable]] = []
        self._idle = 0

    # What is to be done

    def launch(
        self, code: Code, grid: int, parameters: bytes, dynamic_shared: int = 0, rank: int = 0
    ) -> Launch:
        """Append a launch to the stream of a rank."""
        launch = Launch(code, grid, parameters, rank, dynamic_shared)
        self.streams.setdefault(rank, deque()).append(launch)
        return launch

    def call(self, function: Callable[[], None], rank: int = 0) -> None:
        """Append what the host does to a stream: after the launches before it."""
        self.streams.setdefault(rank, deque()).append(function)

    # Policies

    def stores_read_late(self) -> bool:
        return self.policy in ("late", "tardy") or (self.policy == "random" and self.random.random() < 0.5)

    def multiplies_late(self) -> bool:
        return self.policy == "tardy" or (self.policy == "random" and self.random.random() < 0.5)

    def start_copy(self, cta: CTA, action: Callable[[], None]) -> None:
        """Perform an asynchronous load, now or later."""
        if self.policy in ("eager", "tardy"):
            action()
        else:
            late = self.delay if self.policy == "late" else self.random.randrange(self.delay)
            self._flight.append((self.rounds + late, action))

    def multiply(self, warp, sums, left, a, b, columns, keep, kind, first) -> None:
        rows = (ctypes.c_int32 * len(sums))(*sums)
        left = (ctypes.c_int32 * len(left))(*left) if left else None
        self.engine.multiply(warp.reference, rows, left, a, b, columns, keep, KINDS[kind], first)

    # Running

    def run(self) -> None:
        """Run every stream to its end; raises a `MachineError` if it does not come to one."""
        table, count = self.memory.table()
        self.world.segments, self.world.num_segments = table, count
        for rank in self.streams:
            self._next(rank)
        while self._ready or self._flight or self.current:
            self._round()

    def _next(self, rank: int, behind: Launch | None = None) -> None:
        """Start the next launch of a rank, whose stream is empty but for `behind`."""
        stream = self.streams[rank]
        while stream and not isinstance(stream[0], Launch):
            if behind:
                return
            stream.popleft()()
        if not stream:
            return
        launch = stream.popleft()
        launch.behind = behind
        self.current[rank] = launch
        for index in range(launch.grid):
            cta = CTA(launch, index)
            threads = launch.code.entry.threads
            cta.warps = [Warp(self, cta, number) for number in range(threads // 32)]
            launch.ctas.append(cta)
            self._ready += cta.warps

    def _round(self) -> None:
        self.rounds += 1
        ready, self._ready = self._ready, []
        if self.seed:
            self.random.shuffle(ready)
        longest, busy = 0, False
        for warp in ready:
            ran, idle = self._turn(warp)
            longest = max(longest, ran)
            busy |= not idle
            if not warp.done and warp.blocked is None:
                self._ready.append(warp)
        self.world.time += longest
        busy |= self._land(everything=not busy)
        if self.max_steps and self.steps > self.max_steps:
            raise StepLimit(f"no end after {self.max_steps} instructions\n{report.waits(self)}")
        self._idle = 0 if busy else self._idle + 1
        if self._idle == 2 and self.patient:
            self.world.time += PATIENCE
        elif self._idle == 2 or self._idle > IDLE_ROUNDS:
            raise Deadlock("nobody can go on:\n" + report.waits(self))

    def _land(self, everything: bool) -> bool:
        """Perform copies whose time has come; True if there were any."""
        due = [item for item in self._flight if everything or item[0] <= self.rounds]
        if due:
            self._flight = [item for item in self._flight if item not in due]
            for _, action in due:
                action()
        return bool(due)

    def _turn(self, warp: Warp) -> tuple[int, bool]:
        """Let a warp execute: (instructions, whether it did nothing but wait)."""
        budget = self.random.randint(self.budget // 10, self.budget) if self.seed else self.budget
        state, run, begin = warp.s, self.engine.run, warp.s.count
        end, warp.wrote = begin + budget, False
        while True:
            status = run(warp.reference, end - state.count)
            if status == SERVICE:
                status = self.perform(warp)
                if status == NEXT:
                    self.engine.advance(warp.reference)
                    state.count += 1
                    continue
                if status == LEFT and warp.blocked is None:
                    continue
                if status == PAUSE:
                    self.engine.advance(warp.reference)
                idle = status == PAUSE and not warp.wrote
                break
            if status == FAULT:
                raise Fault(self._fault(warp))
            if status == ENDED:
                self._end(warp)
            idle = status == POLLED and not warp.wrote
            break
        ran = state.count - begin
        self.steps += ran
        return ran, idle

    def _fault(self, warp: Warp) -> str:
        code, instr = warp.s.fault, warp.instr
        shared = ".shared" in instr.op
        place = f"shared {warp.s.address}" if shared else self.memory.describe(warp.s.address)
        address = f" at {place}" if code <= 2 else ""
        return f"{warp}: {report.where(instr)}: {FAULTS[code]}{address}"

    def perform(self, warp: Warp) -> int:
        """A service: NEXT, go on behind it; STAY, blocked at it; LEFT, behind it already; PAUSE, go
        on in the next round.
        """
        service = warp.code.services[int(warp.code.instructions["x"][warp.s.pc])]
        name = service.name
        if name not in ("nanosleep",) and service.words[1:2] not in (["try_wait"], ["test_wait"]):
            warp.wrote, warp.s.num_polls = True, 0
        return SERVICES[name](self, warp, service)

    def wake(self, warp: Warp) -> None:
        warp.blocked = None
        self._ready.append(warp)

    def _end(self, warp: Warp) -> None:
        warp.done = True
        cta, launch = warp.cta, warp.cta.launch
        self.remote_bytes += warp.s.remote
        if any(warp.bulk) or any(warp.mma):
            raise Fault(f"{warp} ended before its bulk stores or products")
        if all(other.done for other in cta.warps):
            for barrier in cta.barriers.values():
                if barrier.bytes:
                    raise Fault(f"{cta} ended while copies come in at {barrier}")
            launch.running -= 1
            self.let_dependents_start(cta)
            if launch.running == 0:
                self._ended(launch)

    def let_dependents_start(self, cta: CTA) -> None:
        launch = cta.launch
        if not cta.early:
            cta.early = True
            launch.early -= 1
            if launch.early == 0 and launch.running and self.current.get(launch.rank) is launch:
                self._next(launch.rank, launch)

    def _ended(self, launch: Launch) -> None:
        for warp in launch.waiting:
            self.wake(warp)
        launch.waiting.clear()
        if self.current.get(launch.rank) is launch:
            del self.current[launch.rank]
            self._next(launch.rank)

    def running(self) -> list[CTA]:
        launches = list(self.current.values())
        launches += [launch.behind for launch in launches if launch.behind and launch.behind.running]
        return [cta for launch in launches for cta in launch.ctas]

    def watching(self, warp: Warp) -> str:
        """What a warp that is not blocked looks at."""
        address = warp.s.address
        if not warp.s.num_polls or not any(s.base <= address < s.end for s in self.memory.segments):
            return ""
        value = int(self.memory.at(address & ~3, 4).view(np.int32)[0])
        return f"polls {self.memory.describe(address)}, which is {value}"


def nanosleep(machine: Machine, warp: Warp, service) -> int:
    return PAUSE


def dependents(machine: Machine, warp: Warp, service) -> int:
    """griddepcontrol: wait for the launch before this one, or let the one behind it start."""
    launch = warp.cta.launch
    if service.words[1] == "launch_dependents":
        machine.let_dependents_start(warp.cta)
    elif launch.behind and launch.behind.running:
        launch.behind.waiting.append(warp)
        warp.blocked = "the launch before"
        return barriers.STAY
    return NEXT


def fence(machine: Machine, warp: Warp, service) -> int:
    if machine.order:
        machine.order.fence(warp, service)
    return NEXT


SERVICES = {
    "nanosleep": nanosleep, "griddepcontrol": dependents, "fence.proxy.async": fence,
    "fence.acq_rel": fence, "bar.warp.sync": barriers.of_warp, "bar.sync": barriers.named,
    "bar.arrive": barriers.named, "mbarrier": barriers.mbarrier, "cp.async.bulk": copies.bulk,
    "wgmma": tensorcores.wgmma,
}  # fmt: skip
