"""Barriers of a CTA: mbarriers in shared memory, named barriers, the barrier of a warp.

An mbarrier completes a phase when its arrivals and the bytes that it expects are in; who waits for
a phase sleeps until then, so nobody spins. Named barriers count threads by whole warps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megamoe.machine.faults import Fault

NEXT, STAY, LEFT, PAUSE = range(4)  # what a service returns: see `Machine.perform`


@dataclass(eq=False)
class Barrier:
    """An mbarrier. `phase`: the parity of the phase that is under way."""

    address: int
    name: str
    count: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    flips: int = 0
    waiting: list = field(default_factory=list)  # warps
    clocks: object = None  # of the order of accesses, if anybody follows it

    def __post_init__(self) -> None:
        self.pending = self.count

    def __str__(self) -> str:
        return (
            f"{self.name} (phase {self.flips}, {self.pending} of {self.count} arrivals and "
            f"{self.bytes} bytes missing)"
        )

    def arrive(self, machine, count: int, expected: int = 0) -> None:
        self.bytes += expected
        self.pending -= count
        self._check(machine)

    def complete(self, machine, num_bytes: int) -> None:
        self.bytes -= num_bytes
        self._check(machine)

    def _check(self, machine) -> None:
        if self.pending < 0:
            raise Fault(f"too many arrivals at mbarrier {self}")
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase ^= 1
            self.flips += 1
            if machine.order:
                machine.order.completed(self)
            for warp in self.waiting:
                machine.wake(warp)
            self.waiting.clear()


@dataclass(eq=False)
class Meeting:
    """A named barrier while some have come."""

    threads: int = 0
    waiting: list = field(default_factory=list)
    clock: object = None


def _named(warp, operand, offset: int, lane: int) -> Barrier:
    address = warp.value(operand, lane) + offset
    barrier = warp.cta.barriers.get(address)
    if barrier is None:
        raise Fault(f"{warp}: no mbarrier at shared {address}")
    return barrier


def mbarrier(machine, warp, service) -> int:
    (operand, offset), *rest = service.operands
    action = service.words[1]
    if action in ("try_wait", "test_wait"):
        return _wait(machine, warp, action, _named(warp, operand, offset, warp.first), *rest)
    for lane in warp.lanes():
        if action == "init":
            address = warp.value(operand, lane) + offset
            name = machine.names.barrier(warp.cta, service.instr)
            warp.cta.barriers[address] = Barrier(address, name, warp.value(rest[0], lane))
            continue
        barrier = _named(warp, operand, offset, lane)
        amount = warp.value(rest[0], lane)
        if machine.order:
            machine.order.arrive(warp, lane, barrier)
        if "expect_tx" in service.words:
            barrier.arrive(machine, 1, amount)
        else:
            barrier.arrive(machine, amount)
    if machine.order and action != "init":
        machine.order.tick(warp, warp.s.active)
    return NEXT


def _wait(machine, warp, action: str, barrier: Barrier, parity, predicate: int) -> int:
    passed = barrier.phase != warp.value(parity, warp.first)
    if not passed and action == "try_wait":
        warp.blocked = barrier
        barrier.waiting.append(warp)
        return STAY
    warp.set_predicate(predicate, passed)
    if passed and machine.order:
        machine.order.passed(warp, warp.s.active, barrier)
    return NEXT if passed else PAUSE


def named(machine, warp, service) -> int:
    """bar.sync and bar.arrive"""
    number, threads = service.operands
    threads = threads or warp.cta.launch.code.entry.threads
    waits = service.words[1] == "sync"
    if warp.s.active != 0xFFFFFFFF:
        raise Fault(f"{warp}: {service.instr.op} without all lanes")
    meeting = warp.cta.meetings.setdefault(number, Meeting())
    meeting.threads += 32
    if machine.order:
        machine.order.meet(warp, meeting)
    warp.advance()
    if meeting.threads > threads:
        raise Fault(f"{warp}: more than {threads} threads at barrier {number}")
    if waits:
        meeting.waiting.append(warp)
        warp.blocked = f"barrier {number}"
    if meeting.threads == threads:
        del warp.cta.meetings[number]
        for other in meeting.waiting:
            if machine.order:
                machine.order.met(other, meeting)
            if other is warp:
                warp.blocked = None
            else:
                machine.wake(other)
    return LEFT


def of_warp(machine, warp, service) -> int:
    """bar.warp.sync"""
    if warp.s.active != 0xFFFFFFFF:
        raise Fault(f"{warp}: {service.instr.op} without all lanes")
    if machine.order:
        machine.order.warp_sync(warp)
    return NEXT
