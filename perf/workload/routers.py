"""Routers of models, and logits for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.router_config import RouterConfig


@dataclass(frozen=True)
class RouterCase:
    """A model's router; `factor`: its routed_scaling_factor."""

    config: RouterConfig
    factor: float


#: By the names of models (`cases.MODELS`).
ROUTERS = {
    "v3": RouterCase(
        RouterConfig(256, 8, "sigmoid", num_groups=8, topk_groups=4, correction_bias=True), 2.5
    ),
    "pro": RouterCase(RouterConfig(384, 6, "sqrtsoftplus", correction_bias=True), 2.5),
}


@dataclass(frozen=True)
class RouterInputs:
    """logits: float32 [T, E]; correction_bias: float32 [E]."""

    logits: Tensor
    correction_bias: Tensor


def inputs_of(case: RouterCase, tokens: int, device: torch.device) -> RouterInputs:
    """Normal random numbers, the same for the same number of tokens."""
    rng = torch.Generator(device).manual_seed(tokens)
    experts = case.config.num_experts
    logits = 2 * torch.randn(tokens, experts, generator=rng, device=device)
    return RouterInputs(logits, 0.05 * torch.randn(experts, generator=rng, device=device))
