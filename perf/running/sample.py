"""The expected output of some tokens of every rank, where no process holds all experts.

Every rank computes, with the oracle's own stages, the slots that name its experts; their sum over
the ranks is exact, because only one rank contributes to a slot. The slots of a token are then added
in slot order by the oracle's `combine`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe import reference
from megamoe.precision import precision_of
from perf.running.processes import Job
from perf.workload.cases import Inputs

#: Tokens per rank, spread evenly over all of them.
SAMPLED_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """Positions of sampled tokens of this rank, and what the layer must answer there."""

    tokens: torch.Tensor
    expected: torch.Tensor

    def error(self, output: torch.Tensor) -> float:
        """Relative error on the sample; inf if any row of `output` is not finite."""
        if not torch.isfinite(output).all():
            return float("inf")
        return reference.relative_error(output[self.tokens], self.expected)


def spread_evenly(most: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Positions of at most `most` of the tokens of a rank."""
    count = min(most, tokens)
    return torch.arange(count, device=device) * tokens // max(count, 1)


def sample_of(
    job: Job,
    inputs: Inputs,
    weights: reference.Weights,
    precision: str,
    most: int = SAMPLED_TOKENS,
) -> Sample:
    """Collective: this rank's sample. All ranks pass equally many tokens and the weights of their
    own experts.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    recipe, local = precision_of(precision), weights.w13.shape[0]
    tokens = spread_evenly(most, inputs.x.shape[0], inputs.x.device)
    count = tokens.numel()
    x, topk_idx, topk_weights = (
        job.gather(tensor[tokens]) for tensor in (inputs.x, inputs.topk_idx, inputs.topk_weights)
    )

    def own(expert: int) -> reference.Weights | None:
        return weights.of(expert % local) if expert // local == job.rank else None

    rows = reference.input_rows(x, None, recipe)
    slots = reference.slot_rows(rows, topk_idx, topk_weights, own, recipe)
    slots = job.sum_over_ranks(slots.float())  # exact, and every backend can add float32
    mine = slice(job.rank * count, (job.rank + 1) * count)
    expected = reference.combine(slots[mine], topk_idx[mine])
    return Sample(tokens, expected.to(getattr(torch, recipe.output)))
