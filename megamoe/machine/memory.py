"""Global memory: named tensors at their real addresses, and what an address means in words.

A segment is one tensor, of one rank or of nobody in particular; it may be divided into regions with
names and rows. Whatever lies in no segment is not mapped.
"""

from __future__ import annotations

import ctypes
from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from megamoe.machine.faults import Fault

HOST = -1  # the rank of memory that belongs to none


@dataclass(frozen=True)
class Region:
    """A named part of a segment; `begin` counts from its start. `fresh`: plain loads must find what
    somebody wrote in the same launch.
    """

    name: str
    begin: int
    num_bytes: int
    row_bytes: int
    fresh: bool = False


@dataclass
class Segment:
    name: str
    base: int
    size: int
    bytes: np.ndarray  # uint8; empty once the tensor has been let go
    rank: int
    regions: list[Region] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.base + self.size

    def fresh_lines(self) -> np.ndarray | None:
        """For every 128 bytes whether they belong to a fresh region; None if there is none."""
        if not any(region.fresh for region in self.regions):
            return None
        lines = np.zeros(len(self.bytes) // 128 + 1, np.uint8)
        for region in self.regions:
            if region.fresh:
                lines[region.begin // 128 : -(-(region.begin + region.num_bytes) // 128)] = 1
        return lines


class Memory:
    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._kept: list[torch.Tensor] = []

    def add(
        self,
        name: str,
        tensor: torch.Tensor | None,
        rank: int = HOST,
        regions: Iterable[Region] = (),
    ) -> None:
        """Map a tensor; one without bytes, or None, is nothing, and so is one that is there."""
        if tensor is None or tensor.numel() == 0:
            return
        size = tensor.numel() * tensor.element_size()
        if any(
            s.base <= tensor.data_ptr() and tensor.data_ptr() + size <= s.end for s in self.segments
        ):
            return
        assert tensor.is_contiguous(), f"{name} is not contiguous"
        base = tensor.data_ptr()  # not tensor.numpy(), after which the storage cannot be resized
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        self._kept.append(tensor)
        self.segments.append(Segment(name, base, size, flat, rank, sorted(regions, key=_begin)))

    def let_go(self) -> None:
        """Keep names and places, but no tensor alive."""
        self._kept.clear()
        for segment in self.segments:
            segment.bytes = np.empty(0, np.uint8)

    def find(self, address: int, size: int) -> Segment:
        for segment in self.segments:
            if segment.base <= address and address + size <= segment.end:
                return segment
        raise Fault(
            f"{size} bytes at {address:#x} lie in no tensor; near: {self.describe(address)}"
        )

    def at(self, address: int, size: int) -> np.ndarray:
        """The bytes there."""
        segment = self.find(address, size)
        return segment.bytes[address - segment.base : address - segment.base + size]

    def describe(self, address: int) -> str:
        """An address in words: region, row and rank, or the tensor, or the nearest below it."""
        below = [segment for segment in self.segments if segment.base <= address]
        if not below:
            return f"{address:#x}"
        segment = max(below, key=lambda segment: segment.base)
        offset = address - segment.base
        name, rest = segment.name, f" + {offset}"
        place = bisect([region.begin for region in segment.regions], offset) - 1
        if place >= 0 and address < segment.end:
            region = segment.regions[place]
            row, column = divmod(offset - region.begin, region.row_bytes)
            if offset < region.begin + region.num_bytes:
                name, rest = f"{region.name}[{row}]", f" byte {column}" if column else ""
        beyond = "" if address < segment.end else " (beyond its end)"
        return name + rest + (f" of rank {segment.rank}" if segment.rank >= 0 else "") + beyond


def _begin(region: Region) -> int:
    return region.begin
