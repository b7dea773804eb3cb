"""The reference: the same code executed by numpy, one instruction of a warp at a time.

It says what an instruction does as plainly as possible: copies are performed at their issue, and
nobody follows the order of accesses. The tests execute real kernels on it and on the C core side by
side; without a C compiler it runs launches by itself, slowly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megamoe.machine.alu import DTYPES, OPERATIONS
from megamoe.machine.decode import (
    CORE,
    KINDS,
    NEGATED,
    NOBODY,
    PARAM_BASE,
    SHARED,
    SHARED_BASE,
    SPECIAL,
    Code,
)  # fmt: skip
from megamoe.machine.faults import Deadlock, Fault
from megamoe.machine.sums import add
from megamoe.machine.tensormap import TensorMap

ALL = 0xFFFFFFFF
LANES = np.arange(32)
RAN, BLOCKED, ENDED = "ran", "blocked", "ended"
_BYTE = np.arange(128)
E4M3 = np.where(
    _BYTE < 8, _BYTE * 2.0**-9, (8 + _BYTE % 8) * 2.0 ** (_BYTE // 8 - 10)
).astype(np.float32)  # fmt: skip
E4M3[127] = np.nan
E4M3 = np.concatenate([E4M3, -E4M3])


@dataclass
class Barrier:
    count: int
    pending: int
    bytes: int = 0
    flips: int = 0

    def settle(self) -> None:
        if self.pending < 0:
            raise Fault("too many arrivals at an mbarrier")
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.flips = self.count, self.flips + 1


@dataclass(eq=False)
class Cta:
    rank: int
    index: int
    grid: int
    parameters: bytes
    shared: np.ndarray
    maps: dict[int, TensorMap]
    barriers: dict[int, Barrier] = field(default_factory=dict)
    meetings: dict = field(default_factory=lambda: defaultdict(list))  # number -> arrivals


class Warp:
    def __init__(self, machine: Reference, cta: Cta, code: Code, index: int):
        self.machine, self.cta, self.code, self.index = machine, cta, code, index
        self.instructions = code.instructions.tolist()
        self.rows = np.zeros((code.num_rows, 32), np.uint32)
        self.predicates = [0, ALL] + [0] * (code.num_predicates - 2)
        special: tuple[np.ndarray | int, ...] = (
            32 * index + LANES, cta.index, cta.grid, code.entry.threads, LANES, index,
        )  # fmt: skip
        for row, value in zip((code.rows[name] for name in SPECIAL), special, strict=True):
            self.rows[row] = value
        self.pc, self.rejoin, self.mask = 0, -1, ALL
        self.stack: list[tuple[int, int, int]] = []
        self.timed_out = False
        self.waits: Any = None  # (barrier, parity), or the list of a named barrier
        self.ended = False
        self.pending: list = []

    # Registers

    def row(self, number: int) -> np.ndarray:
        return self.rows[number] if number >= 0 else self.code.constants[-1 - number]

    def wide(self, number: int) -> np.ndarray:
        if number >= 0:
            return self.rows[number : number + 2].reshape(-1).view(np.uint64)
        return self.code.constants[-1 - number :][:2].reshape(-1).view(np.uint64)

    def read(self, kind: str, number: int) -> Any:
        if kind == "number":
            return number
        dtype = DTYPES[kind]
        if kind == "pred":
            return lanes_of(self.predicates[number])
        if np.dtype(dtype).itemsize == 8:
            return self.wide(number).view(dtype)
        row = self.row(number)
        return row.view(dtype) if np.dtype(dtype).itemsize == 4 else row.astype(dtype)

    def write(self, kind: str, number: int, value, active: int) -> None:
        if kind == "pred":
            bits = mask_of(np.broadcast_to(np.asarray(value, bool), 32))
            self.predicates[number] = self.predicates[number] & ~active | bits & active
            return
        dtype = np.dtype(DTYPES[kind])
        value = np.broadcast_to(np.asarray(value).astype(dtype), 32)
        if dtype.itemsize == 8:
            target, value = self.wide(number), value.view(np.uint64)
        elif dtype.itemsize == 4:
            target, value = self.rows[number], value.view(np.uint32)
        else:
            target, value = self.rows[number], value.astype(np.uint32) & (256**dtype.itemsize - 1)
        chosen = lanes_of(active)
        target[chosen] = value[chosen]

    def value(self, number: int, lane: int, wide: bool = False) -> int:
        return int((self.wide(number) if wide else self.row(number))[lane])

    def place(self, row: int, wide: int, offset: int, lane: int) -> int:
        return (self.value(row, lane, bool(wide)) + offset) % (1 << (64 if wide else 32))

    # Control

    def go(self, pc: int) -> None:
        while pc == self.rejoin:
            pc, self.mask, self.rejoin = self.stack.pop()
        self.pc = pc

    def branch(self, taken: int, target: int, join: int) -> None:
        stay, following = self.mask & ~taken, self.pc + 1
        if not stay or not taken:
            return self.go(target if taken else following)
        if join != self.rejoin:
            self.stack.append((join, self.mask, self.rejoin))
            self.rejoin = join
        if target == join:
            self.mask = stay
            return self.go(following)
        if following != join:
            self.stack.append((following, stay, join))
        self.mask = taken
        self.go(target)

    def step(self) -> str:
        """Execute one instruction."""
        op, flags, guard, d, a, b, c, n, x = self.instructions[self.pc]
        active = self.mask
        if guard >= 0:
            active &= self.predicates[guard] ^ (ALL if flags & NEGATED else 0)
        if op < len(OPERATIONS):
            operation = OPERATIONS[op]
            if active:
                given = zip(operation.ins, (a, b, c, n), strict=False)
                operands = [self.read(kind, number) for kind, number in given]
                self.write(operation.out, d, operation.compute(*operands), active)
            self.go(self.pc + 1)
            return RAN
        name = CORE[op - len(OPERATIONS)]
        if name == "bra":
            self.go(x) if guard < 0 else self.branch(active, x, n)
            return RAN
        if active:
            if name == "ret":
                self.ended = True
                return ENDED
            method = getattr(self, f"do_{name}", None)
            lanes = [lane for lane in range(32) if active >> lane & 1]
            if method and method(active, lanes, d, a, b, c, n, x) == BLOCKED:
                return BLOCKED
        self.go(self.pc + 1)
        return RAN

    def do_param(self, active, lanes, d, a, b, c, n, x):
        value = int.from_bytes(self.cta.parameters[n : n + (8 if x else 4)], "little")
        self.write("u64" if x else "u32", d, np.full(32, value, np.uint64), active)

    def do_timer(self, active, lanes, d, a, b, c, n, x):
        self.write("u64", d, np.uint64(self.machine.time), active)

    def _shuffle(self, mode, active, d, a, b, c, n):
        packed, distance = int(self.row(c)[0]), self.row(b).view(np.int32)
        segment, clamp = packed >> 8 & 31, packed & 31
        low = LANES & segment
        top = low | clamp & ~segment
        if mode == "idx":
            source = low | distance & 31 & ~segment
        elif mode == "bfly":
            source = LANES ^ distance
        else:
            source = LANES + (distance if mode == "down" else -distance)
        good = source >= top if mode == "up" else source <= top
        self.write("u32", d, self.row(a)[np.where(good, source & 31, LANES)], active)
        if n >= 0:
            self.write("pred", n, good, active)

    def do_shfl_idx(self, active, lanes, d, a, b, c, n, x):
        self._shuffle("idx", active, d, a, b, c, n)

    def do_shfl_up(self, active, lanes, d, a, b, c, n, x):
        self._shuffle("up", active, d, a, b, c, n)

    def do_shfl_down(self, active, lanes, d, a, b, c, n, x):
        self._shuffle("down", active, d, a, b, c, n)

    def do_shfl_bfly(self, active, lanes, d, a, b, c, n, x):
        self._shuffle("bfly", active, d, a, b, c, n)

    def do_vote_ballot(self, active, lanes, d, a, b, c, n, x):
        self.write("u32", d, np.uint32(self.predicates[a] & active), active)

    def do_vote_any(self, active, lanes, d, a, b, c, n, x):
        self.write("pred", d, self.predicates[a] & active != 0, active)

    def do_vote_all(self, active, lanes, d, a, b, c, n, x):
        self.write("pred", d, self.predicates[a] & active == active, active)

    def _redux(self, kind, reduced, active, lanes, d, a):
        self.write(
            "u32", d, np.uint32(reduced(self.row(a).view(kind)[lanes]).view(np.uint32)), active
        )

    def do_redux_max_s(self, active, lanes, d, a, b, c, n, x):
        self._redux(np.int32, np.max, active, lanes, d, a)

    def do_redux_min_s(self, active, lanes, d, a, b, c, n, x):
        self._redux(np.int32, np.min, active, lanes, d, a)

    def do_redux_max_u(self, active, lanes, d, a, b, c, n, x):
        self._redux(np.uint32, np.max, active, lanes, d, a)

    def do_redux_min_u(self, active, lanes, d, a, b, c, n, x):
        self._redux(np.uint32, np.min, active, lanes, d, a)

    def do_elect(self, active, lanes, d, a, b, c, n, x):
        if d >= 0:
            self.write("u32", d, np.uint32(lanes[0]), active)
        self.write("pred", n, lanes[0] == LANES, active)

    # Memory

    def load(self, space: int, address: int, size: int) -> bytes:
        if address % size:
            raise Fault(f"misaligned access to {address:#x}")
        if space == SHARED:
            return bytes(self.cta.shared[address : address + size])
        return bytes(self.machine.memory.at(address, size))

    def store(self, space: int, address: int, data: bytes) -> None:
        if address % len(data) and len(data) <= 16:
            raise Fault(f"misaligned access to {address:#x}")
        if space == SHARED:
            self.cta.shared[address : address + len(data)] = np.frombuffer(data, np.uint8)
        else:
            self.machine.store(address, data)

    def do_ld(self, active, lanes, d, a, b, c, n, x):
        space, size, count, signed, wide, *rows = self.code.extra[x : x + 9].tolist()
        for lane in lanes:
            data = self.load(space, self.place(a, b, n, lane), size * count)
            for part in range(count):
                item = data[part * size : (part + 1) * size]
                value = int.from_bytes(item, "little", signed=bool(signed))
                target = self.wide(rows[part]) if wide else self.rows[rows[part]]
                target[lane] = value % (1 << (64 if wide else 32))

    def do_st(self, active, lanes, d, a, b, c, n, x):
        space, size, count, _, wide, *rows = self.code.extra[x : x + 9].tolist()
        for lane in lanes:
            values = [self.value(row, lane, bool(wide)) for row in rows[:count]]
            data = b"".join((v % 256**size).to_bytes(size, "little") for v in values)
            self.store(space, self.place(a, b, n, lane), data)

    def do_atom(self, active, lanes, d, a, b, c, n, x):
        space, size, kind, second, _ = self.code.extra[x : x + 5].tolist()
        for lane in lanes:
            address, wide = self.place(a, b, n, lane), size == 8
            data = self.load(space, address, size)
            old, signed = (int.from_bytes(data, "little", signed=s) for s in (False, True))
            one, two = self.value(c, lane, wide), self.value(second, lane, wide)
            one_signed = one - (one >> (8 * size - 1) << 8 * size)
            new = (
                old + one, one, two if old == one else old, old & one, old | one, old ^ one,
                min(old, one), max(old, one), min(signed, one_signed), max(signed, one_signed),
            )[kind]  # fmt: skip
            self.store(space, address, (new % 256**size).to_bytes(size, "little"))
            if d >= 0:
                (self.wide(d) if wide else self.rows[d])[lane] = old

    def _matrices(self, a, b, n, x) -> Iterator[tuple[np.ndarray, int]]:
        """(a row of eight as the lanes hold it, its address)"""
        count, transposed = self.code.extra[x : x + 2].tolist()
        places = [self.place(a, b, n, lane) for lane in range(8 * count)]
        for matrix, row in enumerate(self.code.extra[x + 2 : x + 2 + count].tolist()):
            items = self.rows[row].view(np.uint16).reshape(8, 8)
            yield from zip(items.T if transposed else items, places[8 * matrix :], strict=False)

    def do_stmatrix(self, active, lanes, d, a, b, c, n, x):
        for line, place in self._matrices(a, b, n, x):
            self.store(SHARED, place, line.tobytes())

    def do_ldmatrix(self, active, lanes, d, a, b, c, n, x):
        for line, place in self._matrices(a, b, n, x):
            line[:] = np.frombuffer(self.load(SHARED, place, 16), np.uint16)

    # Barriers, copies, tensor cores

    def do_mbarrier_init(self, active, lanes, d, a, b, c, n, x):
        for lane in lanes:
            count = self.value(c, lane)
            self.cta.barriers[self.place(a, b, n, lane)] = Barrier(count, count)

    def _arrive(self, lanes, a, b, n, c, expects):
        for lane in lanes:
            barrier, amount = self.cta.barriers[self.place(a, b, n, lane)], self.value(c, lane)
            barrier.bytes += amount * expects
            barrier.pending -= 1 if expects else amount
            barrier.settle()

    def do_mbarrier_arrive(self, active, lanes, d, a, b, c, n, x):
        self._arrive(lanes, a, b, n, c, False)

    def do_mbarrier_expect(self, active, lanes, d, a, b, c, n, x):
        self._arrive(lanes, a, b, n, c, True)

    def do_mbarrier_try(self, active, lanes, d, a, b, c, n, x):
        barrier = self.cta.barriers[self.place(a, b, n, lanes[0])]
        passed = barrier.flips % 2 != self.value(c, lanes[0])
        if not passed and not self.timed_out:
            return BLOCKED
        self.timed_out = False
        self.write("pred", d, passed, active)

    def do_mbarrier_test(self, active, lanes, d, a, b, c, n, x):
        barrier = self.cta.barriers[self.place(a, b, n, lanes[0])]
        self.write("pred", d, barrier.flips % 2 != self.value(c, lanes[0]), active)

    def do_bar_sync(self, active, lanes, d, a, b, c, n, x):
        if self.waits is None:
            self._come(n, x)
        if self.waits[0] < (x or self.code.entry.threads):
            return BLOCKED
        self.waits = None

    def do_bar_arrive(self, active, lanes, d, a, b, c, n, x):
        self._come(n, x)
        self.waits = None

    def _come(self, number: int, threads: int) -> None:
        """A meeting is [threads that have come]."""
        meetings = self.cta.meetings[number]
        if not meetings or meetings[-1][0] == (threads or self.code.entry.threads):
            meetings.append([0])
        self.waits = meetings[-1]
        self.waits[0] += 32

    def _complete(self, lane: int, row: int, wide: int, offset: int, num_bytes: int) -> None:
        barrier = self.cta.barriers[self.place(row, wide, offset, lane)]
        barrier.bytes -= num_bytes
        barrier.settle()

    def do_load_bulk(self, active, lanes, d, a, b, c, n, x):
        begin, far, shift, size, row, wide, offset = self.code.extra[x : x + 7].tolist()
        for lane in lanes:
            num_bytes = self.value(size, lane)
            source = self.place(begin, far, shift, lane)
            data = self.machine.memory.at(source, num_bytes).tobytes()
            self.store(SHARED, self.place(a, b, n, lane), data)
            self._complete(lane, row, wide, offset, num_bytes)

    def do_store_bulk(self, active, lanes, d, a, b, c, n, x):
        row, wide, offset, size = self.code.extra[x : x + 4].tolist()
        for lane in lanes:
            start = self.place(row, wide, offset, lane)
            data = self.cta.shared[start : start + self.value(size, lane)].tobytes()
            self.store(0, self.place(a, b, n, lane), data)

    def do_load_tensor(self, active, lanes, d, a, b, c, n, x):
        (lane,) = lanes
        row, rank = self.code.extra[x : x + 2].tolist()
        *at, row_b, wide_b, offset_b = self.code.extra[x + 2 : x + 5 + rank].tolist()
        tensor_map = self.cta.maps[self.value(row, lane, True) - PARAM_BASE]
        coordinates = [int(self.row(r).view(np.int32)[lane]) for r in at]
        box = tensor_map.box_of(self.machine.memory, coordinates)
        place = self.place(a, b, n, lane) + np.arange(len(box) * 8) * 16
        place ^= (place >> 7 & 7) << 4
        self.cta.shared.reshape(-1, 16)[place >> 4] = box.reshape(-1, 16)
        self._complete(lane, row_b, wide_b, offset_b, box.size)

    def do_mma(self, active, lanes, d, a, b, c, n, x):
        kind, columns = self.code.extra[x : x + 2].tolist()
        sums = self.code.extra[x + 2 : x + 2 + columns // 2]
        name = next(name for name, number in KINDS.items() if number == kind)
        if a == NOBODY:
            left = self.rows[
                self.code.extra[x + 2 + columns // 2 :][:4]
            ]  # lane 4 r + q: word q of row r
            left = (
                left.reshape(2, 2, 8, 4).transpose(1, 2, 0, 3).reshape(16, 8).copy().view(np.uint8)
            )
        else:
            left = self._operand(self.value(a, 0, True), 16 * (self.index % 4), 16)
        right = self._operand(self.value(b, 0, True), 0, columns)
        register = np.arange(columns // 2)[:, None]
        at = (
            LANES // 4 + 8 * (register >> 1 & 1),
            8 * (register >> 2) + 2 * (LANES % 4) + (register & 1),
        )
        total = np.zeros((16, columns), np.float32)
        if self.predicates[c] & 1:
            total[at] = self.rows[sums].view(np.float32)
        total = add(name, values(left, name), values(right, name), total)
        self.rows[sums] = total[at].view(np.uint32)

    def _operand(self, descriptor: int, first: int, rows: int) -> np.ndarray:
        """Bytes of rows of a K-major operand with a 128-byte swizzle: [rows, 32]."""
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        row = first + np.arange(rows)[:, None]
        address = start + row // 8 * stride + row % 8 * 128 + np.arange(32)
        return self.cta.shared[address ^ (address >> 7 & 7) << 4]


def lanes_of(mask: int) -> np.ndarray:
    return (np.uint32(mask) >> LANES.astype(np.uint32) & 1).astype(bool)


def mask_of(lanes: np.ndarray) -> int:
    return int(np.packbits(lanes, bitorder="little").view(np.uint32)[0])


def values(stored: np.ndarray, kind: str) -> np.ndarray:
    """Of operand bytes [n, 32]."""
    if kind == "bf16":
        return (np.ascontiguousarray(stored).view(np.uint16).astype(np.uint32) << 16).view(
            np.float32
        )
    return E4M3[stored]


class Reference:
    """Launches on one memory. `stores`: called with what a warp stores to global memory, or None to
    store it.
    """

    def __init__(self, memory):
        self.memory, self.time, self.steps = memory, 0, 0
        self.warps: list[Warp] = []
        self.stores = None

    def launch(self, code: Code, grid: int, parameters: bytes, dynamic: int, rank: int) -> None:
        maps = {
            offset: TensorMap(parameters[offset : offset + size])
            for offset, size in code.entry.params.values()
            if size == 128
        }
        for index in range(grid):
            shared = np.full(SHARED_BASE + code.shared_bytes + dynamic + 15 & ~15, 0xCB, np.uint8)
            cta = Cta(rank, index, grid, parameters, shared, maps)
            self.warps += [Warp(self, cta, code, n) for n in range(code.entry.threads // 32)]

    def store(self, address: int, data: bytes) -> None:
        if self.stores:
            self.memory.find(address, len(data))
            self.stores(address, data)
        else:
            self.memory.at(address, len(data))[:] = np.frombuffer(data, np.uint8)

    def run(self, turn: int = 1000) -> None:
        """Run all launches to their end, side by side. Where nobody can go on, waits for mbarriers
        end without their phase, as they may at any time.
        """
        stuck: list[int] = []
        while any(not warp.ended for warp in self.warps):
            before, places = self.steps, [warp.pc for warp in self.warps]
            for warp in self.warps:
                for _ in range(0 if warp.ended else turn):
                    if warp.step() != RAN:
                        break
                    self.steps += 1
            self.time += turn
            if self.steps == before:
                if places == stuck:
                    raise Deadlock("nobody can go on")
                stuck = places
                for warp in self.warps:
                    warp.timed_out = True
