"""The oracle: a dense MoE layer, one function per stage, with explicit rounding points.

It knows nothing of ranks, pools or tiles. Rounding points are those of the kernel: the input is
quantised if the recipe has scales; FC1 accumulates in float32, SwiGLU and the router weight are
applied in float32 and the result is stored once, rounded or quantised; FC2 accumulates in float32
and is rounded to the output dtype per slot; the slots of a token are added in float32 in slot order
and rounded once. `rounding=False` keeps float64 behind the input (the exact answer for the input
and the weights as they are stored).

Legend: T tokens, K top-k, E experts, H hidden, I intermediate; R rows, C columns, N output
channels, S scales of a row. Works on CPU and GPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from megamoe.fourbit import multiplied
from megamoe.precision import (
    FP8_BLOCK,
    FP8_MAX,
    FP8_MIN_AMAX,
    WHOLE_ROW,
    Operand,
    Precision,
    precision_of,
)


class Weights(NamedTuple):
    """Expert weights in checkpoint layout: of E experts, or without the first axis of one.

    w13: [E, 2I, H], gate rows then up rows; w2: [E, H, I]; both of the recipe's weight dtype.
    w13_scale, w2_scale: float32, what the stored values are multiplied by; None without scales.
    fp8_block: [E, 2I/128, H/128] and [E, H/128, I/128]; fp8_channel: [E, 2I] and [E, H]. Of 4-bit
    weights see `fourbit`.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None

    @property
    def present(self) -> list[torch.Tensor]:
        """The tensors that are there, in order."""
        return [tensor for tensor in self if tensor is not None]

    def of(self, experts: int | slice | list[int]) -> Weights:
        """The weights of one expert, or of a slice of them, not copied, or of a list, copied."""
        return Weights._make(None if tensor is None else tensor[experts] for tensor in self)


def quantize(values_RC: torch.Tensor, block: int = FP8_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [R, C], float32 scales [R, S]) of rows that share a scale per `block` columns,
    or WHOLE_ROW. A stored value times its scale is about the value.

    scale = max |value| / 448, stored = e4m3(value * (1 / scale)), every operation rounded to
    float32: the same bits on every device.
    """
    rows, columns = values_RC.shape
    size = columns if block == WHOLE_ROW else block
    values_RSB = values_RC.float().reshape(rows, columns // size, size)
    amax_RS = values_RSB.abs().amax(dim=-1).clamp_min(FP8_MIN_AMAX)
    # A tensor: a GPU divides by a number as if by multiplying with its inverse, which rounds twice.
    scale_RS = amax_RS / amax_RS.new_full((), FP8_MAX)
    scaled = values_RSB * (torch.ones_like(scale_RS) / scale_RS).unsqueeze(-1)
    stored = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return stored.reshape(rows, columns), scale_RS


def dequantize(stored_RC: torch.Tensor, scale_RS: torch.Tensor) -> torch.Tensor:
    """Stored values times their scales, float64 (exact): [R, C]."""
    width = stored_RC.shape[1] // scale_RS.shape[1]
    return stored_RC.double() * scale_RS.double().repeat_interleave(width, dim=1)


def stored(values_RC: torch.Tensor, operand: Operand) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows as the operand stores them: (values, scales), or (rounded values, None) without
    scales.
    """
    if not operand.has_scales:
        return values_RC.to(getattr(torch, operand.storage)), None
    return quantize(values_RC, operand.scale_columns)


