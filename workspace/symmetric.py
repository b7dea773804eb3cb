"""Where a workspace's memory comes from, behind one small interface.

`Allocation` holds, for every rank that lives in this process, one byte tensor per space, and for
every rank of the job the base address of its symmetric space. Two forms exist: plain CPU memory,
which the emulator runs on, and virtual ranks, all of them in this process on one or more GPUs. A
third, one process per GPU over torch symmetric memory, fits the same interface.

All memory is zeroed once, at allocation: barrier words and counters must be zero on first use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workspace.layout import LOCAL, SPACES, SPAN_ALIGNMENT, SYMMETRIC, Layout


@dataclass(frozen=True)
class Allocation:
    """Memory of one workspace. `spaces[rank][space]` is a uint8 tensor, for the ranks in
    `local_ranks`.
    """

    spaces: dict[int, dict[str, torch.Tensor]]
    num_ranks: int

    @property
    def local_ranks(self) -> list[int]:
        return sorted(self.spaces)

    def base(self, rank: int, space: str) -> int:
        """Address of a space of a rank, valid in this process."""
        return self.spaces[rank][space].data_ptr()


def _zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed bytes that start at a multiple of SPAN_ALIGNMENT on any allocator."""
    raw = torch.zeros(num_bytes + SPAN_ALIGNMENT, dtype=torch.uint8, device=device)
    skip = -raw.data_ptr() % SPAN_ALIGNMENT
    return raw[skip : skip + num_bytes]


def _allocate(layout: Layout, devices: list[torch.device]) -> Allocation:
    spaces = {
        rank: {space: _zeros(layout.num_bytes(space), device) for space in SPACES}
        for rank, device in enumerate(devices)
    }
    return Allocation(spaces, layout.config.num_ranks)


def cpu_memory(layout: Layout) -> Allocation:
    """Every rank of the job in plain CPU memory."""
    return _allocate(layout, [torch.device("cpu")] * layout.config.num_ranks)


def virtual_ranks(layout: Layout, devices: list[torch.device]) -> Allocation:
    """Every rank of the job in this process; rank r lives on ``devices[r % len(devices)]``.

    With several devices peer access between them must be possible; it is switched on by the first
    peer copy.
    """
    for a in devices:
        for b in devices:
            if a != b:
                if not torch.cuda.can_device_access_peer(a, b):
                    raise ValueError(f"device {a} cannot access the memory of {b}")
                torch.empty(1, device=a).copy_(torch.empty(1, device=b))
    return _allocate(
        layout, [devices[rank % len(devices)] for rank in range(layout.config.num_ranks)]
    )


def allocate(layout: Layout, device: torch.device) -> Allocation:
    """All ranks of `layout` on one device: CPU memory, or virtual ranks on one GPU."""
    return cpu_memory(layout) if device.type == "cpu" else virtual_ranks(layout, [device])


__all__ = ["LOCAL", "SYMMETRIC", "Allocation", "allocate", "cpu_memory", "virtual_ranks"]
