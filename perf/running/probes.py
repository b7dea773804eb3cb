"""What a GPU does at its best, one probe per ceiling: GEMMs, memory, launches, NVLink, a barrier.

A probe is a call and how much work one call does. Probes of one GPU need a device only; those over
NVLink are made by all ranks of a job together, and all ranks pull or push at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from perf.running.jobs import Job
from perf.running.timing import EAGER, GRAPH

GEMM, HBM_COPY, HBM_READ, LAUNCH = "gemm", "hbm_copy", "hbm_read", "launch"
NVLINK_PULL, NVLINK_PUSH, BARRIER = "nvlink_pull", "nvlink_push", "barrier"

TFLOPS, GBPS, US = "TFLOP/s", "GB/s", "us"

#: Rows, columns and depth of a GEMM; bytes of a buffer; launches or barriers in one graph.
GEMM_SIZE, BUFFER_BYTES, REPEATS = 8192, 2 << 30, 1000


@dataclass(frozen=True)
class Probe:
    """One ceiling. `amount` is the work of a call: FLOPs for TFLOP/s, bytes for GB/s, repeats for
    us. `dtype` of a GEMM's operands, else "".
    """

    name: str
    unit: str
    amount: int
    call: Callable[[], object]
    mode: str = EAGER
    dtype: str = ""

    def value(self, us: float) -> float:
        """In `unit`, of a call that takes `us`."""
        if self.unit == US:
            return us / self.amount
        return self.amount / us / (1e6 if self.unit == TFLOPS else 1e3)


def gemm_bf16(device: torch.device, size: int = GEMM_SIZE) -> Probe:
    """torch.matmul of normal random operands."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return Probe(GEMM, TFLOPS, 2 * size**3, lambda: torch.matmul(a, b, out=out), dtype="bfloat16")


def gemm_fp8(device: torch.device, size: int = GEMM_SIZE) -> Probe:
    """torch._scaled_mm, one scale per tensor, with the tensor cores' fast accumulation: the upper
    end of what FP8 reaches.
    """
    fp8 = torch.float8_e4m3fn
    a, b = (torch.randn(size, size, device=device).to(fp8) for _ in range(2))
    one = torch.ones((), device=device)

    def call() -> torch.Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Probe(GEMM, TFLOPS, 2 * size**3, call, dtype="float8_e4m3fn")


def hbm_copy(device: torch.device, num_bytes: int = BUFFER_BYTES) -> Probe:
    """A copy within memory; bytes read plus bytes written."""
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return Probe(HBM_COPY, GBPS, 2 * source.nbytes, lambda: target.copy_(source))


def hbm_read(device: torch.device, num_bytes: int = BUFFER_BYTES) -> Probe:
    """A sum over memory."""
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    return Probe(HBM_READ, GBPS, source.nbytes, source.sum)


def launch(device: torch.device, repeats: int = REPEATS) -> Probe:
    """Kernels that do nothing, one after the other in a graph."""

    def call() -> None:
        for _ in range(repeats):
            torch.cuda._sleep(0)

    return Probe(LAUNCH, US, repeats, call, GRAPH)


ONE_GPU: tuple[Callable[[torch.device], Probe], ...] = (
    gemm_bf16, gemm_fp8, hbm_copy, hbm_read, launch,
)  # fmt: skip


def nvlink(job: Job, num_bytes: int = BUFFER_BYTES) -> Iterator[Probe]:
    """Pull and push between all ranks at once by the SMs' loads and stores, then a barrier;
    collective. A rank moves an equal part from or to each peer, beginning with its neighbour;
    bytes are those of one rank in one direction.
    """
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    others = job.size - 1
    part = num_bytes // 4 // others
    shared = symmetric_memory.empty(others * part, dtype=torch.int32, device=job.device)
    world = dist.group.WORLD
    handle = symmetric_memory.rendezvous(shared, world)  # type: ignore[arg-type]  # there is one
    local = torch.zeros(others, part, dtype=torch.int32, device=job.device)
    shared.zero_()
    peers = [(job.rank + step) % job.size for step in range(1, job.size)]
    views = [handle.get_buffer(peer, (others, part), torch.int32) for peer in peers]

    def pull() -> None:
        for step, view in enumerate(views):
            torch.neg(view[step], out=local[step])  # a kernel, not a copy engine

    def push() -> None:
        for step, view in enumerate(views):
            torch.neg(local[step], out=view[step])

    def barriers() -> None:
        for _ in range(REPEATS // 10):
            handle.barrier(channel=0)

    moved = others * part * 4
    yield Probe(NVLINK_PULL, GBPS, moved, pull)
    yield Probe(NVLINK_PUSH, GBPS, moved, push)
    yield Probe(BARRIER, US, REPEATS // 10, barriers, GRAPH)
