"""A small layer on a CPU for the tests of `MegaMoE`: two ranks, weights and inputs by seed."""

from __future__ import annotations

import torch

from megamoe import MegaMoE, quantize_weights, reference
from megamoe.precision import PRECISIONS
from tests.machine import max_relative_error
from tests.routing import make_routing

E, K, H, I, T, W = 8, 2, 256, 128, 12, 2  # noqa: E741
#: Recipes whose launches read the given tensors; packed weights are copied.
READ_WHERE_THEY_ARE = [name for name, recipe in PRECISIONS.items() if not recipe.weights.packed]
PACKED = [name for name, recipe in PRECISIONS.items() if recipe.weights.packed]


def make(**changes) -> MegaMoE:
    arguments = {
        "num_experts": E,
        "top_k": K,
        "hidden_size": H,
        "intermediate_size": I,
        "max_tokens_per_rank": T,
        "world": W,
        "device": "cpu",
    }
    return MegaMoE(**(arguments | changes))


def weights(precision: str = "bf16", seed: int = 1) -> reference.Weights:
    rng = torch.Generator().manual_seed(seed)
    w13 = (torch.randn(E, 2 * I, H, generator=rng) * H**-0.5).bfloat16()
    w2 = (torch.randn(E, H, I, generator=rng) * I**-0.5).bfloat16()
    return (
        reference.Weights(w13, w2) if precision == "bf16" else quantize_weights(w13, w2, precision)
    )


def inputs(world: int = W, tokens: int = T, seed: int = 0):
    ids, router = make_routing("masked", world, tokens, K, E, seed)
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, H, generator=rng).bfloat16() for _ in ids], ids, router


def loaded(precision: str = "bf16", **changes) -> MegaMoE:
    moe = make(precision=precision, **changes)
    moe.load_weights(*weights(precision))
    return moe


def check(outputs, xs, ids, router, precision="bf16", clamp=None, given=None) -> None:
    given = given or weights(precision)
    for y, x, idx, weight in zip(outputs, xs, ids, router, strict=True):
        expected = reference.moe_forward(
            x, idx, weight.nan_to_num(), *given, precision=precision, clamp=clamp
        )
        assert reference.relative_error(y, expected) <= max_relative_error(precision)


def quantized(layer: MegaMoE, xs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(xs, x_scales)"""
    pairs = [reference.quantize(x, layer.config.recipe.tokens.scale_columns) for x in xs]
    return [x for x, _ in pairs], [scale for _, scale in pairs]


def same(ys, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ys, others, strict=True))
