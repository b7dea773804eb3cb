"""Waiting and signalling: bounded waits, the error record, and the barrier over all ranks.

Flags, one line each (who writes -> who waits, target, scope, who resets):
  grid_sync_counter      every CTA -> all CTAs / the last arriver, C, gpu, clean-up
  nvlink_barrier_signal  last CTA of every rank -> all CTAs of all ranks, epoch + i, sys, never
  l1_arrival_count       dispatch warps -> load_tokens, rows of the block, gpu, clean-up
  fc1_done_counter       report warps -> load_tokens, tiles, gpu, clean-up
  fc2_done_counter       report warps and cleaner -> dispatch warps, tiles + 1, gpu, clean-up
  combine_arrival_count  cleaners of all ranks -> who reduces early, 0 from minus the live slots,
                         sys, set anew by count
A rank that gives up writes `abort_flag` on every rank; who waits looks there now and then.
Waits inside a CTA (mbarriers, named barriers) depend only on warps whose own waits are bounded, so
they end too.

Counters are compared by signed difference: epochs may wrap.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, Int64, const_expr, range_constexpr

from megamoe import faults, wire
from megamoe.budget import FLAG_LAST, FLAG_OK
from megamoe.kernels.launch import Launch, address, peer_address
from megamoe.kernels.ptx import global_ptr, global_timer, load_acquire
from megamoe.regions import TRACE_NAMES, TRACE_TILES, TileRecord

arch = cute.arch

#: Polls between two looks at the clock and the abort flag.
POLLS_PER_CHECK = 64
#: Words of `abort_flag`: this rank gave up; it has reported an invalid expert in this launch; a
#: peer gave up (`wire.encode_peer`).
ABORT_WORD, REPORTED_WORD, PEER_WORD = 0, 1, 2


@cute.jit
def write_record(
    launch: Launch, status, role: Constexpr, region: Constexpr, index, expected, seen, peer, high=0
):
    """Write the host-visible record, status last. `high`: upper half of a value seen that has 64
    bits.
    """
    words = faults.Record(
        status, launch.rank, role, region, index, expected, seen, launch.cta, peer, high
    )
    for word in range_constexpr(len(words)):
        if const_expr(word != faults.STATUS):
            arch.store(
                global_ptr(launch.record + 4 * word), Int32(words[word]), sem="relaxed", scope="sys"
            )
    arch.store(
        global_ptr(launch.record + 4 * faults.STATUS), Int32(status), sem="release", scope="sys"
    )


@cute.jit
def claim(launch: Launch, word: Constexpr) -> Boolean:
    """True for the first thread of the rank that sets this word of `abort_flag`."""
    flag = global_ptr(address(launch, "abort_flag", 0, word))
    return arch.atomic_cas(flag, cmp=Int32(0), val=Int32(1), sem="acq_rel", scope="gpu") == 0


@cute.jit
def abort_word(launch: Launch, word: Constexpr) -> Int32:
    flag = global_ptr(address(launch, "abort_flag", 0, word))
    return arch.load(flag, Int32, sem="relaxed", scope="sys")


@cute.jit
def give_up(
    launch: Launch, cause: Constexpr, role: Constexpr, region: Constexpr, index, expected, seen,
    peer: Int32,
):  # fmt: skip
    """End this rank's launch: the first caller writes the record and tells every peer the `cause`,
    a status of `faults`, unless a `peer` has told it (then not 0). A rank that has refused its
    input needs no record: its caller knows.

    The peers' waits then end at once, and so does any launch of theirs that comes later: nobody
    takes this rank's slots for finished, nobody waits a whole timeout for it.
    """
    if claim(launch, ABORT_WORD):
        status = Int32(cause)
        if peer != 0:
            status = Int32(faults.PEER_FAILED)
        if const_expr(cause != faults.REFUSED):
            write_record(launch, status, role, region, index, expected, seen, peer)
        if peer == 0:
            for rank in range(launch.shape.config.num_ranks):
                if rank != launch.rank:
                    word = global_ptr(peer_address(launch, "abort_flag", rank, 0, PEER_WORD))
                    told = wire.encode_peer(launch.rank, cause)
                    arch.store(word, told, sem="relaxed", scope="sys")


@cute.jit
def refuse(launch: Launch):
    """One thread of a CTA of a rank that has refused its input: tell the peers."""
    if launch.cta == 0:
        zero = Int32(0)
        give_up(launch, faults.REFUSED, faults.ROLE_COUNT, 0, zero, zero, zero, zero)


@cute.jit
def check_layer(launch: Launch, theirs):
    """Thread `launch.thread` has read that its rank launched layer `theirs`: give up if that is
    another layer than here. Tiles run on meanwhile, over addresses that are those of every layer of
    the workspace; the launch ends before its last barrier.
    """
    if theirs != launch.layer:
        region = launch.shape.layout.index("launched_layer")
        role, rank = faults.ROLE_COUNT, launch.thread
        give_up(launch, faults.WRONG_LAYER, role, region, rank, launch.layer, theirs, Int32(0))


@cute.jit
def report_unrecovered(launch: Launch):
    """One thread of a CTA that met the state of a failed launch: report it, unless reported."""
    if launch.cta == 0:
        status = global_ptr(launch.record + 4 * faults.STATUS)
        if arch.load(status, Int32, sem="relaxed", scope="sys") == faults.OK:
            zero = Int32(0)
            write_record(launch, Int32(faults.NOT_RECOVERED), 0, 0, zero, zero, zero, zero)


@cute.jit
def report_expert(launch: Launch, role: Constexpr, entry, low, high):
    """Report an invalid expert id of 64 bits, the first of a launch; but not over the record of a
    launch that has failed.
    """
    if claim(launch, REPORTED_WORD):
        if abort_word(launch, ABORT_WORD) == 0:
            experts = Int32(launch.shape.config.num_experts)
            bad = Int32(faults.BAD_EXPERT)
            write_record(launch, bad, role, 0, entry, experts, low, Int32(0), high)


@cute.jit
def wait_for(
    launch: Launch,
    name: Constexpr,
    index,
    word: Constexpr,
    expected,
    role: Constexpr,
    scope: Constexpr,
) -> Int32:
    """Wait until word `word` of row `index` of a region reaches `expected`, then acquire; 1, or 0
    if the launch aborts.

    Polls relaxed, because an acquire on every poll would flush L1; the one acquire at the end
    orders what follows.
    """
    flag = global_ptr(address(launch, name, index, word))
    seen = arch.load(flag, Int32, sem="relaxed", scope=scope)
    ok = Int32(1)
    if seen - expected < 0:
        limit = launch.start_timeout_ns if role == faults.STARTING else launch.timeout_ns
        deadline = global_timer() + limit
        polls = Int32(0)
        while seen - expected < 0 and ok == 1:
            seen = arch.load(flag, Int32, sem="relaxed", scope=scope)
            if polls % POLLS_PER_CHECK == 0:
                peer = abort_word(launch, PEER_WORD)
                if abort_word(launch, ABORT_WORD) != 0:
                    ok = Int32(0)
                elif peer != 0 or global_timer() > deadline:
                    ok = Int32(0)
                    region = launch.shape.layout.index(name)
                    cause = faults.TIMED_OUT
                    give_up(launch, cause, role, region, Int32(index), expected, seen, peer)
            polls += 1
    load_acquire(flag, scope)
    return ok


@cute.jit
def mark(launch: Launch, name: Constexpr):
    """Record the time of a mark of this CTA; nothing at all unless the kernel is built to trace."""
    record(launch, name, trace_clock(launch))


@cute.jit
def record(launch: Launch, name: Constexpr, value):
    """Record a value in the trace row of this CTA; nothing unless the kernel is built to trace."""
    if const_expr(launch.shape.kernel.trace):
        word = 2 * TRACE_NAMES.index(name)
        slot = global_ptr(address(launch, "trace", launch.cta, word), Int64, 8)
        arch.store(slot, Int64(value), sem="relaxed", scope="gpu")


@cute.jit
def record_tile(launch: Launch, number, phase, pool, column, times: Constexpr):
    """Record tile `number` of this CTA with three `times` of `trace_clock`; nothing unless the
    kernel is built to trace.
    """
    if const_expr(launch.shape.kernel.trace):
        if number < TRACE_TILES:
            code = wire.encode_tile(Int64(phase), Int64(pool), Int64(column))
            words = TileRecord._make((*times, code))
            row = address(launch, "tile_trace", launch.cta) + Int64(number) * (8 * len(words))
            for word in range_constexpr(len(words)):
                arch.store(
                    global_ptr(row + 8 * word, Int64, 8), words[word], sem="relaxed", scope="gpu"
                )


@cute.jit
def mark_cycles(launch: Launch, name: Constexpr):
    """Record the SM's cycle counter: with the times, the clock that the launch really had."""
    if const_expr(launch.shape.kernel.trace):
        record(launch, name, Int64(arch.clock64()))


