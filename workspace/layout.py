"""The region table: every buffer of one rank's workspace, declared once.

A region has a name, dtype, shape, space and kind, and one line each on who writes it, who reads it
and why it is or is not reset. From the table follow sizes and offsets (64-bit), the host views
(`workspace.views`) and the addresses that the kernel uses, so that host and device cannot disagree.

Kinds (what happens between launches):
- counter: zero again. Atomic counters; the kernel's clean-up zeroes what the launch used.
- padding: zero again. Row metadata; a row that only pads a pool block must be inert. FC2 cleans a
  block it frees.
- data: never reset; every byte is written before it is read within a launch.
- barrier: zeroed once at allocation, then never: epochs that only grow, shared with peers.

Spaces: symmetric regions are read or written by peers and lie at the same offset on every rank,
barrier header first; local regions are private to the rank, with everything that resets in one
contiguous span at the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

from megamoe.config import KernelConfig, MoEConfig, max_pool_blocks, pool_blocks, select
from megamoe.precision import ITEM_BYTES
from workspace.wire import COUNT_RECORD_BYTES, ROUTED_RECORD_BYTES, scale_words

ALIGNMENT = 128  # of every region: a cache line, and more than TMA and bulk copies ask for
SPAN_ALIGNMENT = 1024

COUNTER, PADDING, DATA, BARRIER = "counter", "padding", "data", "barrier"
KINDS = (COUNTER, PADDING, DATA, BARRIER)
RESET_KINDS = (COUNTER, PADDING)
SYMMETRIC, LOCAL = "symmetric", "local"
SPACES = (SYMMETRIC, LOCAL)

#: Words of `grid_sync_counter`: one grid-wide arrival each, used once per launch.
GRID_COUNTED, GRID_DISPATCHED, GRID_COMBINED = 0, 1, 2
#: Marks that a CTA leaves with `KernelConfig.trace`, in nanoseconds of the GPU's global timer, and
#: the two sums of its waits, and its clock at both ends; rows of region `trace` for the CTAs of any
#: GPU.
TRACE_NAMES = (
    "start", "counted", "dispatched", "first_tile", "last_pull", "last_tile", "combined", "end",
    "wait_tokens_ns", "wait_fc1_out_ns", "start_cycles", "end_cycles",
)  # fmt: skip
TRACE_CTAS, TRACE_MARKS = 160, 16
#: Tiles of a CTA that region `tile_trace` has room for; words of one: when it was taken, when its
#: product was done, when it was stored (ns), and what it was (`wire.encode_tile`).
TRACE_TILES, TILE_WORDS = 1024, 4
#: Values of `combine_arrival_count` from the last slot on.
SLOTS_IN, SLOTS_ADDED = 0, 1
#: NVLink barriers of a launch; `nvlink_barrier_counter` grows by this.
BARRIERS_PER_LAUNCH = 2
#: Barrier words that different ranks write lie this many int32 apart, one cache line each.
SIGNAL_STRIDE = ALIGNMENT // 4


@dataclass(frozen=True)
class Region:
    """One buffer; `offset` counts bytes from the start of its space."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    space: str
    kind: str
    writer: str
    reader: str
    reason: str
    offset: int = 0

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    @property
    def resets(self) -> bool:
        return self.kind in RESET_KINDS


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def region_table(config: MoEConfig, kernel: KernelConfig) -> list[Region]:
    """All regions of `config` without offsets, in the order in which they are laid out."""
    ranks, experts = config.num_ranks, config.num_experts
    local, slots = config.experts_per_rank, config.max_slots_per_rank
    tokens, top_k = config.max_tokens_per_rank, config.top_k
    blocks = max_pool_blocks(config, kernel)
    rows = pool_blocks(config, kernel) * kernel.block_m
    recipe = config.recipe
    count_words, record_words = COUNT_RECORD_BYTES // 4, ROUTED_RECORD_BYTES // 4
    table = [
        Region("nvlink_barrier_signal", "int32", (ranks, SIGNAL_STRIDE), SYMMETRIC, BARRIER,
               "rank r adds 1 to row r on every rank",
               "all CTAs, until every row reaches the epoch",
               "a host reset would wipe a fast peer's signal"),
        Region("nvlink_barrier_counter", "int32", (SIGNAL_STRIDE,), SYMMETRIC, BARRIER,
               "clean-up, once per launch", "all CTAs at the start: the epoch",
               "the epoch must survive launches"),
        Region("abort_flag", "int32", (SIGNAL_STRIDE,), SYMMETRIC, BARRIER,
               "the first wait that times out", "every wait that is not yet satisfied",
               "cleared only by Workspace.recover()"),
        Region("launched_layer", "int32", (ranks,), SYMMETRIC, DATA,
               "every source rank: the number of its layer", "the first CTA, after the barrier",
               "every rank writes its word in every launch"),
        Region("expert_recv_count", "int32", (ranks, local, count_words), SYMMETRIC, DATA,
               "every source rank: count records", "all CTAs after the dispatch barrier",
               "every rank writes its whole row in every launch"),
        Region("routed_record", "int32", (ranks, slots, record_words), SYMMETRIC, DATA,
               "every source rank: routed records", "dispatch warps",
               "only records below the published counts are read"),
        Region("input_token_buffer", recipe.tokens.storage, (tokens, config.hidden_size),
               SYMMETRIC, DATA,
               "the host stages x before the launch, or count quantises it",
               "dispatch warps of peers",
               "only rows named by a record are read"),
        Region("combine_output", recipe.output, (tokens, top_k, config.hidden_size), SYMMETRIC,
               DATA,
               "FC2 epilogues of every owner rank", "the reduce of this rank",
               "exactly the slots that are not masked are written, and only they are read"),
        Region("combine_arrival_count", "int32", (tokens,), SYMMETRIC, DATA,
               "count: minus the live slots of a token; FC2 cleaners of every owner add 1 per row",
               "the reduce: SLOTS_IN when all have come, SLOTS_ADDED once the token is done",
               "set for every token of the launch before any peer may add"),
        Region("grid_sync_counter", "int32", (3, SIGNAL_STRIDE), LOCAL, COUNTER,
               "every CTA adds 1", "every CTA, and the last to arrive", "arrivals count from zero"),
        Region("load_balance_counter", "int32", (1,), LOCAL, COUNTER,
               "weight loaders take tickets", "weight loaders", "tickets count from zero"),
        Region("expert_send_count", "int32", (experts,), LOCAL, COUNTER,
               "every CTA adds its histogram", "every CTA after the grid sync",
               "counts add up from zero"),
        Region("l1_arrival_count", "int32", (blocks,), LOCAL, COUNTER,
               "dispatch warps add 1 per row", "token loaders before FC1", "rows count from zero"),
        Region("fc1_done_counter", "int32", (blocks,), LOCAL, COUNTER,
               "report warps add 1 per FC1 tile", "token loaders before FC2",
               "tiles count from zero"),
        Region("fc2_done_counter", "int32", (blocks,), LOCAL, COUNTER,
               "report warps add 1 per FC2 tile, the cleaner of the block 1 more",
               "the cleaner, and dispatch warps before they reuse the ring slot",
               "tiles count from zero"),
        Region("l1_topk_weights_buffer", "float32", (rows,), LOCAL, PADDING,
               "dispatch warps; zeroed by the report warp that frees the block",
               "token loaders before FC1, for its epilogue",
               "a padding row must have weight 0"),
        Region("token_src_metadata", "int32", (rows,), LOCAL, PADDING,
               "dispatch warps; zeroed by the report warp that frees the block",
               "token loaders before FC2, for its epilogue; the report warp that frees the block",
               "a padding row must have no destination"),
        Region("layer_output", recipe.output, (tokens, config.hidden_size), LOCAL, DATA,
               "the reduce", "the caller, until the next forward on this workspace",
               "exactly the rows of this launch's tokens are written"),
        Region("l1_token_buffer", recipe.tokens.storage, (rows, config.hidden_size), LOCAL, DATA,
               "dispatch warps", "token loaders of FC1",
               "padding rows feed only rows that are dropped"),
        Region("fc1_output", recipe.hidden.storage, (rows, config.intermediate_size), LOCAL, DATA,
               "FC1 epilogue", "token loaders of FC2",
               "padding rows feed only rows that are dropped"),
    ]  # fmt: skip
    ring = pool_blocks(config, kernel)
    if recipe.tokens.has_scales:
        table += [
            Region("input_scale_buffer", "float32", (tokens, scale_words(config.token_scales)),
                   SYMMETRIC, DATA,
                   "count, or the host, with input_token_buffer", "dispatch warps of peers",
                   "only rows named by a record are read"),
            Region("l1_scale_buffer", "float32", (ring, config.token_scales, kernel.block_m), LOCAL,
                   DATA,
                   "dispatch warps", "token loaders of FC1; its epilogue if a row has one scale",
                   "padding rows feed only rows that are dropped"),
        ]  # fmt: skip
    if recipe.hidden.has_scales:
        table += [
            Region("fc1_output_scale", "float32", (ring, config.fc1_out_scales, kernel.block_m), LOCAL,
                   DATA,
                   "FC1 epilogue", "token loaders of FC2",
                   "padding rows feed only rows that are dropped"),
        ]  # fmt: skip
    if kernel.trace:
        table.append(
            Region("trace", "int64", (TRACE_CTAS, TRACE_MARKS), LOCAL, DATA,
                   "every CTA at its marks", "the host",
                   "the host zeroes it before the launch that it wants to see: a CTA may pass no "
                   "first_tile")
        )  # fmt: skip
        table.append(
            Region("tile_trace", "int64", (TRACE_CTAS, TRACE_TILES, TILE_WORDS), LOCAL, DATA,
                   "the first math warp of the tile", "the host",
                   "the host zeroes it before the launch that it wants to see")
        )  # fmt: skip
    return table


