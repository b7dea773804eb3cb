"""Peer addressing: one table of symmetric base addresses, one operation `map(rank, region)`.

Regions lie at the same offset on every rank, so a peer's address is its base plus the region's
offset.
"""

from __future__ import annotations

import torch

from workspace.layout import SYMMETRIC, Layout
from workspace.symmetric import Allocation


def peer_table(allocation: Allocation, device: torch.device) -> torch.Tensor:
    """int64 [W] in device memory: base address of every rank's symmetric space, as the kernel
    indexes it.
    """
    bases = [allocation.base(rank, SYMMETRIC) for rank in range(allocation.num_ranks)]
    return torch.tensor(bases, dtype=torch.int64, device=device)


def map_region(allocation: Allocation, layout: Layout, rank: int, name: str) -> int:
    """Address of symmetric region `name` on `rank`, valid in this process."""
    region = layout[name]
    if region.space != SYMMETRIC:
        raise ValueError(f"region {name!r} is local: peers cannot address it")
    return allocation.base(rank, SYMMETRIC) + region.offset
