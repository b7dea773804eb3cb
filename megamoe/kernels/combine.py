"""Combine: add the slots of every token, pass the last barrier, clean up.

A CTA reduces the tokens cta, cta + num_ctas, ... Its dispatch warp, once it has pulled, and its
report warp begin while GEMMs still run, with tokens whose slots have all come in
(`combine_arrival_count`). When the math warps have ended their tiles and all are reported,
they pass the barrier after which every slot of this rank is filled, stop those two and do the rest.
Both ways add in slot order, so the bits do not depend on who did it.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr, range_constexpr

from megamoe import faults
from megamoe.budget import FLAG_OK, FLAG_STOP
from megamoe.config import COMBINE
from megamoe.kernels import sync
from megamoe.kernels.dispatch import read_expert
from megamoe.kernels.launch import Launch, address
from megamoe.kernels.ptx import (
    global_ptr,
    load_acquire,
    load_global_v4_if,
    load_shared_volatile,
    nanosleep,
    pack_bf16x2,
    store_global_v4,
    store_shared_volatile,
    unpack_bf16x2,
)
from megamoe.ordering import COMBINED, EARLY, HANDOVER, MATH_WARPS, TOKEN_IN
from megamoe.regions import BARRIERS_PER_LAUNCH, SLOTS_ADDED, SLOTS_IN
from megamoe.schedule import ceil_div

arch = cute.arch

VECTOR_BYTES = 16
MIN_EARLY_TOKENS = 8  # of a CTA: with fewer, polling costs more than the late reduce
IDLE_NS = 500  # sleep of a warp that found nothing to reduce
EARLY_WORKERS = len(EARLY)  # warps of a CTA that reduce early
LOADS_IN_FLIGHT = 8  # slots that a lane loads before it adds, 16 bytes each
WARP_BYTES = 32 * VECTOR_BYTES  # columns that a warp reduces with one load per lane and slot


@cute.jit
def combine(launch: Launch, flag_smem, thread, epoch):
    """The math warps, of which this is thread `thread`: barrier over all ranks, then clean-up and
    what is left of the reduce.
    """
    threads = MATH_WARPS.threads(launch.shape.kernel)
    role, target = faults.ROLE_COMBINE, epoch + BARRIERS_PER_LAUNCH
    sync.nvlink_barrier(launch, flag_smem, thread, COMBINED, target, role, MATH_WARPS)
    if thread == 0:
        sync.mark(launch, "combined")
        store_shared_volatile(flag_smem + FLAG_STOP, Int32(1))
    if flag_smem[FLAG_OK] == 1:
        clean_up(launch, thread, epoch, threads)
    sync.cta_barrier(launch, HANDOVER)  # nobody else reduces any more
    if const_expr(launch.shape.kernel.runs(COMBINE)):
        if flag_smem[FLAG_OK] == 1:
            reduce_rest(launch, thread, threads)
    if thread == 0:
        sync.mark(launch, "end")
        sync.mark_cycles(launch, "end_cycles")


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
    for name in launch.shape.counters:
        zero(launch, name, first, stride)
    if first == 0:
        counter = global_ptr(address(launch, "nvlink_barrier_counter"))
        arch.store(counter, epoch + BARRIERS_PER_LAUNCH, sem="relaxed", scope="gpu")
        reported = global_ptr(address(launch, "abort_flag", 0, sync.REPORTED_WORD))
        arch.store(reported, Int32(0), sem="relaxed", scope="gpu")


@cute.jit
def live_slots(launch: Launch, token, lane) -> Int32:
    """Bit k is set if slot k of `token` is neither masked nor invalid; for a whole warp."""
    top_k, slots = launch.shape.config.top_k, launch.shape.config.slots_per_token
    expert = Int32(-1)
    if lane < top_k:
        expert = read_expert(launch, token * top_k + lane, False)
    if const_expr(slots > top_k):
        if lane >= top_k and lane < slots:  # of a shared expert
            expert = Int32(0)
    return arch.vote_ballot_sync(expert >= 0)


@cute.jit
def reduce_piece(launch: Launch, token, live, piece, lane, vectors: Constexpr):
    """y[token] = sum over live slots, in slot order, in float32, for one piece of the columns:
    `vectors` x 512 bytes, 16 bytes per lane and vector.
    """
    row_bytes = launch.shape.output_row_bytes
    for vector in range_constexpr(vectors):
        column = (piece * vectors + vector) * WARP_BYTES + lane * VECTOR_BYTES
        if column < row_bytes:
            sums = cute.make_rmem_tensor((8,), Float32)
            sums.fill(0.0)
            source = address(launch, "combine_output", token) + column
            num_slots = launch.shape.config.slots_per_token
            for first in range_constexpr(0, num_slots, LOADS_IN_FLIGHT):
                slots = range(first, min(first + LOADS_IN_FLIGHT, num_slots))
                loaded = [
                    load_global_v4_if(source + Int64(k) * row_bytes, (live >> k) & 1) for k in slots
                ]
                for words in loaded:
                    for i in range_constexpr(4):
                        low, high = unpack_bf16x2(words[i])
                        sums[2 * i] += low
                        sums[2 * i + 1] += high
            packed = [pack_bf16x2(sums[2 * i], sums[2 * i + 1]) for i in range(4)]
            store_global_v4(launch.y + Int64(token) * row_bytes + column, packed)


@cute.jit
def own_tokens(launch: Launch) -> Int32:
    """Tokens that this CTA reduces: cta, cta + num_ctas, ..."""
    return ceil_div(launch.num_tokens - launch.cta, launch.num_ctas)


@cute.jit
def arrivals(launch: Launch, own, number) -> Int32:
    """State of own token number `number`: below SLOTS_IN while slots are missing."""
    state = Int32(SLOTS_ADDED)
    if number < own:
        if const_expr(launch.shape.kernel.only == COMBINE):
            state = Int32(SLOTS_IN)  # nobody fills slots: what they hold is added
        else:
            token = launch.cta + number * launch.num_ctas
            counter = global_ptr(address(launch, TOKEN_IN.region, token))
            state = arch.load(counter, Int32, sem="relaxed", scope=TOKEN_IN.scope)
    return state


@cute.jit
def told_to_stop(flag_smem) -> Int32:
    """1 once the math warps take over; the same for the whole warp."""
    return arch.shuffle_sync(load_shared_volatile(flag_smem + FLAG_STOP), 0)


class Reducing(NamedTuple):
    """Where a warp that reduces early is. Its own tokens are number worker, worker + EARLY_WORKERS,
    ... of the CTA's.
    """

    left: Int32  # own tokens that it has not reduced; 0 as well if it had better not begin
    look: Int32  # it looks at 32 of them from here on
    ready: Int32  # a bit for each of those whose slots are in and that is not done
    live: Int32  # live slots of the first of these
    piece: Int32  # next piece of it


@cute.jit
def start_reducing(launch: Launch, worker) -> Reducing:
    """Early reduce before its first step."""
    own, zero = own_tokens(launch), Int32(0)
    left = Int32(0)
    if const_expr(launch.shape.kernel.only == ""):
        if own >= MIN_EARLY_TOKENS:
            left = ceil_div(own - worker, EARLY_WORKERS)
    return Reducing(left, zero, zero, zero, zero)


@cute.jit
def reduce_step(launch: Launch, state: Reducing, worker, lane) -> Reducing:
    """One piece of a token whose slots are in, or else a look for such tokens, and a pause if the
    last of them are not in either.
    """
    own = own_tokens(launch)
    left, look, ready, live, piece = state
    if ready == 0:
        number = worker + EARLY_WORKERS * (look + lane)
        ready = arch.vote_ballot_sync(arrivals(launch, own, number) == SLOTS_IN)
        if ready == 0:
            look += 32
            if worker + EARLY_WORKERS * look >= own:
                look = Int32(0)
                nanosleep(Int32(IDLE_NS))
    else:
        number = worker + EARLY_WORKERS * (look + arch.popc((ready & -ready) - 1))
        token = launch.cta + number * launch.num_ctas
        counter = global_ptr(address(launch, TOKEN_IN.region, token))
        if piece == 0:
            load_acquire(counter, TOKEN_IN.scope)
            live = live_slots(launch, token, lane)
        reduce_piece(launch, token, live, piece, lane, 1)
        piece += 1
        if piece == ceil_div(launch.shape.output_row_bytes, WARP_BYTES):
            arch.store(counter, Int32(SLOTS_ADDED), sem="relaxed", scope=TOKEN_IN.scope)
            ready = ready & (ready - 1)
            left -= 1
            piece = Int32(0)
    return Reducing(left, look, ready, live, piece)


@cute.jit
def reduce_early(launch: Launch, state: Reducing, flag_smem, worker, lane):
    """Reduce own tokens as their slots come in, until none is left or the math warps take over: a
    token that is half done then is done again.
    """
    while state.left > 0 and told_to_stop(flag_smem) == 0:
        state = reduce_step(launch, state, worker, lane)


@cute.jit
def reduce_rest(launch: Launch, thread, threads: Constexpr):
    """Math warps, after the barrier: the own tokens that are not done, all warps on each."""
    own = own_tokens(launch)
    lane, warp = thread % 32, thread // 32
    pieces = ceil_div(launch.shape.output_row_bytes, 2 * WARP_BYTES)
    for start in range(0, own, 32):
        ready = arch.vote_ballot_sync(arrivals(launch, own, start + lane) == SLOTS_IN)
        while ready != 0:
            number = start + arch.popc((ready & -ready) - 1)
            token = launch.cta + number * launch.num_ctas
            live = live_slots(launch, token, lane)
            for piece in range(warp, pieces, threads // 32):
                reduce_piece(launch, token, live, piece, lane, 2)
            ready = ready & (ready - 1)
