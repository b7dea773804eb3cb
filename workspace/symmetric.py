"""Where a workspace's memory comes from, behind one small interface.

`Allocation` holds, for every rank that lives in this process, one byte tensor per space, and for
every rank of the job the base address of its symmetric space, valid in this process. Two forms: all
ranks in this process, in CPU memory or as virtual ranks on one GPU; and one process per GPU over
torch symmetric memory.

All memory is zeroed once, at allocation and before any peer may signal: barrier words and counters
must be zero on first use. The symmetric space is one allocation with one lifetime. It is written
inside and outside of torch.inference_mode, so no tensor of it may be an inference tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from workspace.layout import LOCAL, SPACES, SPAN_ALIGNMENT, SYMMETRIC, Layout


@dataclass(frozen=True)
class Allocation:
    """Memory of one workspace.

    spaces: for every rank of this process, a uint8 tensor per space.
    bases: for every rank of the job, the address of its symmetric space.
    owner: what must live as long as the peer mappings (the rendezvous handle), or None.
    """

    spaces: dict[int, dict[str, torch.Tensor]]
    bases: tuple[int, ...]
    owner: object = None

    @property
    def num_ranks(self) -> int:
        return len(self.bases)

    @property
    def local_ranks(self) -> list[int]:
        return sorted(self.spaces)

    def base(self, rank: int, space: str) -> int:
        """Address of a space of a rank, valid in this process; LOCAL only for ranks that live
        here.
        """
        return self.bases[rank] if space == SYMMETRIC else self.spaces[rank][space].data_ptr()


def _zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed bytes that start at a multiple of SPAN_ALIGNMENT on any allocator."""
    raw = torch.zeros(num_bytes + SPAN_ALIGNMENT, dtype=torch.uint8, device=device)
    skip = -raw.data_ptr() % SPAN_ALIGNMENT
    return raw[skip : skip + num_bytes]


@torch.inference_mode(False)
def in_process(layout: Layout, device: torch.device) -> Allocation:
    """Every rank of the job in this process, on one device."""
    spaces = {
        rank: {space: _zeros(layout.num_bytes(space), device) for space in SPACES}
        for rank in range(layout.num_ranks)
    }
    return Allocation(spaces, tuple(space[SYMMETRIC].data_ptr() for space in spaces.values()))


@torch.inference_mode(False)
def torch_symmetric(layout: Layout, device: torch.device, group: dist.ProcessGroup) -> Allocation:
    """This process's rank over torch symmetric memory; collective over `group`.

    Leaves multicast alone: peers are reached by plain loads, stores and copies.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    rank = dist.get_rank(group)
    failure = None
    try:
        buffer = symmetric_memory.empty(
            layout.num_bytes(SYMMETRIC), dtype=torch.uint8, device=device
        )
        local = _zeros(layout.num_bytes(LOCAL), device)
    except RuntimeError as error:  # out of memory: the others must not wait in the rendezvous
        failure = str(error)
    failures: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    for failed, reason in enumerate(failures):
        if reason is not None:
            raise MemoryError(f"rank {failed} cannot allocate its workspace: {reason}")
    handle = symmetric_memory.rendezvous(buffer, group)
    # A buffer may lie inside a larger registered block; its place there is the same on every rank.
    skip = buffer.data_ptr() - handle.buffer_ptrs[rank]
    bases = tuple(base + skip for base in handle.buffer_ptrs)
    buffer.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)  # no peer may signal into memory that is still to be zeroed
    return Allocation({rank: {SYMMETRIC: buffer, LOCAL: local}}, bases, handle)


def allocate(
    layout: Layout, device: torch.device, group: dist.ProcessGroup | None = None
) -> Allocation:
    """All ranks of `layout` on one device, or with `group` the one rank of this process."""
    if group is not None:
        return torch_symmetric(layout, device, group)
    return in_process(layout, device)
