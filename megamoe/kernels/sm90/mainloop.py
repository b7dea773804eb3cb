"""SM90 mainloops: a math warpgroup accumulates m64 x block_n over K from the shared-memory ring.

`accumulate` lets the tensor cores add up over all of K, one WGMMA group in flight: the stage of the
previous K block is released when the next group has been issued. `accumulate_scaled` has a scale
per K block: every block starts fresh sums, which are promoted, times their scales, into the float32
accumulator. There are registers for the sums of half the tile's columns. In one part they leave
shared memory the least to do, and the tensor cores work for the other warpgroup during a promotion;
in two parts, of which one is promoted while the other is summed, they are faster for a warpgroup
that computes alone.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup

from megamoe.budget import WEIGHT_SCALE_BYTES
from megamoe.kernels.ptx import as_float, load_shared, load_shared_v4

arch = cute.arch


@cute.jit
def issue(fragments, sums, first: Constexpr, stage, fresh: Constexpr):
    """One K block as one WGMMA group: every one of `sums` takes A times its part of B, the parts
    from number `first` on. `fresh` starts the accumulation (a Python constant keeps ptxas from
    serialising).
    """
    a = fragments.a
    atom = cute.make_mma_atom(fragments.mma.op)
    warpgroup.fence()
    for part in range_constexpr(len(sums)):
        for k in range_constexpr(cute.size(a, mode=[2])):
            atom.set(warpgroup.Field.ACCUMULATE, not (fresh and k == 0))
            rows = a[None, None, k, stage]
            columns = fragments.b[first + part][None, None, k, stage]
            cute.gemm(atom, sums[part], rows, columns, sums[part])
    warpgroup.commit_group()


@cute.jit
def release(empty, stage, lane, warps):
    """This warp no longer reads the stage; it arrives for `warps` of them."""
    if lane == 0:
        arch.mbarrier_arrive(empty + stage, arrive_count=warps)


@cute.jit
def accumulate(fragments, pipes, position, k_blocks, lane, warps, kernel: Constexpr):
    """accumulator = A @ B^T over `k_blocks` K blocks, the first of which is number `position` of
    the ring.
    """
    stages = kernel.num_stages
    stage = position % stages
    arch.mbarrier_wait(pipes.full + stage, (position // stages) % 2)
    issue(fragments, fragments.parts, 0, stage, True)
    for block in cutlass.range(1, k_blocks, 1, unroll=1):
        current = (position + block) % stages
        arch.mbarrier_wait(pipes.full + current, ((position + block) // stages) % 2)
        issue(fragments, fragments.parts, 0, current, False)
        warpgroup.wait_group(1)
        release(pipes.empty, (position + block - 1) % stages, lane, warps)
    warpgroup.wait_group(0)
    release(pipes.empty, (position + k_blocks - 1) % stages, lane, warps)


@cute.jit
def accumulate_scaled(
    fragments,
    pipes,
    row_scales,
    weight_scales,
    weighted: Constexpr,
    position,
    k_blocks,
    lane,
    warps,
    kernel: Constexpr,
):
    """accumulator = sum over K blocks of scale * (A @ B^T), element by element.

    `row_scales`: shared pointer to the scale of this lane's first row in stage 0; that of its
    second row lies 8 words on. `weight_scales`: shared pointer to the tile's weight scales, per K
    block one for each quarter of the columns, unless not `weighted`.
    """
    stages, scale_bytes = kernel.num_stages, 4 * kernel.block_m
    accumulator = fragments.accumulator
    accumulator.fill(0.0)
    parts = len(fragments.parts)
    in_flight = parts // 2
    sums = [cute.make_rmem_tensor_like(fragments.parts[0]) for _ in range(in_flight)]
    size = cute.size(sums[0])
    quarter = size * parts // 4
    for block in cutlass.range(k_blocks, unroll=1):
        stage = (position + block) % stages
        arch.mbarrier_wait(pipes.full + stage, ((position + block) // stages) % 2)
        scales = []
        for step in range_constexpr(parts + in_flight - 1):
            if const_expr(step < parts):
                issue(fragments, [sums[step % in_flight]], step, stage, True)
            if const_expr(step == 0):  # under the tensor cores
                pointer = row_scales + stage * scale_bytes
                rows = [as_float(load_shared(pointer)), as_float(load_shared(pointer + 32))]
                weights = [Float32(1.0)] * 4
                if const_expr(weighted):
                    words = load_shared_v4(weight_scales + block * WEIGHT_SCALE_BYTES)
                    weights = [as_float(word) for word in words]
                scales = [[row * weight for row in rows] for weight in weights]
            part = step - in_flight + 1
            if const_expr(part >= 0):
                warpgroup.wait_group(min(step, parts - 1) - part)
                if const_expr(part == parts - 1):
                    arch.sync_warp()  # every lane has read its scales
                    release(pipes.empty, stage, lane, warps)
                for i in range_constexpr(size):
                    index = size * part + i
                    scale = scales[index // quarter][(i // 2) % 2]
                    promoted = sums[part % in_flight][i] * scale
                    accumulator[index] = accumulator[index] + promoted
