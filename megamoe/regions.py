"""The region table of the layer: every buffer of one rank's workspace, declared once.

`workspace.layout` says what a region, a kind and a space are, and places them. The kernel's
clean-up zeroes the counters that the launch used; the report warp that frees a pool block zeroes
its padding metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megamoe.config import KernelConfig, MoEConfig, max_pool_blocks, pool_blocks, select
from megamoe.ordering import FLAGS, GRID
from megamoe.wire import COUNT_RECORD_BYTES, ROUTED_RECORD_BYTES, scale_words
from workspace.layout import (
    ALIGNMENT,
    BARRIER,
    COUNTER,
    DATA,
    LOCAL,
    PADDING,
    SYMMETRIC,
    Layout,
    Region,
)

#: Marks that a CTA leaves with `KernelConfig.trace`, in nanoseconds of the GPU's global timer, and
#: the two sums of its waits, and its clock at both ends; rows of region `trace` for the CTAs of any
#: GPU.
TRACE_NAMES = (
    "start", "counted", "dispatched", "first_tile", "last_pull", "last_tile", "combined", "end",
    "wait_tokens_ns", "wait_fc1_out_ns", "start_cycles", "end_cycles",
)  # fmt: skip
TRACE_CTAS, TRACE_MARKS = 160, 16
#: Tiles of a CTA that region `tile_trace` has room for.
TRACE_TILES = 1024
#: Values of `combine_arrival_count` from the last slot on.
SLOTS_IN, SLOTS_ADDED = 0, 1
#: NVLink barriers of a launch; `nvlink_barrier_counter` grows by this.
BARRIERS_PER_LAUNCH = 2
#: Barrier words that different ranks write lie this many int32 apart, one cache line each.
SIGNAL_STRIDE = ALIGNMENT // 4


class TileRecord(NamedTuple):
    """The words of a tile in region `tile_trace`, in order; times in ns."""

    begin: int  # taken from the queue
    multiplied: int  # its product was done
    end: int  # stored
    code: int  # what it was, as `wire.encode_tile`


def region_table(config: MoEConfig, kernel: KernelConfig) -> list[Region]:
    """All regions of `config`, without offsets."""
    ranks, experts = config.num_ranks, config.num_experts
    routed, records = config.experts_per_rank, config.max_routed_per_rank
    tokens, hidden = config.max_tokens_per_rank, config.hidden_size
    blocks = max_pool_blocks(config, kernel)
    rows = pool_blocks(config, kernel) * kernel.block_m
    recipe = config.recipe
    grids = sum(flag.region == GRID for flag in FLAGS)  # arrivals of the grid, each once a launch
    count_words, record_words = COUNT_RECORD_BYTES // 4, ROUTED_RECORD_BYTES // 4
    table = [
        Region("nvlink_barrier_signal", "int32", (ranks, SIGNAL_STRIDE), SYMMETRIC, BARRIER,
               "rank r adds 1 to row r on every rank",
               "all CTAs, until every row reaches the epoch",
               "a host reset would wipe a fast peer's signal", atomic=True),
        Region("nvlink_barrier_counter", "int32", (SIGNAL_STRIDE,), SYMMETRIC, BARRIER,
               "clean-up, once per launch", "all CTAs at the start: the epoch",
               "the epoch must survive launches"),
        Region("abort_flag", "int32", (SIGNAL_STRIDE,), SYMMETRIC, BARRIER,
               "the first wait that times out", "every wait that is not yet satisfied",
               "cleared only by Workspace.recover(), but clean-up clears REPORTED_WORD",
               atomic=True),
        Region("launched_layer", "int32", (ranks,), SYMMETRIC, DATA,
               "every source rank: the number of its layer", "the first CTA, after the barrier",
               "every rank writes its word in every launch"),
        Region("expert_recv_count", "int32", (ranks, routed, count_words), SYMMETRIC, DATA,
               "every source rank: count records", "all CTAs after the dispatch barrier",
               "every rank writes its whole row in every launch"),
        Region("routed_record", "int32", (ranks, records, record_words), SYMMETRIC, DATA,
               "every source rank: routed records", "dispatch warps",
               "only records below the published counts are read"),
        Region("input_token_buffer", recipe.tokens.storage, (tokens, hidden),
               SYMMETRIC, DATA,
               "the host stages x before the launch, or count quantises it",
               "dispatch warps of peers",
               "only rows named by a record are read", bulk=True, host_writes=True),
        Region("combine_output", recipe.output, (tokens, config.slots_per_token, hidden),
               SYMMETRIC, DATA,
               "FC2 epilogues of every owner rank", "the reduce of this rank",
               "exactly the slots that are not masked are written, and only they are read"),
        Region("combine_arrival_count", "int32", (tokens,), SYMMETRIC, DATA,
               "count: minus the live slots of a token; FC2 cleaners of every owner add 1 per row",
               "the reduce: SLOTS_IN when all have come, SLOTS_ADDED once the token is done",
               "set for every token of the launch before any peer may add", atomic=True),
        Region(GRID, "int32", (grids, SIGNAL_STRIDE), LOCAL, COUNTER,
               "every CTA adds 1", "every CTA, and the last to arrive", "arrivals count from zero",
               atomic=True),
        Region("load_balance_counter", "int32", (1,), LOCAL, COUNTER,
               "weight loaders take tickets", "weight loaders", "tickets count from zero",
               atomic=True),
        Region("expert_send_count", "int32", (experts,), LOCAL, COUNTER,
               "every CTA adds its histogram", "every CTA after the grid sync",
               "counts add up from zero", atomic=True),
        Region("l1_arrival_count", "int32", (blocks,), LOCAL, COUNTER,
               "dispatch warps add 1 per row", "token loaders before FC1", "rows count from zero",
               atomic=True),
        Region("fc1_done_counter", "int32", (blocks,), LOCAL, COUNTER,
               "report warps add 1 per FC1 tile", "token loaders before FC2",
               "tiles count from zero", atomic=True),
        Region("fc2_done_counter", "int32", (blocks,), LOCAL, COUNTER,
               "report warps add 1 per FC2 tile, the cleaner of the block 1 more",
               "the cleaner, and dispatch warps before they reuse the ring slot",
               "tiles count from zero", atomic=True),
        Region("l1_topk_weights_buffer", "float32", (rows,), LOCAL, PADDING,
               "dispatch warps; zeroed by the report warp that frees the block",
               "token loaders before FC1, for its epilogue",
               "a padding row must have weight 0"),
        Region("token_src_metadata", "int32", (rows,), LOCAL, PADDING,
               "dispatch warps; zeroed by the report warp that frees the block",
               "token loaders before FC2, for its epilogue; the report warp that frees the block",
               "a padding row must have no destination"),
        Region("layer_output", recipe.output, (tokens, hidden), LOCAL, DATA,
               "the reduce", "the caller, until the next forward on this workspace",
               "exactly the rows of this launch's tokens are written"),
        Region("l1_token_buffer", recipe.tokens.storage, (rows, hidden), LOCAL, DATA,
               "dispatch warps", "token loaders of FC1",
               "padding rows feed only rows that are dropped", bulk=True),
        Region("fc1_output", recipe.hidden.storage, (rows, config.intermediate_size), LOCAL, DATA,
               "FC1 epilogue", "token loaders of FC2",
               "padding rows feed only rows that are dropped", bulk=True),
    ]  # fmt: skip
    ring = pool_blocks(config, kernel)
    if recipe.tokens.has_scales:
        table += [
            Region("input_scale_buffer", "float32", (tokens, scale_words(config.token_scales)),
                   SYMMETRIC, DATA,
                   "count, or the host, with input_token_buffer", "dispatch warps of peers",
                   "only rows named by a record are read", bulk=True, host_writes=True),
            Region("l1_scale_buffer", "float32", (ring, config.token_scales, kernel.block_m), LOCAL,
                   DATA,
                   "dispatch warps", "token loaders of FC1; its epilogue if a row has one scale",
                   "padding rows feed only rows that are dropped",
                   bulk=recipe.tokens.scales_along_k),
        ]  # fmt: skip
    if recipe.hidden.has_scales:
        table += [
            Region("fc1_output_scale", "float32", (ring, config.fc1_out_scales, kernel.block_m),
                   LOCAL, DATA,
                   "FC1 epilogue", "token loaders of FC2",
                   "padding rows feed only rows that are dropped", bulk=True),
        ]  # fmt: skip
    if kernel.trace:
        tile_shape = TRACE_CTAS, TRACE_TILES, len(TileRecord._fields)
        table.append(
            Region("trace", "int64", (TRACE_CTAS, TRACE_MARKS), LOCAL, DATA,
                   "every CTA at its marks", "the host",
                   "the host zeroes it before the launch that it wants to see: a CTA may pass no "
                   "first_tile", host_writes=True)
        )  # fmt: skip
        table.append(
            Region("tile_trace", "int64", tile_shape, LOCAL, DATA,
                   "the first math warp of the tile", "the host",
                   "the host zeroes it before the launch that it wants to see", host_writes=True)
        )  # fmt: skip
    return table


@dataclass(frozen=True)
class LayerLayout(Layout):
    """The layout of a layer: a function of the two configurations."""

    config: MoEConfig
    kernel: KernelConfig


@lru_cache(maxsize=256)
def layout_of(config: MoEConfig, kernel: KernelConfig | None = None) -> LayerLayout:
    """The layout of `config`; the same object for the same configurations."""
    kernel = kernel or select(config)
    return LayerLayout(config.num_ranks, tuple(region_table(config, kernel)), config, kernel)
