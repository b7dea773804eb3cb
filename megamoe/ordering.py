"""Every operation that orders what one role does before what another does, declared once.

The kernel takes scope, barrier number, arrivals and kind of fence from here; the budget makes its
mbarriers of the rows; time-outs, deadlocks and races are reported with who writes, who reads and
what a word must reach. Roles are those of the table that opens `kernels/sm90/kernel.py`.

Waits for flags are bounded. Those inside a CTA (mbarriers, barriers) depend only on warps whose own
waits are bounded, so they end too. Flags are compared by signed difference: epochs may wrap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megamoe.config import GEMMS, KernelConfig

#: Roles of the first warpgroup's warps, in order; all others compute.
FRONTEND = ("dispatch", "report", "load_weights", "load_tokens")
MATH = "math"
#: Roles that add slots of tokens while GEMMs run.
EARLY = ("dispatch", "report")


@dataclass(frozen=True)
class Flag:
    """A word in global memory. Who writes releases at `scope`, who waits acquires at it.

    region, row: where; row None: every row is such a flag. target: what the word must reach.
    guards: regions and parts of shared memory whose accesses it orders.
    """

    region: str
    writer: str
    reader: str
    target: str
    scope: str
    reset: str
    row: int | None = None
    guards: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return self.region if self.row is None else f"{self.region}[{self.row}]"

    def __str__(self) -> str:
        return f"{self.writer} -> {self.reader}, {self.target}"


GRID = "grid_sync_counter"
COUNTED = Flag(
    GRID, "every CTA", "every CTA", "number of CTAs", "gpu", "clean-up", 0, ("expert_send_count",)
)
DISPATCHED = Flag(GRID, "every CTA", "the last to arrive", "number of CTAs", "gpu", "clean-up", 1)
COMBINED = Flag(GRID, "every CTA", "the last to arrive", "number of CTAs", "gpu", "clean-up", 2)
RANKS_MET = Flag(
    "nvlink_barrier_signal", "last CTA of every rank", "every CTA of every rank",
    "epoch + 1 after count, + 2 before the last of the reduce", "sys", "never",
    guards=("launched_layer", "expert_recv_count", "routed_record", "input_token_buffer",
            "input_scale_buffer"),
)  # fmt: skip
TOKENS_IN = Flag(
    "l1_arrival_count", "dispatch", "load_tokens", "rows of the block", "gpu", "clean-up",
    guards=("l1_token_buffer", "l1_scale_buffer", "l1_topk_weights_buffer"),
)  # fmt: skip
FC1_DONE = Flag(
    "fc1_done_counter", "report", "load_tokens", "FC1 tiles of the block", "gpu", "clean-up",
    guards=("fc1_output", "fc1_output_scale"),
)  # fmt: skip
FC2_DONE = Flag(
    "fc2_done_counter", "report", "report, dispatch",
    "FC2 tiles of the block, 1 more when its ring slot is clean", "gpu", "clean-up",
    guards=("token_src_metadata",),
)  # fmt: skip
TOKEN_IN = Flag(
    "combine_arrival_count", "report of every rank", "dispatch, report, math",
    "0 from minus the live slots of the token", "sys", "set anew by count",
    guards=("combine_output",),
)  # fmt: skip
FLAGS = COUNTED, DISPATCHED, COMBINED, RANKS_MET, TOKENS_IN, FC1_DONE, FC2_DONE, TOKEN_IN


@dataclass(frozen=True)
class Mbarrier:
    """One or more mbarriers that are used in turn; `ring` says what they are numbered by.

    writer: who arrives; arrivals: how many of a phase, beside the bytes of copies.
    """

    name: str
    ring: str
    writer: str
    reader: str
    arrivals: Callable[[KernelConfig], int]
    guards: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return self.name

    def __str__(self) -> str:
        return f"{self.writer} -> {self.reader}"


LANES = 32
MBARRIERS = (
    Mbarrier("full", "stage", "load_tokens, load_weights", MATH, lambda kernel: 2,
             ("a", "b", "row_scales")),
    # One arrival a math warp, or two of each of the four that compute a tile alone.
    Mbarrier("empty", "stage", MATH, "load_tokens, load_weights",
             lambda kernel: kernel.num_math_warps),
    Mbarrier("queue_full", "tile", "load_weights", "load_tokens, report, math", lambda kernel: 1,
             ("queue", "weight_scales")),
    Mbarrier("queue_empty", "tile", "load_tokens, report, math", "load_weights",
             lambda kernel: 2 + kernel.num_math_warps),
    # Every lane has stored some.
    Mbarrier("metadata_full", "tile", "load_tokens", MATH, lambda kernel: LANES,
             ("metadata", "token_scales", "row_factors")),
    Mbarrier("stored", "tile", MATH, "report", lambda kernel: kernel.num_math_warps),
    # The warps of the one that computes alone.
    Mbarrier("multiplied", "warpgroup", MATH, "the other math warpgroup",
             lambda kernel: kernel.num_math_warps // kernel.num_math_warpgroups),
    Mbarrier("pulled", "piece", "dispatch", "dispatch", lambda kernel: 1,
             ("pull_rows", "pull_scales")),
)  # fmt: skip


@dataclass(frozen=True)
class CtaBarrier:
    """A named barrier of a CTA, which the math warps wait at; number 0 is for all its threads.

    arrives: roles that arrive and go on.
    """

    number: int
    arrives: tuple[str, ...]
    guards: tuple[str, ...] = ()

    def threads(self, kernel: KernelConfig) -> int:
        if self == WHOLE_CTA:
            return kernel.num_threads
        # Without tiles nobody waits for pulled rows, so the dispatch warp tells when it has done.
        alone = self == REPORTED and not kernel.runs(GEMMS)
        return LANES * (len(self.arrives) + alone + kernel.num_math_warps)

    @property
    def place(self) -> str:
        return f"barrier {self.number}"

    def __str__(self) -> str:
        if self == WHOLE_CTA:
            return "every thread"
        return " -> ".join(filter(None, (", ".join(self.arrives), MATH)))


WHOLE_CTA = CtaBarrier(0, ())
MATH_WARPS = CtaBarrier(1, (), ("maxima",))
REPORTED = CtaBarrier(2, ("report",))
HANDOVER = CtaBarrier(3, EARLY)
CTA_BARRIERS = WHOLE_CTA, MATH_WARPS, REPORTED, HANDOVER


@dataclass(frozen=True)
class Fence:
    """Accesses on either side that must be seen in order. kind: `async.global` and `async.shared`
    are between ordinary accesses and the async proxy's (TMA, bulk copies), `sys` is for other GPUs.
    """

    kind: str
    before: str
    after: str


SHARED_CLEARED = Fence("async.shared", "zeros stored by all", "TMA writes, bulk copies read them")
INPUT_STAGED = Fence("async.global", "the host of a peer stored its input", "bulk copies read it")
INPUT_QUANTIZED = Fence("async.global", "count stored its input", "bulk copies of all ranks")
SLOT_READ = Fence("async.global", "TMA has read the slot's old rows", "bulk copies of new ones")
SCALES_PULLED = Fence("async.global", "dispatch stored scales", "bulk copies of other CTAs")
ROWS_READY = Fence("async.global", "others stored rows and scales", "TMA and bulk copies read them")
FC1_STORED = Fence("async.global", "math stored rows and scales", "TMA of other CTAs")
RANK_DONE = Fence("sys", "all of the CTA", "its arrival, the last of which tells the other ranks")
ROWS_SENT = Fence("sys", "all rows of a block are in their slots", "the counts of their tokens")


def explanations() -> dict[str, str]:
    """What reports add to the name of a flag, a barrier, and what these guard."""
    texts = {}
    rows: tuple[Flag | Mbarrier | CtaBarrier, ...] = (*FLAGS, *MBARRIERS, *CTA_BARRIERS)
    for row in rows:
        texts[row.place] = str(row)
        for name in row.guards:
            texts[name] = f"ordered by {row.place}: {row}"
    return texts


def flag_of(region: str, row: int) -> Flag | None:
    """The flag in this row of a region; None if nobody waits there."""
    return next((flag for flag in FLAGS if flag.region == region and flag.row in (None, row)), None)
