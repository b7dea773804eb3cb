"""Weights as a layer takes them in its precision, and what 4-bit ones stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamoe import fourbit
from megamoe.reference import Weights
from megamoe.weights import empty_weights, quantize_weights
from perf.workload.cases import Case, make_weights


def expanded_weights(weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """(w13, w2) in bf16 of 4-bit weights: what they stand for; that of INT4 is rounded."""
    matrices = []
    for codes, scales in ((weights.w13, weights.w13_scale), (weights.w2, weights.w2_scale)):
        assert scales is not None
        experts, rows, row_bytes = codes.shape
        matrix = codes.new_empty(experts, rows, 2 * row_bytes, dtype=torch.bfloat16)
        for expert in range(experts):
            one = slice(expert, expert + 1)
            matrix[one] = fourbit.dequantize(codes[one], scales[one])
        matrices.append(matrix)
    return matrices[0], matrices[1]


def fp8_weights(weights: Weights) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """((w13, w2), their scales) of 4-bit weights in e4m3 (`fourbit.to_fp8`)."""
    assert weights.w13_scale is not None and weights.w2_scale is not None
    w13, w13_scale = fourbit.to_fp8(weights.w13, weights.w13_scale)
    w2, w2_scale = fourbit.to_fp8(weights.w2, weights.w2_scale)
    return (w13, w2), (w13_scale, w2_scale)


def make_layer_weights(
    case: Case, device: torch.device | str = "cpu", experts: Sequence[int] | None = None
) -> Weights:
    """What `MegaMoE.load_weights` takes: `make_weights`, quantised expert by expert if the
    precision has scales, so that never more than one expert is held in bf16.
    """
    recipe, model = case.recipe, case.model
    if not recipe.weights.has_scales:
        return Weights(*make_weights(case, device, experts))
    experts = model.experts if experts is None else experts
    made = empty_weights(recipe, len(experts), model.hidden, model.intermediate, device)
    for place, expert in enumerate(experts):
        drawn = make_weights(case, device, range(expert, expert + 1))
        one = quantize_weights(*drawn, case.precision)
        for whole, part in zip(made.present, one.present, strict=True):
            whole[place] = part[0]
    return made


def chosen_weights(weights: Weights, held: Sequence[int], experts: Sequence[int]) -> Weights:
    """Those of `experts`, from weights of `held`, where an expert may be held several times; no
    copy where they lie side by side.
    """
    places = [held.index(expert) for expert in experts]
    begin, end = places[0], places[-1] + 1
    if places == list(range(begin, end)):
        return weights.of(slice(begin, end))
    index = torch.tensor(places, device=weights.w13.device)
    return Weights._make(None if tensor is None else _rows_of(tensor, index) for tensor in weights)


def _rows_of(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)[index].view(tensor.dtype)  # not every device indexes e4m3
