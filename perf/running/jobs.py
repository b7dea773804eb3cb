"""Who this process is, one alone or one per GPU, and what all processes of a job do together.

The environment is read once, by `place_of`; `join` forms the job. Nothing here imports `megamoe`: a
process can measure another version of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

#: Nothing here needs NVLink multicast, and on a shared host it can put GPUs out of service.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
#: Seconds between a rank's last line and its end: torchrun then ends the others, who may have the
#: better explanation.
LAST_WORDS_S = 2.0


@dataclass(frozen=True)
class Place:
    """Which process of a torchrun job this is."""

    rank: int
    size: int
    local_rank: int


def place_of(environ: Mapping[str, str]) -> Place | None:
    """What torchrun says in `environ`; None without torchrun, or if it started one process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if any(name not in environ for name in names):
        return None
    for name in names:
        if not environ[name].isdigit():
            raise ValueError(f"environment: {name}={environ[name]!r} is not an integer")
    place = Place(*(int(environ[name]) for name in names))
    return place if place.size > 1 else None


class Job:
    """The job of a single process, which holds every rank; see `ProcessJob`."""

    alone, rank, size = True, 0, 1
    device: torch.device  # of a process that is not alone

    def align(self) -> None:
        pass

    def max_over_ranks(self, values: Sequence[float]) -> Sequence[float]:
        return values

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def abort(self, message: str, status: int) -> int:
        print(message, file=sys.stderr)
        return status


ALONE = Job()


class ProcessJob(Job):
    """This process among all of an initialised process group, with one rank of the layer each;
    every method but `abort` is collective.
    """

    alone = False

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._word = torch.zeros(1, device=device)

    def align(self) -> None:
        """On the device: what is queued after this begins on all ranks together. On a GPU the host
        does not wait.
        """
        dist.all_reduce(self._word)

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element by element the largest of all ranks, which pass equally many."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, which have one shape, as a new tensor."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, which have one shape [N, ...], in rank order: [W * N, ...]."""
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(pieces, tensor.contiguous())
        return torch.cat(pieces)

    def abort(self, message: str, status: int) -> NoReturn:
        """Say why, and end this process whatever the other ranks are doing."""
        print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        time.sleep(LAST_WORDS_S)
        os._exit(status)


def join(place: Place) -> ProcessJob:
    """The job over NCCL, each process on the GPU of its local rank."""
    for name, value in NO_MULTICAST.items():
        os.environ.setdefault(name, value)
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return ProcessJob(device)
