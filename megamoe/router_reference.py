"""What a router computes, in plain torch: the definition that the kernel is tested against, and
what runs for tensors on a CPU.

Choosing is by logit, where scores have no bias and experts no groups (scores grow with logits, and
different logits can round to one score), else by score plus bias. Order: larger first, NaN before
all as in `torch.topk`, then the lowest index.

Letters: T tokens, K top-k, E experts, G groups, V token ids of a vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.router_config import (
    OVER_CHOSEN,
    RENORMALIZE_EPS,
    SIGMOID,
    SOFTMAX,
    RouterConfig,
)

#: Behind this softplus is taken for the identity.
LINEAR = 20.0


def scores_of(config: RouterConfig, logits_TE: Tensor) -> Tensor:
    """[T, E] in the dtype of the logits."""
    if config.score == SOFTMAX:
        return logits_TE.softmax(dim=-1)
    if config.score == SIGMOID:
        return logits_TE.sigmoid()
    return torch.nn.functional.softplus(logits_TE, threshold=LINEAR).sqrt()


def descending(values: Tensor) -> Tensor:
    """Indices along the last axis: larger first, NaN before all, the lowest index of equals."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def kept_groups(choice_TE: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """bool [T, G]: groups whose two best sum highest."""
    best = choice_TE.unflatten(-1, (num_groups, -1)).sort(dim=-1, descending=True).values
    chosen = descending(best[..., 0] + best[..., 1])[:, :topk_groups]
    kept = torch.zeros(len(chosen), num_groups, dtype=torch.bool, device=chosen.device)
    return kept.scatter(1, chosen, True)


def choose(config: RouterConfig, logits_TE: Tensor, correction_bias_E: Tensor | None) -> Tensor:
    """int64 [T, K]: the experts of every token, best first."""
    choice = logits_TE
    if not config.chooses_by_logit:
        choice = scores_of(config, logits_TE)
        if correction_bias_E is not None:
            choice = choice + correction_bias_E.to(choice.dtype)
    order = descending(choice)
    if config.num_groups > 1:
        kept = kept_groups(choice, config.num_groups, config.topk_groups)
        kept = kept.repeat_interleave(config.group_size, dim=1).gather(1, order)
        order = order.gather(1, descending(kept.to(torch.uint8)))
    return order[:, : config.top_k]


def look_up(config: RouterConfig, tid2eid_VK: Tensor, input_ids_T: Tensor) -> Tensor:
    """int64 [T, K]: the experts of every token id, -1 for what is none."""
    known = (input_ids_T >= 0) & (input_ids_T < len(tid2eid_VK))
    experts = tid2eid_VK.long()[torch.where(known, input_ids_T, 0)]
    known = known[:, None] & (experts >= 0) & (experts < config.num_experts)
    return torch.where(known, experts, -1)


def route(
    config: RouterConfig,
    logits_TE: Tensor,
    *,
    correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    num_tokens: int | Tensor | None = None,
    mask: Tensor | None = None,
    tid2eid: Tensor | None = None,
    input_ids: Tensor | None = None,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(topk_idx int64 [T, K], topk_weights [T, K] in `compute`), as `megamoe.route` describes
    them; the arguments are taken as legal.
    """
    logits = logits_TE.to(compute)
    if config.hashed:
        assert tid2eid is not None and input_ids is not None
        idx = look_up(config, tid2eid, input_ids)
    else:
        idx = choose(config, logits, correction_bias)
    idx = torch.where(tokens_of(logits, num_tokens, mask)[:, None], idx, -1)
    named, at = idx >= 0, idx.clamp(min=0)
    if config.softmax_over == OVER_CHOSEN:
        chosen = logits.gather(1, at).masked_fill(~named, float("-inf"))
        weights = chosen.softmax(dim=-1)
    else:
        weights = scores_of(config, logits).gather(1, at)
    weights = torch.where(named, weights, 0)
    if config.renormalize and config.softmax_over != OVER_CHOSEN:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + RENORMALIZE_EPS)
    return idx, torch.where(named, weights * routed_scaling_factor, 0)


def tokens_of(logits_TE: Tensor, num_tokens: int | Tensor | None, mask: Tensor | None) -> Tensor:
    """bool [T]: rows that are no padding."""
    rows = torch.arange(len(logits_TE), device=logits_TE.device)
    real = torch.ones_like(rows, dtype=torch.bool)
    if num_tokens is not None:
        real &= rows < num_tokens
    if mask is not None:
        real &= mask.bool()
    return real
