"""Combine: the barrier after which every slot of this rank is filled, the clean-up, and the reduce.

Runs on the math warpgroups: when they have finished their tiles and every rank has passed the
barrier, all pulls and loads are long consumed, so the front-end warps need not take part.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, range_constexpr

from megamoe import faults
from megamoe.kernels import sync
from megamoe.kernels.dispatch import read_expert
from megamoe.kernels.launch import Launch, address
from megamoe.kernels.ptx import (
    global_ptr,
    load_global_v4,
    pack_bf16x2,
    store_global_v4,
    unpack_bf16x2,
)
from workspace.layout import BARRIERS_PER_LAUNCH, GRID_COMBINED

arch = cute.arch

VECTOR_BYTES = 16


@cute.jit
def combine(launch: Launch, flag_smem, thread, epoch, barrier_id: Constexpr, threads: Constexpr):
    """Barrier over all ranks, then clean-up and reduce by `threads` threads of the CTA."""
    sync.nvlink_barrier(
        launch,
        flag_smem,
        thread,
        GRID_COMBINED,
        epoch + 2,
        faults.ROLE_COMBINE,
        barrier_id,
        threads,
    )
    if thread == 0:
        sync.mark(launch, "combined")
    if flag_smem[0] == 1:
        clean_up(launch, thread, epoch, threads)
        reduce(launch, thread, threads)
    if thread == 0:
        sync.mark(launch, "end")


@cute.jit
def zero(launch: Launch, name: Constexpr, first, stride):
    """Zero an int32 region, thread `first` of `stride` over the whole grid."""
    region = launch.shape.layout[name]
    words = region.num_bytes // 4
    start = global_ptr(address(launch, name))
    for word in range(first, words, stride):
        arch.store(start + word, Int32(0), sem="relaxed", scope="gpu")


@cute.jit
def clean_up(launch: Launch, thread, epoch, threads: Constexpr):
    """Return counters to rest. Padding metadata is already clean: FC2 zeroes a block when it frees
    it.
    """
    first = launch.cta * threads + thread
    stride = launch.num_ctas * threads
    for name in (
        "grid_sync_counter",
        "load_balance_counter",
        "expert_send_count",
        "l1_arrival_count",
        "fc1_done_counter",
        "fc2_done_counter",
    ):
        zero(launch, name, first, stride)
    if first == 0:
        counter = global_ptr(address(launch, "nvlink_barrier_counter"))
        arch.store(counter, epoch + BARRIERS_PER_LAUNCH, sem="relaxed", scope="gpu")
        reported = global_ptr(address(launch, "abort_flag", 0, sync.REPORTED_WORD))
        arch.store(reported, Int32(0), sem="relaxed", scope="gpu")


@cute.jit
def reduce(launch: Launch, thread, threads: Constexpr):
    """y[t] = sum over live slots k, in slot order, in float32. One warp per (token, 256
    columns).
    """
    top_k = launch.shape.config.top_k
    row_bytes = launch.shape.output_row_bytes
    piece_bytes = 32 * VECTOR_BYTES
    pieces = (row_bytes + piece_bytes - 1) // piece_bytes
    lane = thread % 32
    warp = launch.cta * (threads // 32) + thread // 32
    units = launch.num_tokens * pieces
    for unit in range(warp, units, launch.num_ctas * (threads // 32)):
        token = unit // pieces
        column = (unit % pieces) * piece_bytes + lane * VECTOR_BYTES
        live = Int32(-1)
        if lane < top_k:
            live = read_expert(launch, token * top_k + lane, False)
        mask = arch.vote_ballot_sync(live >= 0)
        if column < row_bytes:
            sums = cute.make_rmem_tensor((8,), Float32)
            sums.fill(0.0)
            source = address(launch, "combine_output", token) + column
            for k in range_constexpr(top_k):
                words = cute.make_rmem_tensor((4,), Int32)
                words.fill(0)
                if (mask >> k) & 1 == 1:
                    w0, w1, w2, w3 = load_global_v4(source + Int64(k) * row_bytes)
                    words[0], words[1], words[2], words[3] = w0, w1, w2, w3
                for i in range_constexpr(4):
                    low, high = unpack_bf16x2(words[i])
                    sums[2 * i] += low
                    sums[2 * i + 1] += high
            packed = [pack_bf16x2(sums[2 * i], sums[2 * i + 1]) for i in range(4)]
            store_global_v4(launch.y + Int64(token) * row_bytes + column, packed)
