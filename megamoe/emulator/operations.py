"""Every ordering operation of the protocol by label: its kind, and why it is needed.

The roles name each operation by its label, and `Emulator(drop=label)` leaves it out. The mutation
test walks this table: dropping any operation must make a launch fail in its recipes, and only
there, except the few that are marked `redundant`, which must not.

Kinds, and what dropping one means:
- wait: the role goes on at once and acquires nothing.
- acquire: the wait or atomic still happens, relaxed.
- release: the atomic still happens, relaxed.
- increment: the atomic does not happen.
- fence: no sys-scope fence (`fence`) or no generic-to-async proxy fence (`proxy`).
- early: the step comes after the barrier or release that it belongs before.
- bulk: the asynchronous copy is not waited for.
- scope: performed at gpu scope instead of sys.
- barrier: CTA barrier or warp sync without effect.
- store, drain: the step is left out.

Neighbours: the roles use the labels, `runtime` looks them up.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.precision import PRECISIONS

KINDS = (
    "wait", "acquire", "release", "increment", "fence", "proxy", "bulk", "barrier", "scope",
    "store", "drain", "early",
)  # fmt: skip

#: Recipes with scales, and those among them whose rows have one for each block of columns.
SCALED = tuple(name for name, recipe in PRECISIONS.items() if recipe.scaled)
ROW_BLOCKS = tuple(name for name, recipe in PRECISIONS.items() if recipe.token_block > 0)


@dataclass(frozen=True)
class Operation:
    """One operation; `redundant` says what else gives the same order, `twin` by which label.
    `recipes`: those in which it is needed.
    """

    label: str
    kind: str
    why: str
    redundant: str = ""
    twin: str = ""
    recipes: tuple[str, ...] = tuple(PRECISIONS)


def _counted(label: str, why: str, redundant: str = "", twin: str = "") -> list[Operation]:
    """A releasing increment: two operations, the second of which may be redundant."""
    release = Operation(f"{label}.release", "release", why, redundant, twin)
    return [Operation(label, "increment", why), release]


def _waited(label: str, why: str) -> list[Operation]:
    """An acquiring wait: two operations."""
    return [Operation(label, "wait", why), Operation(f"{label}.acquire", "acquire", why)]


def _nvlink_barrier(
    name: str, before: str, after: str, redundant: str = "", twin: str = ""
) -> list[Operation]:
    """`redundant` and `twin` are of the CTA barrier that it begins with."""
    return [
        Operation(f"{name}.before", "barrier", before, redundant, twin),
        Operation(
            f"{name}.fence_arrive", "fence",
            "this CTA's peer stores come before the sys signal of the last CTA",
            "the arrival releases and the signal's release is cumulative", f"{name}.arrive.release",
        ),
        Operation(
            f"{name}.fence_arrive.sys", "scope", "peer stores of this CTA are for another rank",
            "the arrival is of gpu scope, and the signal carries it on to sys",
        ),
        Operation(f"{name}.arrive", "increment", "the last CTA must see that all have arrived"),
        Operation(
            f"{name}.arrive.release", "release", "hands this CTA's writes to the last CTA",
            "a fence followed by a relaxed atomic is a release too", f"{name}.fence_arrive",
        ),
        Operation(f"{name}.arrive.acquire", "acquire", "the last CTA signals for all CTAs"),
        Operation(f"{name}.elected", "barrier", "one thread arrives, one per peer signals"),
        *_counted(f"{name}.signal", "peers wait for it"),
        Operation(f"{name}.signal.sys", "scope", "the word is read on another rank"),
        *_waited(f"{name}.wait", after),
        Operation(f"{name}.wait.sys", "scope", "the word is written on another rank"),
        Operation(f"{name}.after", "barrier", "one thread per peer waits for the CTA"),
    ]  # fmt: skip


TABLE = [
    # count
    Operation("count.quantize", "early", "peers pull the rows and their scales", recipes=SCALED),
    Operation(
        "count.quantize_proxy",
        "proxy",
        "peers pull by bulk copies what threads have stored",
        recipes=SCALED,
    ),
    Operation("count.histogram_barrier", "barrier", "the local histogram is made by all threads"),
    Operation("count.reserve", "increment", "totals and reserved positions come from it"),
    Operation("grid_sync.before", "barrier", "one thread arrives for the CTA"),
    *_counted("grid_sync.arrive", "all reservations come before any total is read"),
    *_waited("grid_sync.wait", "totals are complete only when every CTA has reserved"),
    Operation("grid_sync.after", "barrier", "one thread waits for the CTA"),
    Operation("count.expect", "store", "the reduce waits for as many rows as slots are live"),
    Operation("count.offsets_barrier", "barrier", "all threads use the offsets in shared memory"),
    *_nvlink_barrier(
        "dispatched", "records are stored by all threads", "peers' records and tokens"
    ),
    Operation("count.counts_barrier", "barrier", "roles read the counts in shared memory"),
    # dispatch
    Operation(
        "dispatch.input_proxy",
        "proxy",
        "bulk copies read what peers' hosts and threads have stored",
    ),
    Operation("dispatch.ring_drain", "drain", "an unpublished row may be what the ring waits for"),
    *_waited("dispatch.ring_wait", "the ring slot may still be read, and its padding not clean"),
    Operation("dispatch.load_wait", "bulk", "the pull buffer is stored before the row has landed"),
    Operation("dispatch.group_wait", "bulk", "a row is published before it is in the pool"),
    Operation("dispatch.drain_wait", "bulk", "before a ring wait, a row is published too early"),
    Operation("dispatch.last_wait", "bulk", "the last row is published before it is in the pool"),
    Operation(
        "dispatch.scale_wait", "bulk", "scales are stored before they have landed", recipes=SCALED
    ),
    Operation(
        "dispatch.scale_proxy",
        "proxy",
        "bulk copies of FC1's loaders read the scales; a scale of the whole row its epilogue reads",
        recipes=ROW_BLOCKS,
    ),
    Operation(
        "dispatch.warp_sync",
        "barrier",
        "all lanes wait for the ring slot and store scales, one lane publishes the row",
    ),
    *_counted("dispatch.arrive", "FC1 waits for all rows of the block"),
    *_waited("dispatch.slots_wait", "a slot of the token is not in"),
    Operation("dispatch.slots_wait.sys", "scope", "slots are written on other ranks"),
    Operation(
        "dispatch.slots_added",
        "store",
        "math need not add the slots again",
        "the token is reduced twice, to the same bits",
    ),
    # tile queue
    Operation("load_weights.ticket", "increment", "every tile is done exactly once"),
    *_waited("load_weights.queue_empty", "a queue slot is reused before all have read it"),
    *_counted("load_weights.queue_full", "the tile's words come before its arrival"),
    *_waited("load_tokens.queue_full", "the tile is read before it is written"),
    *_counted(
        "load_tokens.queue_empty",
        "the scheduler reuses the slot",
        "the report warp's release comes after all that the token loader's tile leads to",
        "report.queue_empty.release",
    ),
    *_waited("math.queue_full", "the tile is read before it is written"),
    *_counted("math.queue_empty", "the scheduler reuses the slot"),
    Operation(
        "math.keep_slot",
        "early",
        "the epilogue reads the padding metadata in the queue slot",
        "the report warp gives the slot back only when all that compute the tile have stored it",
        "report.keep_slot",
    ),
    # loaders
    *_waited("load_weights.stage_empty", "a stage is overwritten while math reads it"),
    *_counted("load_weights.stage_full", "math reads the weights in the stage"),
    *_waited("load_tokens.fc1_wait", "rows of the block have not arrived"),
    Operation("load_tokens.fc1_proxy", "proxy", "TMA reads through the async proxy"),
    *_waited("load_tokens.fc2_wait", "FC1 tiles of the block are not stored"),
    Operation(
        "load_tokens.fc2_proxy", "proxy", "TMA reads what FC1 stored through the generic proxy"
    ),
    *_waited("load_tokens.stage_empty", "a stage is overwritten while math reads it"),
    *_counted("load_tokens.stage_full", "math reads the stage, and what this role has acquired"),
    *_counted("load_tokens.metadata_full", "the epilogue reads what all lanes have stored"),
    # math
    *_waited("math.stage_full", "the stage is read before it is loaded"),
    *_counted("math.stage_empty", "the loaders reuse the stage"),
    *_waited("math.metadata_full", "padding metadata is read before it is in the queue slot"),
    Operation("math.warp_sync", "barrier", "all lanes store, one lane arrives"),
    *_counted("math.stored", "the tile is reported once all warps have stored it"),
    # report
    *_waited("report.queue_full", "the tile is read before it is written"),
    *_counted("report.queue_empty", "the scheduler reuses the slot"),
    *_waited("report.stored", "the tile is reported before it is stored"),
    Operation(
        "report.keep_slot",
        "early",
        "epilogues read the padding metadata in the queue slot until the tile is stored",
        "math gives the slot back only after its epilogue (on a GPU it is needed all the same:"
        " `stored`, a parity there, must not complete twice before this warp has seen it)",
        "math.keep_slot",
    ),
    Operation("report.fc1_proxy", "proxy", "TMA of other CTAs reads what FC1 stored"),
    *_counted("report.fc1_done", "FC2 waits for all FC1 tiles of the block"),
    *_counted("report.fc2_done", "the cleaner and the ring wait for all FC2 tiles of the block"),
    Operation("report.fc2_done.acquire", "acquire", "the cleaner zeroes what others have read"),
    Operation("report.clean_begin", "barrier", "one lane acquires, all lanes zero"),
    Operation("report.clean_end", "barrier", "all lanes zero, one lane releases"),
    Operation("report.rows_fence", "fence", "rows that others stored come before their count"),
    Operation("report.rows_fence.sys", "scope", "the rows are on other ranks"),
    Operation("report.rows_in", "increment", "the reduce of a token waits for all its slots"),
    Operation("report.rows_in.sys", "scope", "the word is read on another rank"),
    *_counted("report.clean_done", "dispatch reuses the ring slot"),
    # combine
    *_nvlink_barrier(
        "combined",
        "all math warps of the CTA must have ended",
        "peers' combine rows",
        "the report warp comes after all that they have stored",
        "combined.reported",
    ),
    Operation("combined.reported", "barrier", "counters are zeroed after the last report"),
    Operation("combined.handover", "barrier", "nobody else reduces any more"),
    Operation("cleanup.epoch", "store", "the next launch waits for higher signals"),
]
OPERATIONS = {operation.label: operation for operation in TABLE}
