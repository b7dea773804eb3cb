"""Shared by the GPU tests: a module with random weights per configuration, fresh inputs, and the
oracle's bound.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch

from megamoe import MegaMoE, quantize_weights, reference
from tests.gpu.configs import CONFIGS
from tests.routing import make_routing
from workspace import Workspace
from workspace.layout import RESET_KINDS

#: The kernel's error against exact arithmetic may be this multiple of the error of the same
#: rounding points alone.
ERROR_FACTOR = 1.2
#: FP8 alone, over at least this many tokens (a single one scatters): the error of storing hidden
#: rows in e4m3, 0.0225 on average.
FP8_MIN_TOKENS = 16
FP8_MAX_ERROR = 0.032
#: And the kernel's distance from the oracle, as a part of the oracle's error. Tensor cores add e4m3
#: products with some 13 bits, so codes of hidden values flip: up to 0.65 as simulated with such
#: sums, and 0.6 to 0.8 on H200 at model sizes. Rounding at another point (say, one scale per hidden
#: row) makes it 0.98 or more, while the error itself stays the same.
FP8_ORACLE_DISTANCE = 0.85
TIMEOUT_S = 5.0


def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@functools.cache
def weights_of(
    experts: int, hidden: int, intermediate: int, precision: str = "bf16"
) -> reference.Weights:
    """All experts, as `load_weights` takes them."""
    rng = torch.Generator("cuda").manual_seed(experts + hidden + intermediate)
    w13 = (
        torch.randn(experts, 2 * intermediate, hidden, device="cuda", generator=rng) * hidden**-0.5
    )
    w2 = (
        torch.randn(experts, hidden, intermediate, device="cuda", generator=rng)
        * intermediate**-0.5
    )
    w13, w2 = w13.bfloat16(), w2.bfloat16()
    if precision == "bf16":
        return reference.Weights(w13, w2)
    return quantize_weights(w13, w2, precision)


def all_weights(moe: MegaMoE) -> reference.Weights:
    """Of the routed experts, then of the shared ones."""
    config = moe.config
    return weights_of(
        config.num_experts + config.num_shared_experts, config.hidden_size,
        config.intermediate_size, config.precision,
    )  # fmt: skip


def weights_here(moe: MegaMoE) -> reference.Weights:
    """What the ranks of this process hold."""
    weights, config = all_weights(moe), moe.config
    if not config.num_shared_experts and not moe.group:
        return weights
    experts = [expert for rank in moe.local_ranks for expert in config.experts_of(rank)]
    index = torch.tensor(experts, device="cuda")
    return reference.Weights(*(None if part is None else take(part, index) for part in weights))


def take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tensor[index] of any dtype, by its bytes."""
    return tensor.view(torch.uint8)[index].view(tensor.dtype)


def make_moe(name: str, **options) -> MegaMoE:
    """A fresh module of a configuration of `configs`, weights loaded."""
    fields = dict(CONFIGS[name])
    kernel = fields.pop("kernel")
    timeout_s = options.pop("timeout_s", TIMEOUT_S)
    moe = MegaMoE(
        world=fields.pop("num_ranks"),
        device="cuda",
        timeout_s=timeout_s,
        start_timeout_s=options.pop("start_timeout_s", timeout_s),
        kernel_dir=os.environ.get("MEGAMOE_KERNEL_DIR"),
        kernel_options=kernel,
        **fields,
        **options,
    )
    moe.load_weights(*weights_here(moe))
    return moe


@functools.cache
def shared_moe(name: str) -> MegaMoE:
    """The same module for all tests that only run forwards: state that leaks between launches
    shows.
    """
    return make_moe(name)


def inputs_of(moe: MegaMoE, routing: str, seed: int, tokens: int | None = None, dtype=torch.int64):
    """(xs, ids, weights) per rank on the GPU, fresh for every seed."""
    config = moe.config
    tokens = config.max_tokens_per_rank if tokens is None else tokens
    routed = make_routing(routing, config.num_ranks, tokens, config.top_k, config.num_experts, seed)
    rng = torch.Generator("cuda").manual_seed(seed)
    ids = [idx.to("cuda", dtype) for idx in routed[0]]
    weights = [weight.cuda() for weight in routed[1]]
    xs = [
        torch.randn(idx.shape[0], config.hidden_size, device="cuda", generator=rng).bfloat16()
        for idx in ids
    ]
    return xs, ids, weights


