"""The layer as an operator of torch, for `torch.compile`, `torch.export` and fake tensors.

A tracer must not look into a forward: streams, events and launches mean nothing to it. It sees
`megamoe::forward`, which writes outputs and counts that are given and names the layer by a number.
Outside of a tracer a forward does not pass through here.

A layer is forward only. Where a gradient could be asked for, `megamoe::forward_only` stands behind
the output: whoever runs backward through it gets an error, and not silence.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

FORWARD_ONLY = (
    "MegaMoE is forward only: no gradient passes through it. Call it under torch.no_grad() or "
    "torch.inference_mode(), or detach its output"
)

_layers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: torch.nn.Module) -> int:
    """The number by which the operator finds this layer, as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def is_traced() -> bool:
    """True while somebody traces or fakes what is called: torch.compile, torch.export, fake
    tensors, any mode that sees operators.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@torch.library.custom_op("megamoe::forward", mutates_args=("outs", "expert_counts"))
def forward(
    xs: list[Tensor],
    topk_idx: list[Tensor],
    topk_weights: list[Tensor],
    x_scales: list[Tensor],
    outs: list[Tensor],
    expert_counts: list[Tensor],
    layer: int,
) -> None:
    """A forward of layer number `layer`: a tensor per rank of this process in every list; x_scales
    and expert_counts may be empty.
    """
    found = _layers.get(layer)
    if found is None:
        raise ValueError(f"layer {layer} of this process is gone: compile the model again")
    found.run(False, xs, topk_idx, topk_weights, x_scales or None, outs, expert_counts or None)


@forward.register_fake
def _(xs, topk_idx, topk_weights, x_scales, outs, expert_counts, layer):
    return None


def trace(
    layer: int, xs: list, topk_idx: list, topk_weights: list, scales: list, outs: list, counts: list
) -> list[Tensor]:
    """The outputs of a forward as a tracer sees it; lists as `inputs.columns_of` makes them."""
    outs = [
        torch.empty_like(x, dtype=torch.bfloat16) if out is None else out
        for x, out in zip(xs, outs, strict=True)
    ]
    given = [[item for item in items if item is not None] for items in (scales, counts)]
    if any(items and len(items) != len(xs) for items in given):
        raise ValueError("x_scale and expert_counts are traced for every rank, or for none")
    with torch.no_grad():
        torch.ops.megamoe.forward(xs, topk_idx, topk_weights, given[0], outs, given[1], layer)
    return outs


def end_gradients(ys: list[Tensor], tensors: tuple) -> list[Tensor]:
    """Outputs through which no gradient passes, if one of the tensors behind them requires it."""
    origins = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    return [torch.ops.megamoe.forward_only(y, origins) for y in ys] if origins else ys


@torch.library.custom_op("megamoe::forward_only", mutates_args=())
def forward_only(y: Tensor, origins: list[Tensor]) -> Tensor:
    """A copy of y as a result of `origins`, through which no gradient passes."""
    return y.clone()


@forward_only.register_fake
def _(y, origins):
    return torch.empty_like(y)


@torch.library.custom_op("megamoe::no_gradient", mutates_args=())
def no_gradient(gradient: Tensor, like: Tensor) -> Tensor:
    """In place of a gradient: an error when it is computed, and not when it is traced."""
    raise RuntimeError(FORWARD_ONLY)


@no_gradient.register_fake
def _(gradient, like):
    return torch.empty_like(like)


def _save_origins(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1])


def _backward(ctx, gradient):
    return None, [no_gradient(gradient, origin) for origin in ctx.saved_tensors]


forward_only.register_autograd(_backward, setup_context=_save_origins)
