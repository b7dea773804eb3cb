"""A router made of torch operations, as models write it: top-k by `torch.topk`, which leaves the
order of equals open, and masks for groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.router_config import RENORMALIZE_EPS, RouterConfig
from megamoe.router_reference import scores_of


def torch_route(
    config: RouterConfig, logits_TE: Tensor, correction_bias_E: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """(topk_idx int64 [T, K], topk_weights [T, K]) of a router with bias that renormalises."""
    scores = scores_of(config, logits_TE)
    choice = scores + correction_bias_E
    if config.num_groups > 1:
        best = choice.view(-1, config.num_groups, config.group_size).topk(2, dim=-1).values
        groups = best.sum(dim=-1).topk(config.topk_groups, dim=-1, sorted=False).indices
        kept = torch.zeros_like(best[..., 0]).scatter_(1, groups, 1.0)
        kept = kept.unsqueeze(-1).expand(-1, -1, config.group_size).reshape(choice.shape)
        choice = choice.masked_fill(kept == 0, float("-inf"))
    idx = choice.topk(config.top_k, dim=-1).indices
    weights = scores.gather(1, idx)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + RENORMALIZE_EPS)
    return idx, weights * factor
