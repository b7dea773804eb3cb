"""The problem (`MoEConfig`), the kernel's tiles, stages and schedule (`KernelConfig`), and what of
them is legal (`supports`; whether it fits into a CTA is for `budget.check`).

Letters used everywhere: W ranks, T tokens on a rank, K top-k, E experts, e = E / W local experts,
H hidden size, I intermediate size. K columns of `topk_idx` choose among E routed experts; what is
computed is counted in slots of a token and local experts (`MoEConfig`). Both configurations are
frozen and hold integers, flags and names, so they key caches.

Neighbours: everything reads them; this module reads only `precision` and `architecture`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from megamoe.architecture import Architecture, architecture_of
from megamoe.precision import NO_SCALES, PACKED, WHOLE_ROW, Precision, precision_of

MAX_RANKS = 72
MAX_TOP_K = 16
#: Signed 32-bit counters and codes must hold W * T * K slots.
MAX_ROUTED_SLOTS = 2**30
#: Parts of a launch that can run alone (`KernelConfig.only`).
DISPATCH, GEMMS, COMBINE = PARTS = ("dispatch", "gemms", "combine")


@dataclass(frozen=True)
class MoEConfig:
    """One expert-parallel MoE layer; `max_tokens_per_rank` bounds T on every rank.

    An expert that every token goes to (a shared one, `num_shared_experts` of them) is one more
    local expert of every rank, for the rank's own tokens, with a slot of its own in each. So two
    pairs of numbers differ by it: `top_k` columns of `topk_idx` and `slots_per_token`,
    `experts_per_rank` that tokens can name and `local_experts`.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    max_tokens_per_rank: int
    num_ranks: int = 1
    precision: str = "bf16"
    num_shared_experts: int = 0

    @property
    def experts_per_rank(self) -> int:
        """Routed experts of a rank, which owns ids rank * experts_per_rank and up."""
        return self.num_experts // self.num_ranks

    @property
    def local_experts(self) -> int:
        """Experts that a rank computes, the routed ones first: rows of its weights and in its
        pool.
        """
        return self.experts_per_rank + self.num_shared_experts

    def experts_of(self, rank: int) -> list[int]:
        """Numbers of the local experts of a rank, in order: its routed ones, then the shared ones,
        which are numbered from `num_experts` on.
        """
        first = rank * self.experts_per_rank
        shared = range(self.num_experts, self.num_experts + self.num_shared_experts)
        return [*range(first, first + self.experts_per_rank), *shared]

    @property
    def slots_per_token(self) -> int:
        """Rows that come back for a token and are added, those of the K columns first."""
        return self.top_k + self.num_shared_experts

    @property
    def max_slots_per_rank(self) -> int:
        """Rows that come back to one rank at most: T * slots_per_token."""
        return self.max_tokens_per_rank * self.slots_per_token

    @property
    def max_routed_per_rank(self) -> int:
        """Rows that one rank can send: T * K."""
        return self.max_tokens_per_rank * self.top_k

    @property
    def recipe(self) -> Precision:
        return precision_of(self.precision)

    @property
    def token_scales(self) -> int:
        """Scales of a token row; 0 if the recipe has none."""
        return self.recipe.tokens.num_scales(self.hidden_size)

    @property
    def fc1_out_scales(self) -> int:
        """Scales of a row of FC1's output."""
        return self.recipe.hidden.num_scales(self.intermediate_size)


@dataclass(frozen=True)
class KernelConfig:
    """Tiles, stages, roles and schedule of the megakernel; the defaults are the measured SM90
    choice.

    arch: name of the architecture that it is built for, whose row says what is legal.
    block_m, block_n, block_k: the CTA tile. `block_m` is also the unit of readiness, the pool
    block.
    num_stages: depth of the shared-memory ring of A and B tiles.
    pull_piece_bytes: largest piece of a token row in flight per pull buffer.
    weight_run: K blocks of weights that are asked for together, in a tile with rows for one math
    warpgroup only. Two of FP8 are 256 bytes of a row, which HBM gives 2 % faster than twice 128; in
    BF16 it costs 1 % (H200).
    frontend_registers, math_registers: setmaxnreg values of the front-end and of each math
    warpgroup.
    group_blocks: pool blocks of one expert whose tiles share a weight tile in L2 (a schedule unit).
    lag_waves: FC2 of a unit trails its FC1 by about this many tiles per CTA.
    pool_blocks: pool blocks held at once (the ring); None takes what the worst routing needs, up to
    192 in BF16 and 384 in FP8.
    trace: every CTA records when it reached the marks of `megamoe.regions.TRACE_NAMES`.
    only: a part of the launch, to time it alone, or "" for all of it. Outputs mean nothing then;
    every part counts and passes both barriers, as the launch does. "dispatch" pulls rows, over
    whatever the ring holds, and leaves their metadata behind. "gemms" runs the tiles of the real
    counts on the rows that the pool holds, with router weights of 1, and stores no row of FC2 into
    a slot. "combine" adds what the slots hold.
    """

    arch: str = "sm_90a"
    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    num_stages: int = 4
    pull_piece_bytes: int = 7168
    weight_run: int = 1
    frontend_registers: int = 88
    math_registers: int = 208
    group_blocks: int = 8
    lag_waves: int = 2
    pool_blocks: int | None = None
    trace: bool = False
    only: str = ""

    def runs(self, part: str) -> bool:
        """Whether a launch does this part."""
        return self.only in ("", part)

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.arch)

    @property
    def num_math_warpgroups(self) -> int:
        return self.block_m // self.architecture.group_rows

    @property
    def num_math_warps(self) -> int:
        return self.architecture.group_threads // 32 * self.num_math_warpgroups

    @property
    def num_threads(self) -> int:
        return self.architecture.group_threads * (1 + self.num_math_warpgroups)