@dataclass(frozen=True)
class Layout:
    """The region table with offsets: a frozen function of the two configurations."""

    config: MoEConfig
    kernel: KernelConfig

    @cached_property
    def regions(self) -> dict[str, Region]:
        placed: dict[str, Region] = {}
        cursor = dict.fromkeys(SPACES, 0)
        for region in region_table(self.config, self.kernel):
            offset = align_up(cursor[region.space], ALIGNMENT)
            placed[region.name] = Region(**{**region.__dict__, "offset": offset})
            cursor[region.space] = offset + region.num_bytes
        return placed

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]

    def index(self, name: str) -> int:
        """Number of a region in the table: how the kernel names it in an error record."""
        return list(self.regions).index(name)

    def of_space(self, space: str) -> list[Region]:
        return [region for region in self.regions.values() if region.space == space]

    def num_bytes(self, space: str) -> int:
        """Bytes to allocate for one space."""
        return align_up(self.of_space(space)[-1].end, SPAN_ALIGNMENT)

    @property
    def total_bytes(self) -> int:
        return sum(self.num_bytes(space) for space in SPACES)

    @cached_property
    def reset_span(self) -> tuple[int, int]:
        """(begin, end) bytes in the local space that hold every region that resets, and nothing
        else.
        """
        resets = [region for region in self.regions.values() if region.resets]
        return min(region.offset for region in resets), max(region.end for region in resets)

    @property
    def reset_bytes(self) -> int:
        begin, end = self.reset_span
        return end - begin

    @cached_property
    def header_span(self) -> tuple[int, int]:
        """(begin, end) bytes in the symmetric space of the barrier header."""
        header = [region for region in self.regions.values() if region.kind == BARRIER]
        return min(region.offset for region in header), max(region.end for region in header)

    def bytes_by_kind(self) -> dict[str, int]:
        return {
            kind: sum(region.num_bytes for region in self.regions.values() if region.kind == kind)
            for kind in KINDS
        }

    def describe(self) -> str:
        """The table as text: bytes by region and by kind."""
        head = ("region", "kind", "space", "dtype", "shape", "bytes")
        rows = [
            (r.name, r.kind, r.space, r.dtype, "x".join(map(str, r.shape)), f"{r.num_bytes:,}")
            for r in self.regions.values()
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

        def line(row):
            cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
            return "  ".join([*cells, row[-1].rjust(widths[-1])])

        kinds = "  ".join(f"{kind} {size:,}" for kind, size in self.bytes_by_kind().items())
        reset = f"reset between launches {self.reset_bytes:,} of {self.total_bytes:,}"
        summary = f"bytes by kind: {kinds}; {reset}"
        return "\n".join(
            [line(head), line(tuple("-" * width for width in widths)), *map(line, rows), summary]
        )


@lru_cache(maxsize=256)
def layout_of(config: MoEConfig, kernel: KernelConfig | None = None) -> Layout:
    """The layout of `config`; the same object for the same configurations."""
    return Layout(config, kernel or select(config))
