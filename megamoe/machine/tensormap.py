"""Tensor maps: what the host entry encodes in 128 bytes, decoded and checked.

A map must lie in one tensor whatever its coordinates; what it loads beyond its extents is zero.
"""

from __future__ import annotations

import numpy as np

from megamoe.machine import core
from megamoe.machine.faults import Fault
from megamoe.machine.memory import Memory

ITEM_BYTES = {0: 1, 10: 2}  # by type in a map: bytes, bfloat16
SWIZZLE_128 = 3


class TensorMap:
    """Innermost dimension first; strides in bytes."""

    def __init__(self, raw: bytes):
        words = [int(word) for word in np.frombuffer(raw, np.uint32)]
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
    def extent(self) -> int:
        """Bytes from the first to past the last item of the tensor."""
        reach = [(size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)]
        return sum(reach) + self.item

    def box_of(self, memory: Memory, coordinates: list[int]) -> np.ndarray:
        """What a box at these coordinates holds: uint8 [rows, 128], as `read_box` in `copies.c`."""
        start, inside = np.zeros(1, np.int64), np.ones(1, bool)
        for d in range(1, len(self.size)):
            index = coordinates[d] + np.arange(self.box[d])
            good = (index >= 0) & (index < self.size[d])
            start = (start + (index * self.stride[d])[:, None]).reshape(-1)
            inside = (inside & good[:, None]).reshape(-1)
        low, high = max(0, -coordinates[0]), min(self.box[0], self.size[0] - coordinates[0])
        rows = np.zeros((len(start), 128), np.uint8)
        for number in np.flatnonzero(inside) if low < high else ():
            first = self.base + int(start[number]) + (coordinates[0] + low) * self.item
            columns = slice(low * self.item, high * self.item)
            rows[number, columns] = memory.at(first, (high - low) * self.item)
        return rows

    def packed(self, offset: int, memory: Memory) -> core.Map:
        """For the core, as the parameter at `offset`; Fault if it leads out of a tensor."""
        memory.find(self.base, self.extent)
        padded = [
            (*values, *[0] * (5 - len(values))) for values in (self.size, self.stride, self.box)
        ]
        return core.Map(self.base, self.item, len(self.size), *padded, offset)