#: Blocks of the pool ring unless asked otherwise, times the bytes of an item: several times the
#: blocks between a pull and its last FC2 tile, and 0.5 GB at H = 7168, I = 3072.
DEFAULT_POOL_BLOCK_BYTES = 384
#: What promotion changes: of e4m3 128 bytes of K are 128 columns; the sums of a block need
#: registers beside the accumulator's; scales take shared memory from the pull buffers.
PROMOTION_DEFAULTS = {
    "block_k": 128,
    "pull_piece_bytes": 4096,
    "weight_run": 2,
    "frontend_registers": 56,
    "math_registers": 224,
}
#: What 4-bit weights change: a stage has half the bytes; a fragment of weights takes registers too.
PACKED_DEFAULTS = {"num_stages": 5, "frontend_registers": 40, "math_registers": 232}
#: Smallest legal value of the integer fields of `KernelConfig`.
KERNEL_MINIMA = {
    "block_m": 1,
    "block_n": 1,
    "block_k": 1,
    "num_stages": 2,
    "pull_piece_bytes": 16,
    "weight_run": 1,
    "frontend_registers": 24,
    "math_registers": 24,
    "group_blocks": 1,
    "lag_waves": 0,
}
#: What setmaxnreg takes: multiples of 8 up to this.
MAX_REGISTERS = 256


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be an integer")
    if value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}={value} must be {bound}")


