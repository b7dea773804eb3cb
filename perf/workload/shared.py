"""Shared experts in a case: their slots, and the layer of a case as two.

They are experts of the routed ones' size that every token goes to, on its own rank, with a factor
of 1. The oracle numbers them behind the routed ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megamoe import reference
from perf.workload.cases import Case, Inputs


def slots_of(
    case: Case, topk_idx: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert, factor) of every slot of these tokens, routed or shared: [T, K + S]."""
    model = case.model
    return reference.with_shared(
        topk_idx, topk_weights, model.num_experts, model.num_shared_experts
    )


def with_all_slots(case: Case, inputs: Sequence[Inputs]) -> list[Inputs]:
    """Inputs of a layer whose routed experts are all experts of the case."""
    if not case.model.num_shared_experts:
        return list(inputs)
    return [Inputs(i.x, *slots_of(case, i.topk_idx, i.topk_weights)) for i in inputs]


def with_shared_slots(case: Case, inputs: Sequence[Inputs]) -> list[Inputs]:
    """Inputs of a layer whose experts are the shared ones (`halves_of`)."""
    made, shared = [], case.model.num_shared_experts
    for i in inputs:
        none = i.topk_idx[:, :0], i.topk_weights[:, :0]
        made.append(Inputs(i.x, *reference.with_shared(*none, 0, shared)))
    return made


def halves_of(case: Case) -> tuple[Case, Case]:
    """The layer of a case as two: the routed experts on all ranks, and the shared ones, each with
    every token of a rank, on that rank alone.
    """
    model, shared = case.model, case.model.num_shared_experts
    routed = dataclasses.replace(model, num_shared_experts=0)
    own = dataclasses.replace(routed, num_experts=shared, top_k=shared)
    return (
        dataclasses.replace(case, model=routed),
        dataclasses.replace(case, model=own, num_ranks=1, ranks_per_gpu=1, routing="balanced"),
    )
