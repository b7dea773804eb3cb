"""What the layer must answer: all tokens where one process holds all experts, else a sample of each
rank's.

For a sample every rank computes, with the oracle's own stages, the slots that name its experts, and
those of shared experts of its own tokens; their sum over the ranks is exact, because only one rank
contributes to a slot. The slots of a token are then added in slot order by the oracle's `combine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamoe import reference
from perf.running.jobs import Job
from perf.workload.cases import Case, Inputs
from perf.workload.shared import slots_of

#: Tokens per rank, spread evenly over all of them.
SAMPLED_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """Positions of tokens of a rank, and what the layer must answer there."""

    tokens: torch.Tensor | slice
    expected: torch.Tensor

    def error(self, output: torch.Tensor) -> float:
        """Relative error on the sample; inf if any row of `output` is not finite."""
        if not torch.isfinite(output).all():
            return float("inf")
        return reference.relative_error(output[self.tokens], self.expected)


@dataclass(frozen=True)
class Expected:
    """A sample of each rank of this process."""

    job: Job
    samples: Sequence[Sample]

    def error(self, outputs: Sequence[torch.Tensor]) -> float:
        """The largest relative error of a rank of the job; collective."""
        pairs = zip(self.samples, outputs, strict=True)
        return self.job.max_over_ranks([max(sample.error(output) for sample, output in pairs)])[0]


def expected_of(
    job: Job, inputs: Sequence[Inputs], weights: reference.Weights, case: Case
) -> Expected:
    """Collective: the answer to these inputs of the ranks of this process, over the weights of its
    experts (`Case.experts_of`), with true float32 products on the inputs' device.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    if not job.alone:
        (own,) = inputs
        return Expected(job, [sample_of(job, own, weights, case)])
    held = case.experts_of(range(case.num_ranks))

    def of(expert: int) -> reference.Weights:
        return weights.of(held.index(expert))

    def whole(i: Inputs) -> Sample:
        routing = slots_of(case, i.topk_idx, i.topk_weights)
        rows = reference.input_rows(i.x, None, case.recipe)
        slots = reference.slot_rows(rows, *routing, of, case.recipe)
        return Sample(slice(None), reference.combine(slots, routing[0]).to(slots.dtype))

    return Expected(job, [whole(i) for i in inputs])


def spread_evenly(most: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Positions of at most `most` of the tokens of a rank."""
    count = min(most, tokens)
    return torch.arange(count, device=device) * tokens // max(count, 1)


def sample_of(
    job: Job, inputs: Inputs, weights: reference.Weights, case: Case, most: int = SAMPLED_TOKENS
) -> Sample:
    """Collective: this rank's sample. All ranks pass equally many tokens and the weights of their
    own experts.
    """
    recipe, held = case.recipe, case.experts_of([job.rank])
    tokens = spread_evenly(most, inputs.x.shape[0], inputs.x.device)
    count = tokens.numel()
    x, topk_idx, topk_weights = (
        job.gather(tensor[tokens]) for tensor in (inputs.x, inputs.topk_idx, inputs.topk_weights)
    )

    def own(expert: int) -> reference.Weights | None:
        return weights.of(held.index(expert)) if expert in held else None

    mine = slice(job.rank * count, (job.rank + 1) * count)
    idx, factors = slots_of(case, topk_idx, topk_weights)
    here = idx.clone()  # of shared experts, which all ranks hold, slots of this rank's tokens
    here[:, case.model.top_k :] = -1
    here[mine] = idx[mine]
    rows = reference.input_rows(x, None, recipe)
    slots = reference.slot_rows(rows, here, factors, own, recipe)
    slots = job.sum_over_ranks(slots.float())  # exact, and every backend can add float32
    expected = reference.combine(slots[mine], idx[mine])
    return Sample(tokens, expected.to(getattr(torch, recipe.output)))
