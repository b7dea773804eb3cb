"""Experts of a model as transformers has them, for tests of what runs them."""

from __future__ import annotations

import types

import torch

from megamoe.integrations import experts

NAME = "megamoe_under_test"


class Experts(torch.nn.Module):
    """Packed weights, flags, and a gate of their own, under implementation NAME."""

    def __init__(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        config: object = None,
        limit: float | None = None,
    ):
        super().__init__()
        self.config, self.num_experts = config or types.SimpleNamespace(), len(w13)
        self.limit, self.act_fn = limit, torch.nn.SiLU()
        self.has_gate, self.has_bias = True, False
        self.is_transposed, self.is_concatenated = False, True
        self.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
        self.down_proj = torch.nn.Parameter(w2, requires_grad=False)

    def _apply_gate(self, pairs):
        gate, up = pairs.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.act_fn(gate) * up

    def forward(self, x, idx, router):
        return experts.forward(NAME, self, x, idx, router)