def max_pool_blocks(config: MoEConfig, kernel: KernelConfig) -> int:
    """Pool blocks of the worst routing: every choice of every rank lands here and every routed
    expert pads a block; a shared one has the rank's own tokens.
    """
    routed = config.num_ranks * config.max_routed_per_rank // kernel.block_m
    shared = config.num_shared_experts * -(-config.max_tokens_per_rank // kernel.block_m)
    return routed + config.experts_per_rank + shared


def pool_blocks(config: MoEConfig, kernel: KernelConfig) -> int:
    """Blocks of the pool ring (R)."""
    worst = max_pool_blocks(config, kernel)
    default = DEFAULT_POOL_BLOCK_BYTES // config.recipe.tokens.num_bytes(1)
    return min(worst, kernel.pool_blocks or default)


def _check_problem(config: MoEConfig) -> None:
    precision_of(config.precision)
    _check_integer("num_ranks", config.num_ranks, 1, MAX_RANKS)
    _check_integer("num_experts", config.num_experts, 1)
    _check_integer("top_k", config.top_k, 1, MAX_TOP_K)
    _check_integer("num_shared_experts", config.num_shared_experts, 0, MAX_TOP_K)
    _check_integer("hidden_size", config.hidden_size, 1)
    _check_integer("intermediate_size", config.intermediate_size, 1)
    _check_integer("max_tokens_per_rank", config.max_tokens_per_rank, 1)
    if config.num_experts % config.num_ranks:
        raise ValueError(
            f"num_experts={config.num_experts} is not divisible by num_ranks={config.num_ranks}"
        )
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % 128:
            raise ValueError(f"{name}={getattr(config, name)} is not a multiple of 128")
    if config.num_ranks * config.max_slots_per_rank > MAX_ROUTED_SLOTS:
        raise ValueError(
            f"max_tokens_per_rank={config.max_tokens_per_rank} is too large: "
            "num_ranks * max_tokens_per_rank * (top_k + num_shared_experts) must be <= "
            f"{MAX_ROUTED_SLOTS}"
        )


def _check_kernel_fields(kernel: KernelConfig) -> None:
    """Each field by itself; how they fit each other and the problem is for `supports`."""
    architecture_of(kernel.arch)
    for field, low in KERNEL_MINIMA.items():
        _check_integer(field, getattr(kernel, field), low)
    for field in ("frontend_registers", "math_registers"):
        value = getattr(kernel, field)
        if value % 8 or value > MAX_REGISTERS:
            low = KERNEL_MINIMA[field]
            raise ValueError(
                f"{field}={value} must be a multiple of 8 in {low}..{MAX_REGISTERS}, for setmaxnreg"
            )
    if kernel.pool_blocks is not None:
        _check_integer("pool_blocks", kernel.pool_blocks, 1)
    if not isinstance(kernel.trace, bool):
        raise ValueError(f"trace={kernel.trace!r} must be True or False")
    if kernel.only not in ("", *PARTS):
        raise ValueError(f"only={kernel.only!r} is no part of a launch; choose one of {PARTS}")


def _check_known(names: Iterable[str]) -> None:
    known = [field.name for field in fields(KernelConfig)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise ValueError(
                f"kernel_options has no field {name!r}{hint} fields: {', '.join(known)}"
            )


def select(config: MoEConfig, **overrides) -> KernelConfig:
    """The kernel configuration for `config`: the defaults of its recipe and `overrides`, then a
    group that fits the ring and a run that fits the stages.

    Raises ValueError for a problem that is not supported, an unknown field, and a value that no
    problem could have; `supports` checks the rest.
    """
    _check_problem(config)
    _check_known(overrides)
    recipe = config.recipe
    defaults = PROMOTION_DEFAULTS if recipe.promotes else {}
    packed = PACKED_DEFAULTS if recipe.weights.packed else {}
    kernel = replace(KernelConfig(), **(defaults | packed | overrides))
    _check_kernel_fields(kernel)
    return replace(
        kernel,
        group_blocks=min(kernel.group_blocks, pool_blocks(config, kernel)),
        weight_run=min(kernel.weight_run, kernel.num_stages - 1),
    )


def _check_recipe(recipe: Precision, kernel: KernelConfig) -> None:
    """Whether the kernel can run this row: no conversion on the way to the tensor cores but that of
    packed weights; a scale of A per K block comes with its stage, one of the whole row is applied
    at the end, unless sums are scaled before; an FC1 tile holds half its columns of a row of FC1's
    output, and scales those.
    """

    def refuse(field: str, value: object, why: str) -> None:
        raise ValueError(f"precision={recipe.name!r} has {field}={value!r}: {why}")

    if recipe.output != "bfloat16":
        refuse("output", recipe.output, "slots are stored as bfloat16")
    target = kernel.architecture
    block_k = 8 * target.stage_row_bytes // recipe.tokens.bits
    along_k = {(1, block_k): (kernel.block_n // 2, block_k)}
    weights_of = along_k | {(1, WHOLE_ROW): (1, WHOLE_ROW)}  # the blocks of weights, by tokens'
    # Where sums of packed weights have scales, those of tokens are applied with them.
    with_sums = recipe.weights.packed and recipe.weights.scales_sums
    blocks: dict[str, list] = {
        "tokens": list(along_k if with_sums else weights_of),
        "weights": [weights_of.get(recipe.tokens.scale_block)],
        "hidden": [(1, kernel.block_n // 2)],
    }
    for name, legal in blocks.items():
        operand = getattr(recipe, name)
        bits = target.bits_of(operand.mma)
        if bits is None:
            refuse(f"{name}.mma", operand.mma, f"{target.name} multiplies {dict(target.mma_bits)}")
        if operand.mma != recipe.tokens.mma:
            refuse(f"{name}.mma", operand.mma, f"tokens are multiplied as {recipe.tokens.mma}")
        if name == "weights" and operand.packed:  # in chunks, which are converted
            rows = list(PACKED)
            for field in ("storage", "bits", "scale_block", "scale"):
                value = getattr(operand, field)
                runs = " or ".join(sorted({repr(getattr(row, field)) for row in rows}))
                rows = [row for row in rows if getattr(row, field) == value]
                if not rows:
                    refuse(f"{name}.{field}", value, f"packed weights have {runs}")
            continue
        if operand.storage != operand.mma:
            refuse(f"{name}.storage", operand.storage, f"nothing makes it {operand.mma}")
        if operand.bits != bits:
            refuse(f"{name}.bits", operand.bits, f"{operand.mma} has {bits}")
        if operand.scale != "float32":
            refuse(f"{name}.scale", operand.scale, "scales are float32")
        if operand.bits > 8:
            legal = [NO_SCALES]  # what has scales is quantised to 8 bits
        if operand.scale_block not in legal:
            of_tokens = f"tokens.scale_block={recipe.tokens.scale_block}"
            refuse(f"{name}.scale_block", operand.scale_block, f"{legal} go with {of_tokens}")


def supports(config: MoEConfig, kernel: KernelConfig | None = None) -> None:
    """Raise ValueError, naming field and value, unless the layer can run with this
    configuration.
    """
    _check_problem(config)
    kernel = kernel or select(config)
    _check_kernel_fields(kernel)
    target = kernel.architecture
    if (kernel.block_m, kernel.block_n) != target.tile:
        raise ValueError(
            f"tile block_m={kernel.block_m} x block_n={kernel.block_n} is not supported; "
            f"use {target.tile[0]} x {target.tile[1]}"
        )
    _check_recipe(config.recipe, kernel)
    tokens = config.recipe.tokens
    if tokens.num_bytes(kernel.block_k) != target.stage_row_bytes:
        raise ValueError(
            f"block_k={kernel.block_k} must span {target.stage_row_bytes} bytes of {tokens.storage}"
        )
    _check_integer("weight_run", kernel.weight_run, 1, kernel.num_stages - 1)
    ring = pool_blocks(config, kernel)
    if kernel.group_blocks > ring:
        raise ValueError(f"group_blocks={kernel.group_blocks} must be in 1..{ring} (the pool ring)")
