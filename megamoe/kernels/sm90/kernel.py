"""The SM90 megakernel: dispatch, FC1, FC2 and combine of one rank in one launch.

Roles of a CTA (384 threads, 1 CTA per SM, persistent):
  warps  role          registers  does (module)
  all    count         168        quantises the input, histogram, routed records, barrier of all
                                  ranks (quantize, dispatch)
  0      dispatch      frontend   pulls token rows, then reduces what is in (dispatch, combine)
  1      report        frontend   reports stored tiles, reduces in between (report, combine)
  2      load_weights  frontend   takes tickets, hands tiles over, TMA of B (tiles, loaders)
  3      load_tokens   frontend   waits for readiness, TMA of A (loaders)
  4-11   math          math       products, epilogues, combine (math_warps, mainloop, epilogue,
                                  combine)

Pipelines, flags and barriers between them: `ordering`.

Steady state: dispatch pulls rows of later blocks; load_weights runs up to `num_stages` stages and
a tile ahead; load_tokens follows as soon as a block is complete; math computes tile i while both
loaders fill stages of tile i + 1.

Deadlock freedom: all CTAs are co-resident and take tickets of one order in which FC2 follows its
FC1 and FC1 of a block follows FC2 of the block whose ring slot it takes (`schedule`); every CTA
works its tickets in order; dispatch waits only for FC2 of a block that is a whole ring behind, with
nothing of its own unpublished.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int16, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.memory import SmemAllocator

from megamoe.architecture import SM90A
from megamoe.budget import (
    FLAG_LIVE,
    FLAG_OK,
    FLAG_STOP,
    check,
)
from megamoe.config import DISPATCH, GEMMS, KernelConfig, MoEConfig
from megamoe.kernels import sync
from megamoe.kernels.combine import combine, reduce_early, start_reducing
from megamoe.kernels.dispatch import PullBuffers, count, pull
from megamoe.kernels.launch import Launch
from megamoe.kernels.ptx import store_shared
from megamoe.kernels.report import report
from megamoe.kernels.sm90 import operands, swapped
from megamoe.kernels.sm90.loaders import load_tokens, load_weights
from megamoe.kernels.sm90.math_warps import math
from megamoe.kernels.sm90.swapped_epilogue import Exchange
from megamoe.kernels.tiles import Pipes
from megamoe.launch_shape import LaunchShape
from megamoe.ordering import FRONTEND, HANDOVER, REPORTED, SHARED_CLEARED
from megamoe.regions import layout_of
from megamoe.signature import Arguments, HostArguments

arch = cute.arch

SHARED_DTYPES = {"int16": Int16, "int32": Int32, "int64": Int64}
WARP_DISPATCH, WARP_REPORT, WARP_LOAD_WEIGHTS, WARP_LOAD_TOKENS = range(len(FRONTEND))


class MegaMoEKernel:
    """The kernel of one configuration. Integers only until `__call__` is traced."""

    def __init__(self, config: MoEConfig, kernel: KernelConfig):
        self.config = config
        self.kernel_config = kernel
        self.budget = check(config, kernel)
        self.shape = LaunchShape(config, kernel, layout_of(config, kernel))
        self.dtype = operands.DTYPES[config.recipe.tokens.mma]

    # ------------------------------------------------------------------ host
    @cute.jit
    def __call__(self, host: HostArguments, arguments: Arguments, stream: cuda.CUstream):
        """One launch of one rank; every address is a plain integer."""
        shape, kernel, config = self.shape, self.kernel_config, self.config
        hidden, intermediate = config.hidden_size, config.intermediate_size
        experts = shape.local_experts
        rows = shape.ring * kernel.block_m
        dtype = self.dtype
        layout_a, layout_b = operands.stage_layouts(dtype, kernel)
        pool = arguments.local_base + shape.layout["l1_token_buffer"].offset
        tokens = operands.token_maps(dtype, kernel, pool, rows, hidden)
        outputs = arguments.local_base + shape.layout["fc1_output"].offset
        fc1_outs = operands.token_maps(dtype, kernel, outputs, rows, intermediate)
        if const_expr(config.recipe.weights.packed):
            weights = operands.PackedWeights(host.w13, host.w2)
        else:
            weights = operands.WeightMaps(
                *operands.gate_up_map(dtype, kernel, host.w13, experts, intermediate, hidden),
                *operands.down_map(dtype, kernel, host.w2, experts, hidden, intermediate),
            )
        self.kernel(tokens, fc1_outs, weights, layout_a, layout_b, arguments).launch(
            grid=(host.num_ctas, 1, 1),
            block=(kernel.num_threads, 1, 1),
            min_blocks_per_mp=1,
            use_pdl=True,
            stream=stream,
        )

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tokens: operands.TokenMaps,
        fc1_outs: operands.TokenMaps,
        weights: operands.WeightMaps | operands.PackedWeights,
        layout_a: cute.ComposedLayout,
        layout_b: cute.ComposedLayout,
        arguments: Arguments,
    ):
        config, budget = self.kernel_config, self.budget
        thread, _, _ = arch.thread_idx()
        cta, _, _ = arch.block_idx()
        num_ctas, _, _ = arch.grid_dim()
        launch = Launch(
            **vars(arguments), shape=self.shape, num_ctas=num_ctas, cta=cta, thread=thread
        )
        warp = arch.make_warp_uniform(arch.warp_idx())
        warpgroup = arch.make_warp_uniform(thread // SM90A.group_threads)
        lane = thread % 32

        smem = self.allocate(layout_a, layout_b)
        smem_a, smem_b, staging = smem["a"], smem["b"], smem["staging"]
        zeros, flags = smem["zeros"], smem["flags"]
        received, expert_ids = smem["received"], smem["expert_ids"]
        pipes = Pipes(**{name: smem[name] for name in Pipes._fields})
        exchange = None
        if const_expr(self.config.recipe.promotes):
            exchange = Exchange(**{name: smem[name] for name in Exchange._fields})

        if thread == 0:
            flags[FLAG_OK] = Int32(1)
            flags[FLAG_STOP] = Int32(0)
            for parts in budget.rings.values():
                for number in range_constexpr(parts[0].num_items):
                    for part in parts:
                        arch.mbarrier_init(smem[part.name] + number, part.arrivals)
        for word in range(thread, budget.zero_bytes // 4, config.num_threads):
            store_shared(zeros + 4 * word, Int32(0))
        # Rows of A that no box has brought yet are zero: they cost less power than stale ones.
        stages = cute.recast_ptr(smem_a.iterator, dtype=Uint8)
        for word in range(
            thread, config.num_stages * budget.a_stage_bytes // 4, config.num_threads
        ):
            store_shared(stages + 4 * word, Int32(0))
        arch.fence_proxy(SHARED_CLEARED.kind, space="cta")
        arch.mbarrier_init_fence()
        arch.sync_threads()

        # Nothing before touches global memory: it may run beside the end of the previous kernel.
        arch.griddepcontrol_wait()
        if thread == 0:
            sync.mark(launch, "start")
            sync.mark_cycles(launch, "start_cycles")
        epoch = sync.read_epoch(launch)
        scratch = cute.recast_ptr(staging, dtype=Int32)
        count(launch, scratch, received, expert_ids, flags, epoch)
        num_live = flags[FLAG_LIVE]
        if launch.dependents == 1:
            arch.griddepcontrol_launch_dependents()

        if thread == 0:
            sync.mark(launch, "dispatched")
        if warpgroup == 0:
            if const_expr(config.runs(GEMMS)):
                arch.setmaxregister_decrease(config.frontend_registers)
            if warp == WARP_DISPATCH:
                pulling = PullBuffers(
                    rows=smem["pull_rows"],
                    scales=smem["pull_scales"],
                    counts=smem["pull_counts"],
                    barriers=smem["pulled"],
                    piece_bytes=budget.piece_bytes,
                    zero_bytes=budget.zero_bytes,
                )
                if const_expr(config.runs(DISPATCH)):
                    pull(
                        launch, received, expert_ids, num_live, pulling, zeros, cta, num_ctas, lane
                    )
                if lane == 0:
                    sync.mark(launch, "last_pull")
                arch.sync_warp()
                if const_expr(not config.runs(GEMMS)):
                    sync.arrive(launch, REPORTED)
                reduce_early(launch, start_reducing(launch, 0), flags, 0, lane)
                arch.sync_warp()
                sync.arrive(launch, HANDOVER)
            elif warp == WARP_REPORT:
                reducing = report(launch, pipes, 1, lane)
                arch.sync_warp()
                sync.arrive(launch, REPORTED)
                reduce_early(launch, reducing, flags, 1, lane)
                arch.sync_warp()
                sync.arrive(launch, HANDOVER)
            elif warp == WARP_LOAD_WEIGHTS:
                load_weights(
                    launch, budget, weights, smem_b, received, expert_ids, num_live, pipes, lane
                )
            elif warp == WARP_LOAD_TOKENS:
                load_tokens(launch, budget, tokens, fc1_outs, smem_a, pipes, exchange, lane)
        else:
            if const_expr(config.runs(GEMMS)):
                arch.setmaxregister_increase(config.math_registers)
            if const_expr(self.config.recipe.weights.packed):
                swapped.math(launch, smem_a, smem_b, exchange, pipes, warp - 4, lane)
            else:
                math(launch, smem_a, smem_b, staging, exchange, pipes, warp - 4, lane)
            sync.cta_barrier(launch, REPORTED)
            combine(launch, flags, thread - SM90A.group_threads, epoch)

    def allocate(self, layout_a, layout_b) -> dict:
        """Shared memory by the map of the budget: A and B as tensors, other parts as pointers."""
        memory, smem = SmemAllocator(), {}
        for name, part in self.budget.parts.items():
            if name == "a" or name == "b" and not self.config.recipe.weights.packed:
                layout = layout_a if name == "a" else layout_b
                smem[name] = memory.allocate_tensor(
                    self.dtype, layout.outer, part.alignment, swizzle=layout.inner
                )
            elif part.dtype == "uint8":
                layout = cute.make_layout(part.num_bytes)
                smem[name] = memory.allocate_tensor(Uint8, layout, part.alignment).iterator
            else:
                smem[name] = memory.allocate_array(SHARED_DTYPES[part.dtype], part.num_items)
        return smem
