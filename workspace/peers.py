"""Peer addressing: one table of symmetric base addresses.

Regions lie at the same offset on every rank, so a peer's address is its base plus the region's
offset.
"""

from __future__ import annotations

import torch

from workspace.layout import SYMMETRIC
from workspace.symmetric import Allocation


def peer_table(allocation: Allocation, device: torch.device) -> torch.Tensor:
    """int64 [W] in device memory: base address of every rank's symmetric space, as the kernel
    indexes it.
    """
    bases = [allocation.base(rank, SYMMETRIC) for rank in range(allocation.num_ranks)]
    return torch.tensor(bases, dtype=torch.int64, device=device)
