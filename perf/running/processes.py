"""What ends a process alone or a rank of a job, and how.

An error ends this process at once, without waiting for the others (`Job.abort`): they may sit in a
collective that this process will never enter, and torchrun ends them.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megamoe.kernel_files import KernelError
from perf.running.jobs import ALONE, Job, Place, join

#: What ends a command, or a rank, in one line: a wrong argument, a file that cannot be written, a
#: kernel that is not there or must not be loaded.
ONE_LINE = (ValueError, OSError, KernelError)


def out_of_memory(error: Exception) -> bool:
    """Whether a GPU or the host has no memory left; for the host's torch has no class of error."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


@contextmanager
def joined(place: Place | None) -> Iterator[Job]:
    """The job over NCCL, each process on the GPU of its local rank; ALONE without a place. Whoever
    leaves a job with an exception ends its process: status 2 for one of ONE_LINE, else 1.
    """
    if place is None:
        yield ALONE
        return
    job = join(place)
    try:
        job.align()  # the first collective sets up connections
        torch.cuda.synchronize()
        yield job
        dist.barrier()
    except ONE_LINE as error:
        job.abort(f"error: {error}", 2)
    except BaseException:
        job.abort(traceback.format_exc(), 1)
    dist.destroy_process_group()
