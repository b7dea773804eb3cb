"""What the roles see: the regions of a rank and the shared memory of a CTA, as checked memory.

Owns how a region of the table becomes checked memory. Counters and barrier words are `Word`s;
padding and data regions are `Data` of rows; bytes are kept as integers of the item size, so that a
store changes no bit. Everything aliases the workspace's own views.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd, prod
from typing import NamedTuple

import numpy as np
import torch

from megamoe import reference
from megamoe.budget import QUEUE_SLOTS, WARP_ROWS, budget_of
from megamoe.emulator.memory import Agent, Data, Memory, Word
from megamoe.faults import ROLE_COMBINE, ROLE_COUNT, ROLE_DISPATCH, ROLES
from megamoe.precision import Precision
from megamoe.reference import Weights
from megamoe.schedule import ceil_div
from workspace.layout import BARRIER, DATA, PADDING, Layout, Region
from workspace.views import Workspace
from workspace.wire import scale_words

#: Columns per shadow piece of a wide region; what an epilogue stores is a multiple of it.
PIECE_COLUMNS = 64
#: Threads of a CTA that the prologue and the combine are divided among.
NUM_CTA_THREADS = 2
#: Stages of a CTA; a stage holds a whole tile here, what each loader brings as a column of its own.
#: Fewer than tiles in the queue.
NUM_TILE_STAGES = 1
OPERANDS = {"load_tokens": (0, 1), "load_weights": (1, 2)}
TILE_FIELDS = 6  # phase, expert, block in expert, pool block, column, rows

#: Data regions of words that are used atomically.
ATOMIC_DATA = ("combine_arrival_count",)

#: Regions that the caller may fill ahead of a launch.
INPUTS = ("input_token_buffer", "input_sf_buffer")
#: Regions that bulk copies or TMA read, in some recipe.
COPIED = (*INPUTS, "l1_token_buffer", "l1_sf_buffer", "fc1_output", "fc1_output_sf")
#: Regions of a ring of pool blocks with the scales of its rows: [ring, S, block_m].
RING_SCALES = ("l1_sf_buffer", "fc1_output_sf")

CANARY = -0x5A5A5A5B
#: What a poisoned region holds, by dtype: a NaN or a count that nothing survives.
POISON = {"float8_e4m3fn": 0x7F, "bfloat16": 0x7FFF, "float32": 0x7FFFFFFF, "int32": CANARY}

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def as_bits(tensor: torch.Tensor) -> np.ndarray:
    """The same memory as integers of the item size."""
    return tensor.view(_BITS[tensor.element_size()]).numpy()


def as_float(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """Bits of `dtype` as float32."""
    return torch.from_numpy(bits).view(getattr(torch, dtype)).float()


@dataclass
class Launch:
    """One forward of one rank: inputs, and the output that the host takes from the workspace.

    Inputs are copied, because x may be the staging buffer itself. `staged`: the host puts the rows
    that travel into the workspace; otherwise the launch quantises them.
    """

    recipe: Precision
    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    x_scale: torch.Tensor | None = None
    expert_counts: torch.Tensor | None = None
    clamp: float | None = None
    output: torch.Tensor | None = None
    staged: bool = field(init=False)
    experts: list[int] = field(init=False)  # by entry q = token * K + k
    weight_bits: list[int] = field(init=False)
    row_bits: np.ndarray = field(init=False)  # of `input_token_buffer`
    scale_bits: np.ndarray | None = field(init=False)  # of `input_sf_buffer`

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0]

    def __post_init__(self):
        self.staged = self.x_scale is not None or not self.recipe.scaled
        rows, scales = reference.input_rows(self.x, self.x_scale, self.recipe)
        self.row_bits, self.scale_bits = as_bits(rows).copy(), None
        if scales is not None:
            width = scales.shape[1]
            self.scale_bits = np.zeros((len(rows), scale_words(width)), np.int32)
            self.scale_bits[:, :width] = as_bits(scales)
        self.experts = self.topk_idx.reshape(-1).tolist()
        self.weight_bits = as_bits(self.topk_weights.float().contiguous()).reshape(-1).tolist()


class RankState:
    """Regions, agents and weights of one rank."""

    def __init__(self, memory: Memory, workspace: Workspace, rank: int):
        self.memory, self.rank = memory, rank
        self.layout: Layout = workspace.layout
        config = self.layout.config
        self.budget = budget_of(config, self.layout.kernel)
        self.pull_columns = self.budget.piece_bytes // config.recipe.token_bytes
        self.host: Agent
        self.cta_agents: list[CtaAgents] = []
        self.number = 0  # launches begun
        self.launch: Launch
        self.experts: list[Weights] = []  # scales by output channel
        self._words: dict[tuple[str, int], Word] = {}
        self._flat: dict[str, np.ndarray] = {}
        self.data: dict[str, Data] = {}
        for name, view in workspace.regions(rank).items():
            region = self.layout[name]
            if region.kind in (DATA, PADDING) and name not in ATOMIC_DATA:
                self.data[name] = self._data(region, view)
            else:
                self._flat[name] = as_bits(view).reshape(-1)

    def _data(self, region: Region, view: torch.Tensor) -> Data:
        columns = 1 if len(region.shape) == 1 else region.shape[-1]
        bits = as_bits(view).reshape(prod(region.shape) // columns, columns)
        recipe = self.layout.config.recipe
        ring = region.name in ("l1_token_buffer", "fc1_output") or region.kind == PADDING
        bucket, piece = 1, columns
        if ring:
            bucket = self.layout.kernel.block_m
        elif region.name in RING_SCALES:
            bucket, piece = region.shape[1], 1
        elif region.name == "expert_recv_count":
            bucket = self.layout.config.experts_per_rank
        if region.dtype in (recipe.token, recipe.output):
            # A pulled piece may be narrower than what the epilogues store.
            pulled = region.name in ("l1_token_buffer", "input_token_buffer")
            piece = gcd(PIECE_COLUMNS, self.pull_columns if pulled else 0)
        return Data(
            self.memory, region.name, self.rank, bits, piece, bucket,
            fresh=region.kind == DATA, copied=region.name in COPIED,
        )  # fmt: skip

    def word(self, region: str, index: int = 0) -> Word:
        key = region, index
        if key not in self._words:
            self._words[key] = Word(
                self.memory, region, self.rank, index, self._flat[region], index
            )
        return self._words[key]

    def num_words(self, region: str) -> int:
        return len(self._flat[region])

    def refill(self, resets: set[str], poison: bool) -> None:
        """Before a launch: zero what `resets` adds to the table, poison the other data regions.

        Bytes that a fast peer has already written for this launch stay, and so do rows of the
        input buffers past its tokens: what the caller holds there is for a later launch.
        """
        for name, region in self.layout.regions.items():
            if name in ATOMIC_DATA:
                if name in resets or poison:
                    self._flat[name].fill(0 if name in resets else POISON[region.dtype])
            elif region.kind == DATA and name in resets:
                self.data[name].refill(self.number, 0)
            elif name in INPUTS and poison:
                self.data[name].array[: self.launch.num_tokens] = POISON[region.dtype]
            elif region.kind == DATA and poison:
                self.data[name].refill(self.number, POISON[region.dtype])
            elif region.kind == BARRIER and name in resets:
                self._flat[name].fill(0)

    def agents(self) -> list[Agent]:
        return [self.host, *(agent for cta in self.cta_agents for agent in cta.all)]

    def at_rest(self) -> list[str]:
        """Regions that a launch should have left at zero and that are not."""
        arrays = {name: data.array for name, data in self.data.items()} | self._flat
        return [
            name
            for name, region in self.layout.regions.items()
            if region.resets and arrays[name].any()
        ]


class Warp(NamedTuple):
    """A warp that stores: the lane that acts for it, and all lanes."""

    leader: Agent
    lanes: Agent


@dataclass
class CtaAgents:
    """Agents of one CTA: an elected thread is one agent."""

    threads: list[Agent]
    dispatch: Warp
    report: Warp
    load_weights: Agent
    load_tokens: Warp
    math: list[Warp]

    @property
    def leader(self) -> Agent:
        return self.threads[0]

    @property
    def early(self) -> list[Warp]:
        """Warps that reduce early."""
        return [self.dispatch, self.report]

    @property
    def all(self) -> list[Agent]:
        warps = [agent for warp in (*self.early, self.load_tokens, *self.math) for agent in warp]
        return [*self.threads, self.load_weights, *warps]

    @staticmethod
    def places(rank: int, cta: int, num_math: int) -> list[tuple[int, int, str]]:
        """(rank, cta, role) in the order of `take`."""
        roles = [ROLES[ROLE_COUNT]] * NUM_CTA_THREADS + [ROLES[ROLE_DISPATCH]] * 2 + ["report"] * 2
        roles += ["load_weights"] + ["load_tokens"] * 2 + ["math"] * (2 * num_math)
        return [(rank, cta, role) for role in roles]

    @staticmethod
    def take(agents, num_math: int) -> CtaAgents:
        """Build from an iterator over agents."""
        return CtaAgents(
            [next(agents) for _ in range(NUM_CTA_THREADS)],
            Warp(next(agents), next(agents)),
            Warp(next(agents), next(agents)),
            next(agents),
            Warp(next(agents), next(agents)),
            [Warp(next(agents), next(agents)) for _ in range(num_math)],
        )

    def enter_combine(self) -> None:
        for thread in self.threads:
            thread.role = ROLES[ROLE_COMBINE]

    def enter_count(self) -> None:
        for thread in self.threads:
            thread.role = ROLES[ROLE_COUNT]


class Shared:
    """Shared memory of one CTA for one launch; mbarriers count arrivals, not parities."""

    def __init__(
        self, memory: Memory, rank: int, num_experts: int, experts_per_rank: int, block_m: int
    ):
        def data(name: str, rows: int, columns: int = 1) -> Data:
            return Data(
                memory, f"shared.{name}", rank, np.zeros((rows, columns), np.int64), columns, rows
            )

        def words(name: str, count: int) -> list[Word]:
            array = np.zeros(count, np.int64)
            return [Word(memory, f"shared.{name}", rank, i, array, i) for i in range(count)]

        self.histogram = data("histogram", NUM_CTA_THREADS * num_experts)  # one per thread
        self.base = data("base", num_experts)
        self.total = data("total", num_experts)
        self.offset = data("offset", num_experts)
        self.counts = data("counts", experts_per_rank)
        self.queue = data("queue", QUEUE_SLOTS, TILE_FIELDS)
        self.queue_full = words("queue_full", QUEUE_SLOTS)
        self.queue_empty = words("queue_empty", QUEUE_SLOTS)
        self.stage = Data(
            memory, "shared.stage", rank, np.zeros((NUM_TILE_STAGES, len(OPERANDS)), np.int64), 1, 1
        )
        self.metadata = Data(  # of the rows of a tile, by queue slot
            memory, "shared.metadata", rank, np.zeros((QUEUE_SLOTS, block_m), np.int32),
            WARP_ROWS, 1,
        )  # fmt: skip
        self.metadata_full = words("metadata_full", QUEUE_SLOTS)
        self.stage_full = words("stage_full", NUM_TILE_STAGES)
        self.stage_empty = words("stage_empty", NUM_TILE_STAGES)
        self.stored = words("stored", QUEUE_SLOTS)
        self.tiles: list[Tile | None] = [None] * NUM_TILE_STAGES
        self.math_ended = words("math_ended", 1)[0]
        self.reports_ended = words("reports_ended", 1)[0]
        self.early_ended = words("early_ended", 1)[0]
        self.front_ended = words("front_ended", 1)[0]


@dataclass
class Tile:
    """Real token rows of one tile in a stage and their scales, float32; all math warps share one
    product.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    product: torch.Tensor | None = None

    def multiply(self, weights: torch.Tensor, weight_scales: torch.Tensor | None) -> None:
        self.product = reference.product(self.rows, weights, self.scales, weight_scales)


def pool_blocks_used(counts: list[int], block_m: int) -> int:
    return sum(ceil_div(count, block_m) for count in counts)
