"""Are rows that a CTA stores in a peer's memory there when another CTA tells the peer?

The last step of FC2 rests on it. Roles, a channel each, on both of two GPUs at once:

  X  stores a row in the peer, then releases a counter of its own GPU, at gpu scope
  Y  (another CTA) acquires the counter, fences at sys scope, and adds 1 to a counter of the peer,
     relaxed
  Z  (on the peer) waits for that counter, acquires it at sys scope, and compares every word of the
     row with what X must have stored; then gives the row back

X and Z share two rows, so that a row is in flight while another is checked. `fence=False` leaves
out Y's fence, to see what it does.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr, range_constexpr

from megamoe.kernels.ptx import (
    global_ptr,
    global_timer,
    load_acquire,
    load_global_v4_if,
    store_global_v4,
)
from tests.gpu.kernels.library import LINE, ROW_BYTES, ROWS

arch = cute.arch

THREADS = 128
PIECES = ROW_BYTES // (16 * THREADS)
#: Counters of a channel, a cache line each, behind all rows: X's, and those of the peer's Y and Z.
STORED, ARRIVED, TAKEN = range(3)
ROLES = 3
#: What a role finds wrong: words of `errors`.
WRONG, LATE = range(2)


@cute.jit
def counter(base, channels, channel, which: Constexpr):
    return global_ptr(
        base + Int64(channels) * (ROWS * ROW_BYTES) + Int64(channel * 3 + which) * LINE
    )


@cute.jit
def word_of(message, channel, index):
    """What word `index` of a message holds."""
    return message * Int32(-1640531527) + channel * Int32(97) + index


@cute.jit
def await_counter(flag, expected, scope: Constexpr, deadline) -> Int32:
    """1 once the counter has come to `expected`, which is then acquired; 0 past the deadline."""
    ok = Int32(1)
    seen = arch.load(flag, Int32, sem="relaxed", scope=scope)
    while seen - expected < 0 and ok == 1:
        seen = arch.load(flag, Int32, sem="relaxed", scope=scope)
        if global_timer() > deadline:
            ok = Int32(0)
    load_acquire(flag, scope)
    return ok


class PeerOrder:
    """`fence`: whether Y fences, as it must."""

    def __init__(self, fence: bool):
        self.fence = fence

    @cute.jit
    def __call__(
        self,
        mine: Int64,
        theirs: Int64,
        errors: Int64,
        timeout_ns: Int64,
        channels: Int32,
        messages: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(mine, theirs, errors, timeout_ns, channels, messages).launch(
            grid=(channels * ROLES, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, mine, theirs, errors, timeout_ns, channels, messages):
        thread, _, _ = arch.thread_idx()
        cta, _, _ = arch.block_idx()
        role, channel = cta % ROLES, cta // ROLES
        deadline = global_timer() + timeout_ns
        ok_smem = arch.alloc_smem(Int32, 1)
        if thread == 0:
            ok_smem[0] = Int32(1)
        arch.sync_threads()
        message = Int32(0)
        while message < messages and ok_smem[0] == 1:
            row = Int64(channel * ROWS + message % ROWS) * ROW_BYTES
            if role == 0:
                taken = counter(mine, channels, channel, TAKEN)
                if thread == 0:
                    if await_counter(taken, message - (ROWS - 1), "sys", deadline) == 0:
                        ok_smem[0] = Int32(0)
                arch.sync_threads()
                for piece in range(PIECES):
                    index = (piece * THREADS + thread) * 4
                    words = [word_of(message, channel, index + i) for i in range(4)]
                    store_global_v4(theirs + row + Int64(index) * 4, words)
                arch.sync_threads()
                if thread == 0:
                    arch.red(
                        counter(mine, channels, channel, STORED), Int32(1),
                        op="add", dtype="s32", sem="release", scope="gpu",
                    )  # fmt: skip
            elif role == 1:
                if thread == 0:
                    stored = counter(mine, channels, channel, STORED)
                    if await_counter(stored, message + 1, "gpu", deadline) == 0:
                        ok_smem[0] = Int32(0)
                    if const_expr(self.fence):
                        arch.fence_acq_rel_sys()
                    arch.red(
                        counter(theirs, channels, channel, ARRIVED), Int32(1),
                        op="add", dtype="s32", sem="relaxed", scope="sys",
                    )  # fmt: skip
                arch.sync_threads()
            else:
                arrived = counter(mine, channels, channel, ARRIVED)
                if thread == 0:
                    if await_counter(arrived, message + 1, "sys", deadline) == 0:
                        ok_smem[0] = Int32(0)
                arch.sync_threads()
                wrong = Int32(0)
                for piece in range(PIECES):
                    index = (piece * THREADS + thread) * 4
                    words = load_global_v4_if(mine + row + Int64(index) * 4, Int32(1))
                    for i in range_constexpr(4):
                        if words[i] != word_of(message, channel, index + i):
                            wrong += 1
                if wrong != 0 and ok_smem[0] == 1:
                    self.count(errors, WRONG, wrong)
                arch.sync_threads()
                if thread == 0:
                    arch.red(
                        counter(theirs, channels, channel, TAKEN), Int32(1),
                        op="add", dtype="s32", sem="release", scope="sys",
                    )  # fmt: skip
            message += 1
        if thread == 0 and ok_smem[0] == 0:
            self.count(errors, LATE, Int32(1))

    @cute.jit
    def count(self, errors, which: Constexpr, amount):
        flag = global_ptr(errors + 4 * which)
        arch.red(flag, amount, op="add", dtype="s32", sem="relaxed", scope="gpu")