def quantized(moe: MegaMoE, xs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(xs, x_scales) as a caller would quantise them."""
    pairs = [reference.quantize(x, moe.config.recipe.tokens.scale_columns) for x in xs]
    return [x for x, _ in pairs], [scale for _, scale in pairs]


def launch(moe: MegaMoE, xs, ids, weights, x_scales=None, **options) -> list[torch.Tensor]:
    """A forward that nobody waits for, as per-rank lists whatever the world size; `options` are
    such lists too.
    """
    arguments = {"x": xs, "topk_idx": ids, "topk_weights": weights, "x_scale": x_scales, **options}
    if moe.num_ranks > 1:
        return moe(**arguments)
    return [moe(**{name: items[0] for name, items in arguments.items() if items is not None})]


def forward(moe: MegaMoE, xs, ids, weights, x_scales=None, **options) -> list[torch.Tensor]:
    """The same, waited for; outputs are poisoned first and cloned."""
    for output in moe.backend.outputs:
        output.fill_(float("nan"))
    outputs = launch(moe, xs, ids, weights, x_scales, **options)
    moe.synchronize()
    return [y.clone() for y in outputs]


def capture(moe: MegaMoE, xs, ids, weights) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """(graph, outputs) of one forward."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = launch(moe, xs, ids, weights)
    return graph, outputs


def poison(moe: MegaMoE) -> None:
    """Overwrite every data region with NaN (0xFF bytes); only counters, padding and barriers keep
    their values.
    """
    poison_workspace(moe.workspace)


def poison_workspace(workspace: Workspace) -> None:
    for rank in workspace.local_ranks:
        views = workspace.regions(rank)
        for name, region in workspace.layout.regions.items():
            if region.kind == "data":
                views[name].view(torch.uint8).fill_(0xFF)


def expected_of(moe: MegaMoE, xs, ids, weights, rounding: bool) -> list[torch.Tensor]:
    """The oracle per rank, on the GPU, with exact sums: with the rounding points of the kernel, or
    without those behind the input.
    """
    exact_float32()
    config, factor = moe.config, moe.shared_weight
    shared = config.num_experts, config.num_shared_experts, factor
    return [
        reference.moe_forward(
            x, *reference.with_shared(idx, weight.nan_to_num(), *shared), *all_weights(moe),
            precision=config.precision, clamp=moe.activation_clamp, rounding=rounding,
            compute=torch.float64,
        )
        for x, idx, weight in zip(xs, ids, weights, strict=True)
    ]  # fmt: skip


def assert_correct(moe: MegaMoE, outputs, xs, ids, weights) -> None:
    """Every rank's output is as close to exact arithmetic as the same rounding points allow; with
    scales, near the oracle itself too.
    """
    exact = expected_of(moe, xs, ids, weights, rounding=False)
    rounded = expected_of(moe, xs, ids, weights, rounding=True)
    for rank, (out, truth, oracle) in enumerate(zip(outputs, exact, rounded, strict=True)):
        error, bound = reference.relative_error(out, truth), reference.relative_error(oracle, truth)
        seen = f"rank {rank}: error {error:.2e}, oracle {bound:.2e}"
        assert error <= ERROR_FACTOR * bound, seen
        if moe.config.recipe.tokens.has_scales and out.shape[0] >= FP8_MIN_TOKENS:
            distance = reference.relative_error(out, oracle)
            assert distance <= FP8_ORACLE_DISTANCE * bound, f"{seen}, distance {distance:.2e}"
            assert error <= FP8_MAX_ERROR, seen


def assert_at_rest(moe: MegaMoE, kinds: Sequence[str] = RESET_KINDS) -> None:
    """Every region of these kinds is zero, and every barrier word holds the same epoch."""
    assert_workspace_at_rest(moe.workspace, kinds)


def assert_workspace_at_rest(workspace: Workspace, kinds: Sequence[str] = RESET_KINDS) -> None:
    for rank in workspace.local_ranks:
        views = workspace.regions(rank)
        for name, region in workspace.layout.regions.items():
            if region.kind in kinds:
                assert not views[name].any(), f"rank {rank} left something in {name}"
        epoch = views["nvlink_barrier_counter"][0]
        assert (views["nvlink_barrier_signal"][:, 0] == epoch).all()
        assert not views["abort_flag"].any()
