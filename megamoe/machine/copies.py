"""Asynchronous copies: bulk copies both ways, tensor maps and what they load.

A load runs at its issue or later, as the policy says, and completes on an mbarrier. A bulk store
belongs to a group of its warp and reads shared memory at its issue or at the wait for the group. A
tensor map must lie in one tensor whatever its coordinates; what it loads beyond its extents is
zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megamoe.machine.barriers import NEXT
from megamoe.machine.decode import PARAM_BASE
from megamoe.machine.faults import Fault

ITEM_BYTES = {0: 1, 10: 2}  # by type in a map: bytes, bfloat16
SWIZZLE_128 = 3


@dataclass
class TensorMap:
    """A tensor map as the host entry encodes it: 128 bytes. Innermost dimension first."""

    raw: bytes
    base: int = 0
    item: int = 0
    size: list[int] = field(default_factory=list)
    stride: list[int] = field(default_factory=list)  # bytes
    box: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        words = [int(word) for word in np.frombuffer(self.raw, np.uint32)]
        rank = (words[2] >> 4 & 7) + 1
        kind, swizzle = words[2] >> 7 & 15, words[2] >> 13 & 3
        if kind not in ITEM_BYTES or swizzle != SWIZZLE_128:
            raise Fault(f"a tensor map of type {kind} with swizzle {swizzle} is not modelled")
        self.base = words[0] | words[1] << 32
        self.item = ITEM_BYTES[kind]
        self.size = [words[8 + i] + 1 for i in range(rank)]
        self.stride = [self.item, *(words[3 + i] << 4 for i in range(rank - 1))]
        box = [words[13] >> 24 & 255, *(words[14] >> 8 * i & 255 for i in range(4))]
        self.box = [extent + 1 for extent in box[:rank]]
        if self.box[0] * self.item != 128:
            raise Fault(f"a box of {self.box[0] * self.item} bytes a row is not modelled")

    @property
    def num_bytes(self) -> int:
        """Of a box."""
        return 128 * int(np.prod(self.box[1:]))

    @property
    def extent(self) -> int:
        """Bytes from the first to past the last item of the tensor."""
        reach = [(size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)]
        return sum(reach) + self.item

    def rows(self, coordinates: list[int]) -> tuple[np.ndarray, np.ndarray, slice]:
        """Of a box: where its rows of 128 bytes begin, which of them lie in the tensor, and which
        of their bytes.
        """
        start, inside = np.zeros(1, np.int64), np.ones(1, bool)
        for d in range(1, len(self.size)):
            index = coordinates[d] + np.arange(self.box[d])
            good = (index >= 0) & (index < self.size[d])
            start = (start + (index * self.stride[d])[:, None]).reshape(-1)
            inside = (inside & good[:, None]).reshape(-1)
        low, high = max(0, coordinates[0]), min(self.size[0], coordinates[0] + self.box[0])
        columns = slice((low - coordinates[0]) * self.item, max(0, high - coordinates[0]) * self.item)
        return self.base + start + coordinates[0] * self.item, inside, columns


def load_box(machine, cta, tensor_map: TensorMap, target: int, coordinates: list[int], watch) -> None:
    """Bring a box into shared memory, with the 128-byte swizzle."""
    starts, inside, columns = tensor_map.rows(coordinates)
    rows = np.zeros((len(starts), 128), np.uint8)
    segment = machine.memory.find(tensor_map.base, tensor_map.extent)
    for number in np.flatnonzero(inside) if columns.stop > columns.start else ():
        first = int(starts[number]) - segment.base
        rows[number, columns] = segment.bytes[first + columns.start : first + columns.stop]
        if watch:
            watch.reads(first + segment.base + columns.start, columns.stop - columns.start)
    if watch:
        watch.writes(target, tensor_map.num_bytes)
    place = target + np.arange(len(rows) * 8) * 16
    place ^= (place >> 7 & 7) << 4
    cta.shared.reshape(-1, 16)[place >> 4] = rows.reshape(-1, 16)


def _aligned(warp, service, *numbers: int) -> None:
    if any(number % 16 for number in numbers):
        raise Fault(f"{warp}: {service.instr.op}: {numbers} are not multiples of 16")


def _check_shared(warp, address: int, size: int) -> None:
    if address < 1024 or address + size > warp.s.shared_end:
        raise Fault(f"{warp}: {size} bytes at shared {address}, which ends at {warp.s.shared_end}")


def bulk(machine, warp, service) -> int:
    """cp.async.bulk and its groups."""
    kind = service.words[3]
    if kind == "commit_group":
        warp.bulk.append([])
    elif kind == "wait_group":
        while len(warp.bulk) - 1 > service.operands[0]:
            for finish in warp.bulk.pop(0):
                finish()
    elif kind == "tensor":
        _load_tensor(machine, warp, service)
    elif service.operands[3]:
        for lane in warp.lanes():
            _load_bulk(machine, warp, service, lane)
    else:
        for lane in warp.lanes():
            _store_bulk(machine, warp, service, lane)
    return NEXT


def _load_tensor(machine, warp, service) -> None:
    (place, offset), (source, coordinates), _, (barrier, barrier_offset) = service.operands
    lanes = warp.lanes()
    if len(lanes) != 1:
        raise Fault(f"{warp}: {len(lanes)} lanes issue a tensor copy")
    (lane,) = lanes
    number = warp.value(source, lane) - PARAM_BASE
    tensor_map = warp.cta.launch.maps.get(number)
    if tensor_map is None:
        raise Fault(f"{warp}: no tensor map is parameter {number}")
    target = warp.value(place, lane) + offset
    at = [warp.signed(coordinate, lane) for coordinate in coordinates]
    barrier = warp.cta.barriers[warp.value(barrier, lane) + barrier_offset]
    _check_shared(warp, target, tensor_map.num_bytes)
    if target % 128:
        raise Fault(f"{warp}: a tensor copy to shared {target}, no multiple of 128")
    watch = machine.order and machine.order.load(warp, lane, barrier, service.instr)

    def action():
        load_box(machine, warp.cta, tensor_map, target, at, watch)
        if watch:
            watch.finish()
        barrier.complete(machine, tensor_map.num_bytes)

    machine.start_copy(warp.cta, action)


def _load_bulk(machine, warp, service, lane: int) -> None:
    (place, offset), (source, source_offset), size, (barrier, barrier_offset) = service.operands
    target, address = warp.value(place, lane) + offset, warp.value(source, lane) + source_offset
    num_bytes = warp.value(size, lane)
    barrier = warp.cta.barriers[warp.value(barrier, lane) + barrier_offset]
    _aligned(warp, service, target, address, num_bytes)
    _check_shared(warp, target, num_bytes)
    warp.crosses(machine.memory.find(address, num_bytes), num_bytes)
    watch = machine.order and machine.order.load(warp, lane, barrier, service.instr)

    def action():
        warp.cta.shared[target : target + num_bytes] = machine.memory.at(address, num_bytes)
        if watch:
            watch.reads(address, num_bytes)
            watch.writes(target, num_bytes)
            watch.finish()
        barrier.complete(machine, num_bytes)

    machine.start_copy(warp.cta, action)


def _store_bulk(machine, warp, service, lane: int) -> None:
    (place, offset), (source, source_offset), size, _ = service.operands
    target, address = warp.value(place, lane) + offset, warp.value(source, lane) + source_offset
    num_bytes = warp.value(size, lane)
    _aligned(warp, service, target, address, num_bytes)
    _check_shared(warp, address, num_bytes)
    warp.crosses(machine.memory.find(target, num_bytes), num_bytes)
    watch = machine.order and machine.order.store(warp, lane, service.instr)

    def action():
        machine.memory.at(target, num_bytes)[:] = warp.cta.shared[address : address + num_bytes]
        if watch:
            watch.reads(address, num_bytes)
            watch.writes(target, num_bytes)

    if machine.stores_read_late():
        warp.bulk[-1].append(action)
    else:
        action()
    if watch:
        warp.bulk[-1].append(watch.finish)