@cute.jit
def trace_clock(launch: Launch) -> Int64:
    """Nanoseconds now, or 0 (and no instruction) unless the kernel is built to trace."""
    now = Int64(0)
    if const_expr(launch.shape.kernel.trace):
        now = global_timer()
    return now


@cute.jit
def signal(launch: Launch, name: Constexpr, index):
    """Add 1 to a counter of this rank with gpu-scope release.

    Precondition: the caller's earlier writes, and those of threads it has synchronised with, are
    what is released; bulk copies must have been waited for in full.
    """
    arch.red(
        global_ptr(address(launch, name, index)),
        Int32(1),
        op="add",
        dtype="s32",
        sem="release",
        scope="gpu",
    )


@cute.jit
def cta_barrier(barrier_id: Constexpr, num_threads: Constexpr):
    arch.barrier(barrier_id=barrier_id, number_of_threads=num_threads)


@cute.jit
def grid_sync(
    launch: Launch,
    flag_smem,
    which: Constexpr,
    role: Constexpr,
    barrier_id: Constexpr,
    threads: Constexpr,
):
    """Barrier over the CTAs of this rank; `flag_smem[FLAG_OK]` becomes 0 if the wait failed."""
    cta_barrier(barrier_id, threads)
    if launch.thread == 0:
        counter = global_ptr(address(launch, "grid_sync_counter", which))
        arch.red(counter, Int32(1), op="add", dtype="s32", sem="release", scope="gpu")
        if wait_for(launch, "grid_sync_counter", which, 0, launch.num_ctas, role, "gpu") == 0:
            flag_smem[FLAG_OK] = Int32(0)
    cta_barrier(barrier_id, threads)


