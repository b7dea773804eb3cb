"""Waiting and signalling: bounded waits for the flags of `ordering`, the error record, and the
barrier over all ranks.

A rank that gives up writes `abort_flag` on every rank; who waits looks there now and then.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, Int64, const_expr, range_constexpr

from megamoe import faults, wire
from megamoe.budget import FLAG_LAST, FLAG_OK
from megamoe.kernels.launch import Launch, address, peer_address
from megamoe.kernels.ptx import global_ptr, global_timer, load_acquire
from megamoe.ordering import RANK_DONE, RANKS_MET, WHOLE_CTA
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
def wait_for(launch: Launch, flag: Constexpr, index, expected, role: Constexpr) -> Int32:
    """Wait until the word of `flag` in row `index` reaches `expected`, then acquire; 1, or 0 if the
    launch aborts.

    Polls relaxed, because an acquire on every poll would flush L1; the one acquire at the end
    orders what follows.
    """
    word = global_ptr(address(launch, flag.region, index))
    seen = arch.load(word, Int32, sem="relaxed", scope=flag.scope)
    ok = Int32(1)
    if seen - expected < 0:
        limit = launch.start_timeout_ns if role == faults.STARTING else launch.timeout_ns
        deadline = global_timer() + limit
        polls = Int32(0)
        while seen - expected < 0 and ok == 1:
            seen = arch.load(word, Int32, sem="relaxed", scope=flag.scope)
            if polls % POLLS_PER_CHECK == 0:
                peer = abort_word(launch, PEER_WORD)
                if abort_word(launch, ABORT_WORD) != 0:
                    ok = Int32(0)
                elif peer != 0 or global_timer() > deadline:
                    ok = Int32(0)
                    region = launch.shape.layout.index(flag.region)
                    cause = faults.TIMED_OUT
                    give_up(launch, cause, role, region, Int32(index), expected, seen, peer)
            polls += 1
    load_acquire(word, flag.scope)
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
def signal(launch: Launch, flag: Constexpr, index):
    """Add 1 to the word of `flag` in row `index` on this rank, with release.

    Precondition: the caller's earlier writes, and those of threads it has synchronised with, are
    what is released; bulk copies must have been waited for in full.
    """
    arch.red(
        global_ptr(address(launch, flag.region, index)),
        Int32(1),
        op="add",
        dtype="s32",
        sem="release",
        scope=flag.scope,
    )


@cute.jit
def fence_system(fence: Constexpr):
    """A fence of `ordering` that other GPUs see."""
    assert fence.kind == "sys", fence
    arch.fence_acq_rel_sys()


@cute.jit
def cta_barrier(launch: Launch, barrier: Constexpr):
    """Wait at a barrier of `ordering`."""
    threads = barrier.threads(launch.shape.kernel)
    arch.barrier(barrier_id=barrier.number, number_of_threads=threads)


@cute.jit
def arrive(launch: Launch, barrier: Constexpr):
    """A warp arrives at a barrier of `ordering` and goes on."""
    threads = barrier.threads(launch.shape.kernel)
    arch.barrier_arrive(barrier_id=barrier.number, number_of_threads=threads)


@cute.jit
def grid_sync(launch: Launch, flag_smem, flag: Constexpr, role: Constexpr):
    """Barrier over the CTAs of this rank; `flag_smem[FLAG_OK]` becomes 0 if the wait failed."""
    cta_barrier(launch, WHOLE_CTA)
    if launch.thread == 0:
        signal(launch, flag, flag.row)
        if wait_for(launch, flag, flag.row, launch.num_ctas, role) == 0:
            flag_smem[FLAG_OK] = Int32(0)
    cta_barrier(launch, WHOLE_CTA)


@cute.jit
def nvlink_barrier(
    launch: Launch,
    flag_smem,
    thread,
    flag: Constexpr,
    target,
    role: Constexpr,
    barrier: Constexpr,
):
    """Barrier over all CTAs of all ranks with sys-scope release/acquire; `flag_smem[FLAG_OK]`
    becomes 0 if it failed. `flag` counts the CTAs of this rank, `barrier` is that of the threads
    that call this.

    The last CTA of a rank to arrive signals every rank, one thread per peer. A CTA that has aborted
    does not arrive, so peers never take an unfinished rank for a finished one.
    `flag_smem[FLAG_LAST]` is scratch.
    """
    ranks = launch.shape.config.num_ranks
    cta_barrier(launch, barrier)
    if thread == 0:
        last = Int32(0)
        if flag_smem[FLAG_OK] == 1:
            if abort_word(launch, ABORT_WORD) == 0:
                fence_system(RANK_DONE)
                counter = global_ptr(address(launch, flag.region, flag.row))
                arrived = arch.atomic_add(counter, Int32(1), sem="acq_rel", scope=flag.scope)
                if arrived == launch.num_ctas - 1:
                    last = Int32(1)
            else:  # its waits may all be satisfied
                flag_smem[FLAG_OK] = Int32(0)
        flag_smem[FLAG_LAST] = last
    cta_barrier(launch, barrier)
    if thread < ranks:
        if flag_smem[FLAG_LAST] == 1:
            remote = global_ptr(peer_address(launch, RANKS_MET.region, thread, launch.rank))
            scope = RANKS_MET.scope
            arch.red(remote, Int32(1), op="add", dtype="s32", sem="release", scope=scope)
        if wait_for(launch, RANKS_MET, thread, target, role) == 0:
            flag_smem[FLAG_OK] = Int32(0)
    cta_barrier(launch, barrier)


@cute.jit
def read_epoch(launch: Launch) -> Int32:
    """Epoch of the barriers at the start of this launch; nobody changes it before the clean-up."""
    return arch.load(
        global_ptr(address(launch, "nvlink_barrier_counter")), Int32, sem="relaxed", scope="gpu"
    )
