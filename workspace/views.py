"""Workspace: an allocation seen through its layout, as cached typed tensors.

`regions(rank)` builds every view once and returns the same objects afterwards, so a forward
allocates nothing and a CUDA graph that captured them stays valid for the life of the workspace.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Generic, TypeVar

import torch

from workspace.layout import LOCAL, SYMMETRIC, Layout, Region
from workspace.symmetric import Allocation, allocate


def view_of(span: torch.Tensor, region: Region) -> torch.Tensor:
    """The typed view of `region` in the bytes of its space."""
    return span[region.offset : region.end].view(getattr(torch, region.dtype)).view(region.shape)


def peer_table(allocation: Allocation, device: torch.device) -> torch.Tensor:
    """int64 [W] in device memory: base address of every rank's symmetric space, as the kernel
    indexes it. Regions lie at the same offset on every rank.
    """
    bases = [allocation.base(rank, SYMMETRIC) for rank in range(allocation.num_ranks)]
    return torch.tensor(bases, dtype=torch.int64, device=device)


LayoutT = TypeVar("LayoutT", bound=Layout)


class Workspace(Generic[LayoutT]):
    """Memory of all ranks of one process for one layout.

    Attributes: `layout`, `allocation`, `device`; `health`, what all users that share it know of its
    launches, set by the first. Raises whatever the allocator raises when memory is short.
    """

    def __init__(
        self,
        layout: LayoutT,
        device: torch.device | str = "cpu",
        allocation: Allocation | None = None,
        group=None,
        name: str = "",
    ):
        self.layout = layout
        self.device = torch.device(device)
        self.allocation = allocation or allocate(layout, self.device, group)
        self.name = name  # the same on every rank of a job
        self.health: Any = None
        self._views: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def local_ranks(self) -> list[int]:
        return self.allocation.local_ranks

    @property
    def reset_bytes(self) -> int:
        """Bytes of one rank that are zero again between launches."""
        return self.layout.reset_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes that one rank holds."""
        return self.layout.total_bytes

    def regions(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """Typed views of every region of `rank`; the same objects on every call."""
        if rank not in self._views:
            spaces = self.allocation.spaces[rank]
            with torch.inference_mode(False):  # written inside and outside of it
                self._views[rank] = {
                    name: view_of(spaces[region.space], region)
                    for name, region in self.layout.regions.items()
                }
        return self._views[rank]

    @cached_property
    def peer_tables(self) -> dict[int, torch.Tensor]:
        """Per local rank: the int64 [W] table of symmetric bases on that rank's device."""
        return {
            rank: peer_table(self.allocation, self.allocation.spaces[rank][LOCAL].device)
            for rank in self.local_ranks
        }

    def reset_view(self, rank: int = 0) -> torch.Tensor:
        """The one contiguous span (uint8) of everything that resets."""
        begin, end = self.layout.reset_span
        return self.allocation.spaces[rank][LOCAL][begin:end]

    def recover(self) -> None:
        """Zero counters, padding metadata and the barrier header of every local rank, as at
        allocation.

        Only for after a failed launch, while no launch runs on any rank.
        """
        begin, end = self.layout.header_span
        for rank in self.local_ranks:
            self.reset_view(rank).zero_()
            self.allocation.spaces[rank][SYMMETRIC][begin:end].zero_()

    def describe(self) -> str:
        """Bytes by region and kind, as a table a person can read."""
        return self.layout.describe()