@cute.jit
def nvlink_barrier(
    launch: Launch,
    flag_smem,
    thread,
    which: Constexpr,
    target,
    role: Constexpr,
    barrier_id: Constexpr,
    threads: Constexpr,
):
    """Barrier over all CTAs of all ranks with sys-scope release/acquire; `flag_smem[FLAG_OK]`
    becomes 0 if it failed.

    The last CTA of a rank to arrive signals every rank, one thread per peer. A CTA that has aborted
    does not arrive, so peers never take an unfinished rank for a finished one.
    `flag_smem[FLAG_LAST]` is scratch.
    """
    ranks = launch.shape.config.num_ranks
    cta_barrier(barrier_id, threads)
    if thread == 0:
        last = Int32(0)
        if flag_smem[FLAG_OK] == 1:
            if abort_word(launch, ABORT_WORD) == 0:
                arch.fence_acq_rel_sys()
                counter = global_ptr(address(launch, "grid_sync_counter", which))
                arrived = arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu")
                if arrived == launch.num_ctas - 1:
                    last = Int32(1)
            else:  # its waits may all be satisfied
                flag_smem[FLAG_OK] = Int32(0)
        flag_smem[FLAG_LAST] = last
    cta_barrier(barrier_id, threads)
    if thread < ranks:
        if flag_smem[FLAG_LAST] == 1:
            remote = global_ptr(peer_address(launch, "nvlink_barrier_signal", thread, launch.rank))
            arch.red(remote, Int32(1), op="add", dtype="s32", sem="release", scope="sys")
        if wait_for(launch, "nvlink_barrier_signal", thread, 0, target, role, "sys") == 0:
            flag_smem[FLAG_OK] = Int32(0)
    cta_barrier(barrier_id, threads)


@cute.jit
def read_epoch(launch: Launch) -> Int32:
    """Epoch of the barriers at the start of this launch; nobody changes it before the clean-up."""
    return arch.load(
        global_ptr(address(launch, "nvlink_barrier_counter")), Int32, sem="relaxed", scope="gpu"
    )
