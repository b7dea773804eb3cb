"""The SM90 megakernel: dispatch, FC1, FC2 and combine of one rank in one launch.

Roles of a CTA (384 threads, 1 CTA per SM, persistent):
  warps  role          registers  does (module)
  all    count         168        histogram, routed records, barrier of all ranks (dispatch)
  0-1    dispatch      frontend   pull token rows, then reduce what is in (dispatch, combine)
  2      load_weights  frontend   takes tickets, hands tiles over, TMA of B (here)
  3      load_tokens   frontend   waits for readiness, TMA of A (here)
  4-11   math          math       WGMMA, epilogues, combine (mainloop, epilogue, combine)

Pipelines (producer -> consumer, arrivals):
  full[stage]   load_tokens + load_weights -> math     2 arrivals + bytes of A and B
  empty[stage]  math -> both loaders                   8 (one per warp)
  queue_full    load_weights -> load_tokens, math      1
  queue_empty   load_tokens, math -> load_weights      9

Steady state: dispatch pulls rows of later blocks; load_weights runs up to 4 stages and tiles ahead;
load_tokens follows as soon as a block is complete; math computes tile i while both loaders fill
stages of tile i + 1.

Deadlock freedom: all CTAs are co-resident and take tickets of one order in which FC2 follows its
FC1 and FC1 of a block follows FC2 of the block whose ring slot it takes (`schedule`); every CTA
works its tickets in order; dispatch waits only for FC2 of a block that is a whole ring behind, with
nothing of its own unpublished.
"""

from __future__ import annotations

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, range_constexpr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from megamoe import faults, schedule
from megamoe.budget import (
    FLAG_OK,
    FLAG_STOP,
    FLAG_WORDS,
    NUM_PULL_BUFFERS,
    PASS_BYTES,
    QUEUE_SLOTS,
    QUEUE_WORDS,
    WARPGROUP_ROWS,
    check,
)
from megamoe.config import KernelConfig, MoEConfig
from megamoe.kernels import sync
from megamoe.kernels.combine import combine, reduce_early
from megamoe.kernels.dispatch import count, pull
from megamoe.kernels.launch import Launch, Shape, address
from megamoe.kernels.ptx import global_ptr, store_shared
from megamoe.kernels.sm90 import epilogue, mainloop
from workspace.layout import layout_of

arch = cute.arch

HANDOVER_BARRIER = 2  # dispatch warps arrive, math warpgroups wait
MATH_BARRIER = 1  # named barrier of the math warpgroups; 0 is the CTA
WARP_LOAD_WEIGHTS = 2
WARP_LOAD_TOKENS = 3


class Pipes(NamedTuple):
    """Shared-memory pointers of the pipelines above: mbarriers, and the words of the tile queue."""

    full: cute.Pointer
    empty: cute.Pointer
    queue: cute.Pointer
    queue_full: cute.Pointer
    queue_empty: cute.Pointer


