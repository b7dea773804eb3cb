"""SM90 BF16 mainloop: one math warpgroup accumulates m64 x block_n over K from the shared-memory
ring.

One WGMMA group stays in flight: the stage of the previous K block is released when the next group
has been issued.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr
from cutlass.cute.nvgpu import warpgroup

arch = cute.arch


@cute.jit
def issue(mma, accumulator, a, b, stage, fresh: Constexpr):
    """One K block as one WGMMA group; `fresh` starts the accumulation (a Python constant keeps
    ptxas from serialising).
    """
    atom = cute.make_mma_atom(mma.op)
    warpgroup.fence()
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        atom.set(warpgroup.Field.ACCUMULATE, not (fresh and k == 0))
        cute.gemm(atom, accumulator, a[None, None, k, stage], b[None, None, k, stage], accumulator)
    warpgroup.commit_group()


@cute.jit
def release(empty, stage, lane):
    """One arrival per warp: this warp no longer reads the stage."""
    if lane == 0:
        arch.mbarrier_arrive(empty + stage)


@cute.jit
def accumulate(
    mma, accumulator, a, b, full, empty, position, k_blocks, lane, num_stages: Constexpr
):
    """accumulator = A @ B^T over `k_blocks` K blocks, the first of which is number `position` of
    the ring.
    """
    stage = position % num_stages
    arch.mbarrier_wait(full + stage, (position // num_stages) % 2)
    issue(mma, accumulator, a, b, stage, True)
    for block in cutlass.range(1, k_blocks, unroll=1):
        current = (position + block) % num_stages
        arch.mbarrier_wait(full + current, ((position + block) // num_stages) % 2)
        issue(mma, accumulator, a, b, current, False)
        warpgroup.wait_group(1)
        release(empty, (position + block - 1) % num_stages, lane)
    warpgroup.wait_group(0)
    release(empty, (position + k_blocks - 1) % num_stages, lane)


@cute.jit
def skip(full, empty, position, k_blocks, lane, num_stages: Constexpr):
    """Consume the stages of a tile without computing: all rows of this warpgroup pad the block."""
    for block in cutlass.range(k_blocks, unroll=1):
        stage = (position + block) % num_stages
        arch.mbarrier_wait(full + stage, ((position + block) // num_stages) % 2)
        release(empty, stage, lane)
