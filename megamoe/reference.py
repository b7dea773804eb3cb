"""The oracle: a dense MoE layer, one function per stage, with explicit rounding points.

It knows nothing of ranks, pools or tiles. Rounding points are those of the kernel: FC1 accumulates
in float32, SwiGLU and the router weight are applied in float32 and rounded once to the token dtype;
FC2 accumulates in float32 and is rounded to the output dtype per slot; the slots of a token are
added in float32 in slot order and rounded once. `rounding=False` keeps float64 everywhere (the
exact answer for the given inputs).

Legend: T tokens, K top-k, E experts, H hidden, I intermediate. Works on CPU and GPU tensors.
"""

from __future__ import annotations

import torch

from megamoe.precision import Precision, precision_of


def fc1(x_TH: torch.Tensor, w13_2IH: torch.Tensor) -> torch.Tensor:
    """Gate and up projections of one expert, accumulated in the dtype of the arguments: [T, 2I],
    gate first.
    """
    return x_TH @ w13_2IH.T


def swiglu(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [T, I]."""
    gate, up = gate_up_T2I.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def fc2(hidden_TI: torch.Tensor, w2_HI: torch.Tensor) -> torch.Tensor:
    """Down projection of one expert: [T, H]."""
    return hidden_TI @ w2_HI.T


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
    x_RH: torch.Tensor,
    weights_R: torch.Tensor,
    w13_2IH: torch.Tensor,
    w2_HI: torch.Tensor,
    recipe: Precision,
    rounding: bool = True,
) -> torch.Tensor:
    """One expert over R rows with the recipe's rounding points: FC1, SwiGLU, x router weight, FC2
    -> [R, H].
    """
    compute = torch.float32 if rounding else torch.float64
    hidden = swiglu(fc1(x_RH.to(compute), w13_2IH.to(compute))) * weights_R.to(compute).unsqueeze(
        -1
    )
    if rounding:
        hidden = hidden.to(getattr(torch, recipe.token)).to(compute)
    out = fc2(hidden, w2_HI.to(compute))
    return out.to(getattr(torch, recipe.output)) if rounding else out


def moe_forward(
    x_TH: torch.Tensor,
    topk_idx_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    w13_E2IH: torch.Tensor,
    w2_EHI: torch.Tensor,
    precision: str = "bf16",
    rounding: bool = True,
) -> torch.Tensor:
    """The whole layer over all experts: [T, H] in the recipe's output dtype (float64 with
    rounding=False).

    topk_idx uses -1 for a masked slot; a token may name one expert in several slots.
    """
    recipe = precision_of(precision)
    num_tokens, top_k = topk_idx_TK.shape
    output = getattr(torch, recipe.output) if rounding else torch.float64
    slots = torch.zeros(num_tokens, top_k, x_TH.shape[1], dtype=output, device=x_TH.device)
    for expert in topk_idx_TK.unique().tolist():
        if expert < 0:
            continue
        token, k = torch.where(topk_idx_TK == expert)
        rows = expert_rows(
            x_TH[token],
            topk_weights_TK[token, k],
            w13_E2IH[expert],
            w2_EHI[expert],
            recipe,
            rounding,
        )
        slots[token, k] = rows
    return combine(slots, topk_idx_TK, torch.float32 if rounding else torch.float64).to(output)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; 0 when both are empty or zero, inf for NaN in
    `out`.
    """
    out, expected = out.double(), expected.double()
    if not torch.isfinite(out).all():
        return float("inf")
    difference, scale = (out - expected).norm().item(), expected.norm().item()
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))