def input_rows(
    x_TH: torch.Tensor, x_scale_TS: torch.Tensor | None, recipe: Precision
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layer's input as it travels: (rows, scales or None). Input that is quantised already is
    returned as it is.
    """
    if x_scale_TS is not None:
        return x_TH, x_scale_TS
    return stored(x_TH, recipe.tokens)


def take_rows(
    rows: tuple[torch.Tensor, torch.Tensor | None], index_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some of the rows that `input_rows` returned."""
    values, scale = rows
    values = values.view(torch.uint8)[index_R].view(values.dtype)  # not every device indexes e4m3
    return values, None if scale is None else scale[index_R]


def scale_rows(scale: torch.Tensor | None, channels: int) -> torch.Tensor | None:
    """Scales of one weight matrix, by output channel: [N/block, S] or [N] -> [N, S]."""
    if scale is None:
        return None
    return scale.reshape(scale.shape[0], -1).repeat_interleave(channels // scale.shape[0], dim=0)


def product(
    rows_RC: torch.Tensor,
    weights_NC: torch.Tensor,
    row_scale_RS: torch.Tensor | None = None,
    weight_scale_NS: torch.Tensor | None = None,
) -> torch.Tensor:
    """rows @ weights^T with the scales of both, accumulated in the dtype of the arguments: [R, N].

    S is the number of blocks that C is divided into, of rows and of weights each their own: sums
    over columns that share both scales are scaled before they are added up, and a scale of the
    whole row is applied to the total. Raises ValueError if C has no such blocks.
    """
    scales = []  # [R, 1, S] and [1, N, S]
    if row_scale_RS is not None:
        scales.append(row_scale_RS.unsqueeze(1))
    if weight_scale_NS is not None:
        scales.append(weight_scale_NS.unsqueeze(0))
    columns, counts = rows_RC.shape[1], [scale.shape[-1] for scale in scales]
    blocks = math.lcm(*counts)
    if columns % blocks:
        raise ValueError(f"{columns} columns cannot be divided into {counts} blocks with a scale")
    by_block = [scale for scale in scales if scale.shape[-1] > 1]
    of_row = [scale for scale in scales if scale.shape[-1] == 1]
    pairs = zip(rows_RC.chunk(blocks, 1), weights_NC.chunk(blocks, 1), strict=True)
    total = None
    for block, (rows, weights) in enumerate(pairs):
        with torch.autocast(rows.device.type, enabled=False):  # the only operation it would change
            part = rows @ weights.T
        for scale in by_block:
            part = part * scale[..., block * scale.shape[-1] // blocks]
        total = part if total is None else total + part
    assert total is not None, "no block"
    for scale in of_row:
        total = total * scale[..., 0]
    return total


def swiglu(gate_up_T2I: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """silu(gate) * up: [T, I]. With `limit`, of min(gate, limit) and of up within -limit..limit."""
    gate, up = gate_up_T2I.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up


def gpt_oss(
    gate_up_T2I: torch.Tensor, limit: float | None = 7.0, alpha: float = 1.702
) -> torch.Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), bounded as in `swiglu`: [T, I]."""
    gate, up = gate_up_T2I.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def relu2(sums_TI: torch.Tensor) -> torch.Tensor:
    """The square of what is above 0: [T, I]."""
    return sums_TI.relu().square()


#: The functions of `activation.ACTIVATIONS`, which take their parameters in that order.
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "swiglu": swiglu,
    "gpt_oss": gpt_oss,
    "relu2": relu2,
}


class Epilogue(NamedTuple):
    """What follows the two products: an activation with the values of its parameters, and biases of
    FC1 [E, 2I], or [E, I] without a gate, and of FC2 [E, H]; of one expert without the first axis.
    """

    activation: str = "swiglu"
    parameters: tuple = ()
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None

    def of(self, expert: int) -> Epilogue:
        biases = (None if bias is None else bias[expert] for bias in self[2:])
        return Epilogue(*self[:2], *biases)


def combine(
    slots_TKH: torch.Tensor, topk_idx_TK: torch.Tensor, accumulate: torch.dtype = torch.float32
) -> torch.Tensor:
    """Sum over the slots whose expert id is >= 0, in slot order, in `accumulate`: [T, H]. Masked
    slots are not read.
    """
    out = torch.zeros(
        slots_TKH.shape[0], slots_TKH.shape[2], dtype=accumulate, device=slots_TKH.device
    )
    for k in range(topk_idx_TK.shape[1]):
        live = (topk_idx_TK[:, k] >= 0).unsqueeze(-1)
        out = out + torch.where(
            live,
            slots_TKH[:, k].to(accumulate),
            torch.zeros((), dtype=accumulate, device=out.device),
        )
    return out


def expert_rows(
    rows: tuple[torch.Tensor, torch.Tensor | None],
    router_R: torch.Tensor,
    expert: Weights,
    recipe: Precision,
    clamp: float | None = None,
    rounding: bool = True,
    compute: torch.dtype | None = None,
    epilogue: Epilogue | None = None,
) -> torch.Tensor:
    """One expert over R rows with the recipe's rounding points: FC1, activation, x router weight,
    FC2 -> [R, H].

    rows: (values [R, H], scales [R, S] or None) as `input_rows` returns them. compute: dtype of the
    sums; float32, or float64 without rounding. epilogue: SwiGLU with `clamp` unless said otherwise.
    """
    epilogue = epilogue or Epilogue(parameters=(clamp,))
    compute = compute or (torch.float32 if rounding else torch.float64)
    router_R1 = router_R.to(compute).unsqueeze(-1)

    def multiply(values, scale, weights, weight_scale):
        if recipe.weights.packed:
            (weights,), own = multiplied(weights[None], weight_scale[None])
            weight_scale = None if own is None else own[0]
        scales = (scale, scale_rows(weight_scale, weights.shape[0]))
        converted = (None if one is None else one.to(compute) for one in scales)
        return product(values.to(compute), weights.to(compute), *converted)

    sums = multiply(*rows, expert.w13, expert.w13_scale)
    if epilogue.w13_bias is not None:
        sums = sums + epilogue.w13_bias.to(compute)
    activated = ACTIVATIONS[epilogue.activation](sums, *epilogue.parameters)
    hidden, scale = activated * router_R1, None
    if rounding:
        hidden, scale = stored(hidden, recipe.hidden)
    out = multiply(hidden, scale, expert.w2, expert.w2_scale)
    if epilogue.w2_bias is not None:
        out = out + router_R1 * epilogue.w2_bias.to(compute)
    return out.to(getattr(torch, recipe.output)) if rounding else out


def slot_rows(
    rows: tuple[torch.Tensor, torch.Tensor | None],
    topk_idx_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    weights_of: Callable[[int], Weights | None],
    recipe: Precision,
    clamp: float | None = None,
    rounding: bool = True,
    compute: torch.dtype | None = None,
    epilogue: Epilogue | None = None,
) -> torch.Tensor:
    """Every slot through its expert: [T, K, H] in the recipe's output dtype (float64 without
    rounding), zero where a slot is masked or its expert is not here.

    rows: of all tokens, as `input_rows` returns them. weights_of: of an expert, one at a time; None
    if it is not here. Others as in `expert_rows`.
    """
    output, values = getattr(torch, recipe.output) if rounding else torch.float64, rows[0]
    slots = torch.zeros(
        *topk_idx_TK.shape, values.shape[1], dtype=output, device=topk_idx_TK.device
    )
    for expert in topk_idx_TK.unique().tolist():
        weights = None if expert < 0 else weights_of(expert)
        if weights is None:
            continue
        token, k = torch.where(topk_idx_TK == expert)
        router = topk_weights_TK[token, k]
        own = epilogue and epilogue.of(expert)
        slots[token, k] = expert_rows(
            take_rows(rows, token), router, weights, recipe, clamp, rounding, compute, own
        )
    return slots


def with_shared(
    topk_idx_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    num_experts: int,
    num_shared: int,
    shared_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing with a column more for every shared expert, that every token goes to: [T, K + S].
    Shared experts have the ids behind those of the routed ones.
    """
    shared = torch.arange(num_experts, num_experts + num_shared).to(topk_idx_TK)
    columns = topk_idx_TK.shape[0], num_shared
    return (
        torch.cat([topk_idx_TK, shared.expand(columns)], dim=1),
        torch.cat([topk_weights_TK, topk_weights_TK.new_full(columns, shared_weight)], dim=1),
    )


def moe_forward(
    x_TH: torch.Tensor,
    topk_idx_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    *,
    precision: str = "bf16",
    x_scale: torch.Tensor | None = None,
    clamp: float | None = None,
    rounding: bool = True,
    compute: torch.dtype | None = None,
    epilogue: Epilogue | None = None,
) -> torch.Tensor:
    """The whole layer over all experts: [T, H] in the recipe's output dtype (float64 with
    rounding=False).

    Weights as in `Weights`. topk_idx uses -1 for a masked slot; a token may name one expert in
    several slots. x_scale: [T, S] if x is quantised already. clamp: of SwiGLU, None for none.
    compute: dtype of the sums of FC1 and FC2, float32 unless said otherwise. epilogue: of another
    activation, or with biases. Raises ValueError for
    an id that is neither -1 nor an expert.
    """
    for expert in topk_idx_TK.unique().tolist():
        if not -1 <= expert < len(w13):
            raise ValueError(f"topk_idx holds {expert}, expected -1..{len(w13) - 1}")
    recipe, weights = precision_of(precision), Weights(w13, w2, w13_scale, w2_scale)
    rows = input_rows(x_TH, x_scale, recipe)
    slots = slot_rows(
        rows, topk_idx_TK, topk_weights_TK, weights.of, recipe, clamp, rounding, compute, epilogue
    )
    out = combine(slots, topk_idx_TK, torch.float32 if rounding else torch.float64)
    return out.to(slots.dtype)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; 0 when both are empty or zero, inf for NaN in
    `out`. Raises ValueError if their shapes differ.
    """
    if out.shape != expected.shape:
        raise ValueError(f"out has shape {list(out.shape)}, expected {list(expected.shape)}")
    out, expected = out.double(), expected.double()
    if not torch.isfinite(out).all():
        return float("inf")
    difference, scale = (out - expected).norm().item(), expected.norm().item()
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))