class MegaMoEKernel:
    """The kernel of one configuration. Integers only until `__call__` is traced."""

    def __init__(self, config: MoEConfig, kernel: KernelConfig):
        self.config = config
        self.kernel_config = kernel
        self.budget = check(config, kernel)
        self.shape = Shape(config, kernel, layout_of(config, kernel))
        self.handover_threads = 32 * kernel.num_dispatch_warps + 128 * kernel.num_math_warpgroups
        self.dtype = {"bfloat16": BFloat16}[config.recipe.token]

    # ------------------------------------------------------------------ host
    @cute.jit
    def __call__(
        self,
        symmetric_base: Int64,
        local_base: Int64,
        peers: Int64,
        w13: Int64,
        w2: Int64,
        x: Int64,
        topk_idx: Int64,
        topk_weights: Int64,
        y: Int64,
        record: Int64,
        timeout_ns: Int64,
        rank: Int32,
        num_tokens: Int32,
        wide_idx: Int32,
        num_ctas: Int32,
        stream: cuda.CUstream,
    ):
        """One launch of one rank; every address is a plain integer, see `Launch`."""
        shape, kernel, config = self.shape, self.kernel_config, self.config
        hidden, intermediate, experts = config.hidden_size, config.intermediate_size, shape.experts
        rows = shape.ring * kernel.block_m
        tile = (kernel.block_m, kernel.block_n, kernel.block_k)
        layout_a = sm90.make_smem_layout_a(
            LayoutEnum.ROW_MAJOR, tile, self.dtype, kernel.num_stages
        )
        layout_b = sm90.make_smem_layout_b(
            LayoutEnum.ROW_MAJOR, tile, self.dtype, kernel.num_stages
        )
        major = cute.nvgpu.OperandMajorMode.K
        mma = sm90.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            major,
            major,
            Float32,
            atom_layout_mnk=(kernel.num_math_warpgroups, 1, 1),
            tiler_mn=(64, kernel.block_n),
        )
        layout = shape.layout
        tokens = self.tokens_map(local_base + layout["l1_token_buffer"].offset, rows, hidden)
        hiddens = self.tokens_map(local_base + layout["fc1_output"].offset, rows, intermediate)
        gate_up = self.weights_map(w13, experts, 2 * intermediate, hidden, layout_b)
        down = self.weights_map(w2, experts, hidden, intermediate, layout_b)
        self.kernel(
            tokens[0], tokens[1], hiddens[0], hiddens[1], gate_up[0], gate_up[1], down[0], down[1],
            mma, layout_a, layout_b,
            symmetric_base, local_base, peers, x, topk_idx, topk_weights, y, record,
            timeout_ns, rank, num_tokens, wide_idx,
        ).launch(
            grid=(num_ctas, 1, 1),
            block=(kernel.num_threads, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )  # fmt: skip

    def tokens_map(self, address, rows, columns):
        """TMA map over a [rows, columns] row-major buffer in boxes of 64 rows x block_k: what one
        math warpgroup reads, so that rows of a block that only pad it need not be loaded.
        """
        pointer = cute.make_ptr(self.dtype, address, cute.AddressSpace.gmem, assumed_align=128)
        tensor = cute.make_tensor(pointer, cute.make_layout((rows, columns), stride=(columns, 1)))
        box = (WARPGROUP_ROWS, self.kernel_config.block_k)
        tile = (WARPGROUP_ROWS, self.kernel_config.block_n, self.kernel_config.block_k)
        half = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, tile, self.dtype, 1)
        stage = cute.slice_(half, (None, None, 0))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tensor, stage, box)

    def weights_map(self, address, experts, rows, columns, smem_layout):
        """TMA map over [experts, rows, columns] seen as (rows, columns, experts); columns past
        `rows` read as zero.
        """
        pointer = cute.make_ptr(self.dtype, address, cute.AddressSpace.gmem, assumed_align=16)
        strides = (columns, 1, rows * columns)
        tensor = cute.make_tensor(
            pointer, cute.make_layout((rows, columns, experts), stride=strides)
        )
        box = (self.kernel_config.block_n, self.kernel_config.block_k)
        stage = cute.slice_(smem_layout, (None, None, 0))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tensor, stage, box)

    # ---------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tokens_atom: cute.CopyAtom,
        tokens: cute.Tensor,
        hiddens_atom: cute.CopyAtom,
        hiddens: cute.Tensor,
        gate_up_atom: cute.CopyAtom,
        gate_up: cute.Tensor,
        down_atom: cute.CopyAtom,
        down: cute.Tensor,
        mma: cute.TiledMma,
        layout_a: cute.ComposedLayout,
        layout_b: cute.ComposedLayout,
        symmetric_base: Int64,
        local_base: Int64,
        peers: Int64,
        x: Int64,
        topk_idx: Int64,
        topk_weights: Int64,
        y: Int64,
        record: Int64,
        timeout_ns: Int64,
        rank: Int32,
        num_tokens: Int32,
        wide_idx: Int32,
    ):
        config, budget = self.kernel_config, self.budget
        thread, _, _ = arch.thread_idx()
        cta, _, _ = arch.block_idx()
        num_ctas, _, _ = arch.grid_dim()
        launch = Launch(
            self.shape, symmetric_base, local_base, peers, x, topk_idx, topk_weights, y, record,
            timeout_ns, rank, num_tokens, wide_idx, num_ctas, cta, thread,
        )  # fmt: skip
        warp = arch.make_warp_uniform(arch.warp_idx())
        warpgroup = arch.make_warp_uniform(thread // 128)
        lane = thread % 32

        memory = SmemAllocator()
        smem_a = memory.allocate_tensor(self.dtype, layout_a.outer, 1024, swizzle=layout_a.inner)
        smem_b = memory.allocate_tensor(self.dtype, layout_b.outer, 1024, swizzle=layout_b.inner)
        staging = memory.allocate_tensor(
            Uint8, cute.make_layout(budget.staging_bytes), 128
        ).iterator
        buffers = memory.allocate_tensor(Uint8, cute.make_layout(budget.pull_bytes), 128).iterator
        zeros = memory.allocate_tensor(Uint8, cute.make_layout(budget.zero_bytes), 128).iterator
        barriers = memory.allocate_array(Int64, budget.num_barriers)
        received = memory.allocate_array(Int32, budget.count_words)
        queue = memory.allocate_array(Int32, QUEUE_SLOTS * QUEUE_WORDS)
        flags = memory.allocate_array(Int32, FLAG_WORDS)
        queue_full = barriers + 2 * config.num_stages
        pipes = Pipes(
            full=barriers,
            empty=barriers + config.num_stages,
            queue=queue,
            queue_full=queue_full,
            queue_empty=queue_full + QUEUE_SLOTS,
        )
        pull_barriers = queue_full + 2 * QUEUE_SLOTS

        if thread == 0:
            flags[FLAG_OK] = Int32(1)
            flags[FLAG_STOP] = Int32(0)
            for stage in range_constexpr(config.num_stages):
                arch.mbarrier_init(pipes.full + stage, budget.full_arrivals)
                arch.mbarrier_init(pipes.empty + stage, budget.empty_arrivals)
            for slot in range_constexpr(QUEUE_SLOTS):
                arch.mbarrier_init(pipes.queue_full + slot, 1)
                arch.mbarrier_init(pipes.queue_empty + slot, budget.queue_empty_arrivals)
            for buffer in range_constexpr(config.num_dispatch_warps * NUM_PULL_BUFFERS):
                arch.mbarrier_init(pull_barriers + buffer, 1)
        for word in range(thread, budget.zero_bytes // 4, config.num_threads):
            store_shared(zeros + 4 * word, Int32(0))
        arch.fence_proxy("async.shared", space="cta")  # bulk copies read the zeros
        arch.mbarrier_init_fence()
        arch.sync_threads()

        sync.report_unrecovered(launch)
        if thread == 0:
            sync.mark(launch, "start")
            sync.mark_cycles(launch, "start_cycles")
        epoch = sync.read_epoch(launch)
        scratch = cute.recast_ptr(staging, dtype=Int32)
        count(launch, scratch, received, flags, epoch, config.num_threads)

        if thread == 0:
            sync.mark(launch, "dispatched")
        if warpgroup == 0:
            arch.setmaxregister_decrease(config.frontend_registers)
            if warp < config.num_dispatch_warps:
                if lane == 0:
                    worker = cta * config.num_dispatch_warps + warp
                    mine = warp * NUM_PULL_BUFFERS
                    pull(
                        launch, received, buffers + mine * budget.piece_bytes, pull_barriers + mine,
                        zeros, worker, num_ctas * config.num_dispatch_warps, budget.piece_bytes,
                        NUM_PULL_BUFFERS, budget.zero_bytes,
                    )  # fmt: skip
                    if warp == 0:
                        sync.mark(launch, "last_pull")
                arch.sync_warp()
                reduce_early(launch, flags, warp, config.num_dispatch_warps, lane)
                arch.barrier_arrive(
                    barrier_id=HANDOVER_BARRIER, number_of_threads=self.handover_threads
                )
            elif warp == WARP_LOAD_WEIGHTS:
                self.load_weights(
                    launch, gate_up_atom, gate_up, down_atom, down, smem_b, received,
                    pipes, lane,
                )  # fmt: skip
            elif warp == WARP_LOAD_TOKENS:
                self.load_tokens(
                    launch, tokens_atom, tokens, hiddens_atom, hiddens, smem_a, pipes, lane,
                )  # fmt: skip
        else:
            arch.setmaxregister_increase(config.math_registers)
            self.math(launch, mma, smem_a, smem_b, staging, pipes, warp - 4, lane)
            threads = 128 * config.num_math_warpgroups
            combine(
                launch, flags, thread - 128, epoch, MATH_BARRIER, threads,
                HANDOVER_BARRIER, self.handover_threads,
            )  # fmt: skip

    def partition(self, atom, smem, tensor, box, coordinate):
        """(shared side, global side) of one operand's TMA copies along K."""
        tile = cute.local_tile(tensor, box, coordinate)
        return cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(smem, 0, 2), cute.group_modes(tile, 0, 2)
        )

    @cute.jit
    def load_stages(self, atom, sides, pipes, position, k_blocks, rows, num_bytes, lane):
        """Load `k_blocks` K blocks of one operand into consecutive stages, from ring position
        `position`. A stage takes one box from each of `sides`; all but the first only if `rows`
        reach into it. `num_bytes`: of the boxes together.
        """
        stages = self.kernel_config.num_stages
        for k in cutlass.range(k_blocks, unroll=1):
            stage = (position + k) % stages
            full = pipes.full + stage
            arch.mbarrier_wait(pipes.empty + stage, ((position + k) // stages + 1) % 2)
            if lane == 0:
                arch.mbarrier_arrive_and_expect_tx(full, num_bytes)
            arch.sync_warp()
            for part in range_constexpr(len(sides)):
                to, source = sides[part]
                if part == 0 or rows > part * WARPGROUP_ROWS:
                    cute.copy(atom, source[None, k], to[None, stage], tma_bar_ptr=full)

    def k_blocks(self, phase: int) -> int:
        """K blocks of an FC1 or FC2 tile."""
        config = self.config
        columns = config.hidden_size if phase == schedule.PHASE_FC1 else config.intermediate_size
        return columns // self.kernel_config.block_k

    @cute.jit
    def load_weights(
        self, launch, gate_up_atom, gate_up, down_atom, down, smem_b, received, pipes, lane
    ):
        """Take tickets, hand tiles over, load weight tiles. Waits only for free queue slots and
        stages.
        """
        shape, config = self.shape, self.kernel_config
        box, num_bytes = (config.block_n, config.block_k), self.budget.b_stage_bytes
        tickets = global_ptr(address(launch, "load_balance_counter"))
        stream = shape.stream(launch.num_ctas)
        walk = schedule.start_walk(received, Int32(shape.experts))
        position = Int32(0)
        handed = Int32(0)
        running = Int32(1)
        while running == 1:
            ticket = Int32(0)
            if lane == 0:
                ticket = arch.atomic_add(tickets, Int32(1), sem="relaxed", scope="gpu")
            ticket = arch.shuffle_sync(ticket, 0)
            walk = schedule.seek_walk(walk, ticket, received, *stream)
            slot = handed % QUEUE_SLOTS
            arch.mbarrier_wait(pipes.queue_empty + slot, (handed // QUEUE_SLOTS + 1) % 2)
            tile = schedule.Tile(Int32(0), Int32(0), Int32(0))
            rows = Int32(0)
            if walk.phase != schedule.PHASE_DONE:
                tile = schedule.tile_of(walk, ticket)
                rows = schedule.rows_in_block(received[walk.expert], tile.block, config.block_m)
            if lane == 0:
                entry = pipes.queue + slot * QUEUE_WORDS
                entry[0] = walk.phase
                entry[1] = tile.pool
                entry[2] = tile.column
                entry[3] = rows
                arch.mbarrier_arrive(pipes.queue_full + slot)
            arch.sync_warp()
            handed += 1
            place = (tile.column, None, walk.expert)
            if walk.phase == schedule.PHASE_FC1:
                sides = [self.partition(gate_up_atom, smem_b, gate_up, box, place)]
                k_blocks = self.k_blocks(schedule.PHASE_FC1)
                self.load_stages(
                    gate_up_atom, sides, pipes, position, k_blocks, rows, num_bytes, lane
                )
                position += k_blocks
            elif walk.phase == schedule.PHASE_FC2:
                sides = [self.partition(down_atom, smem_b, down, box, place)]
                k_blocks = self.k_blocks(schedule.PHASE_FC2)
                self.load_stages(down_atom, sides, pipes, position, k_blocks, rows, num_bytes, lane)
                position += k_blocks
            else:
                running = Int32(0)

    @cute.jit
    def load_rows(self, atom, tensor, smem_a, pipes, position, k_blocks, block, rows, lane):
        """Load the rows of one pool block over K: one box per math warpgroup that has real rows."""
        box = (WARPGROUP_ROWS, self.kernel_config.block_k)
        boxes = self.kernel_config.num_math_warpgroups
        box_bytes = self.budget.a_stage_bytes // boxes
        sides = []
        for half in range_constexpr(boxes):
            smem_box = cute.local_tile(smem_a, box, (half, 0, None))
            place = (block * boxes + half, None)
            sides.append(self.partition(atom, smem_box, tensor, box, place))
        num_bytes = Int32(box_bytes)
        for half in range_constexpr(1, boxes):
            if rows > half * WARPGROUP_ROWS:
                num_bytes += box_bytes
        self.load_stages(atom, sides, pipes, position, k_blocks, rows, num_bytes, lane)

    @cute.jit
    def take_tile(self, pipes, taken, lane):
        """The next tile of the queue: (phase, pool block, column, real rows)."""
        slot = taken % QUEUE_SLOTS
        arch.mbarrier_wait(pipes.queue_full + slot, (taken // QUEUE_SLOTS) % 2)
        entry = pipes.queue + slot * QUEUE_WORDS
        phase, pool, column, rows = entry[0], entry[1], entry[2], entry[3]
        arch.sync_warp()
        if lane == 0:
            arch.mbarrier_arrive(pipes.queue_empty + slot)
        return phase, pool, column, rows

    @cute.jit
    def load_tokens(self, launch, tokens_atom, tokens, hiddens_atom, hiddens, smem_a, pipes, lane):
        """Wait until a tile's rows are ready, then load them."""
        shape, role = self.shape, faults.ROLE_LOAD_TOKENS
        position = Int32(0)
        taken = Int32(0)
        running = Int32(1)
        waited_tokens, waited_hidden = Int64(0), Int64(0)  # ns, if the kernel is built to trace
        while running == 1:
            phase, pool, _column, rows = self.take_tile(pipes, taken, lane)
            taken += 1
            block = pool % shape.ring
            began = sync.trace_clock(launch)
            if phase == schedule.PHASE_FC1:
                sync.wait_for(launch, "l1_arrival_count", pool, 0, rows, role, "gpu")
                waited_tokens += sync.trace_clock(launch) - began
                if taken == 1:
                    sync.mark(launch, "first_tile")
                arch.fence_proxy("async.global")
                k_blocks = self.k_blocks(schedule.PHASE_FC1)
                self.load_rows(
                    tokens_atom, tokens, smem_a, pipes, position, k_blocks, block, rows, lane
                )
                position += k_blocks
            elif phase == schedule.PHASE_FC2:
                done = Int32(shape.fc1_done)
                sync.wait_for(launch, "fc1_done_counter", pool, 0, done, role, "gpu")
                waited_hidden += sync.trace_clock(launch) - began
                arch.fence_proxy("async.global")
                k_blocks = self.k_blocks(schedule.PHASE_FC2)
                self.load_rows(
                    hiddens_atom, hiddens, smem_a, pipes, position, k_blocks, block, rows, lane
                )
                position += k_blocks
            else:
                running = Int32(0)
        if lane == 0:
            sync.record(launch, "wait_tokens_ns", waited_tokens)
            sync.record(launch, "wait_hidden_ns", waited_hidden)

    @cute.jit
    def math(self, launch, mma, smem_a, smem_b, staging, pipes, warp, lane):
        """Compute tiles in the order handed over; warp is 0..7, its rows 16 * warp .. of the
        tile.
        """
        config = self.kernel_config
        stages, full, empty = config.num_stages, pipes.full, pipes.empty
        part = mma.get_slice(launch.thread - 128)
        a = mma.make_fragment_A(part.partition_A(smem_a))
        b = mma.make_fragment_B(part.partition_B(smem_b))
        tile = part.partition_shape_C((config.block_m, config.block_n))
        accumulator = cute.make_rmem_tensor(tile, Float32)
        mine = staging + warp * PASS_BYTES
        position = Int32(0)
        taken = Int32(0)
        running = Int32(1)
        while running == 1:
            phase, pool, column, rows = self.take_tile(pipes, taken, lane)
            taken += 1
            if phase == schedule.PHASE_DONE:
                running = Int32(0)
            else:
                k_blocks = Int32(self.k_blocks(schedule.PHASE_FC1))
                if phase == schedule.PHASE_FC2:
                    k_blocks = Int32(self.k_blocks(schedule.PHASE_FC2))
                if rows > (warp // 4) * WARPGROUP_ROWS:
                    mainloop.accumulate(
                        mma, accumulator, a, b, full, empty, position, k_blocks, lane, stages
                    )
                    if phase == schedule.PHASE_FC1:
                        epilogue.store_fc1(launch, accumulator, mine, warp, lane, pool, column)
                    else:
                        epilogue.store_fc2(launch, accumulator, mine, warp, lane, pool, column)
                else:
                    mainloop.skip(full, empty, position, k_blocks, lane, stages)
                if phase == schedule.PHASE_FC1:
                    epilogue.report_fc1(launch, lane, pool)
                else:
                    epilogue.report_fc2(launch, lane, pool)
                position += k_blocks
        if warp == 0 and lane == 0:
            sync.mark(launch, "last_tile")
