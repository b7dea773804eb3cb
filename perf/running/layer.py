"""The layer of a plan, made and called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

import megamoe
from megamoe.precision import Precision
from perf.against.experts import MAX_ERROR
from perf.running.jobs import ALONE, Job
from perf.running.plan import Plan
from perf.workload.cases import Inputs

#: The layer's relative error against the oracle, which stores hidden rows in FP8 as the layer does.
#: Above this it is no rounding: sums in another order flip codes of hidden values, 0.013 to 0.018
#: over many tokens and up to 0.022 of a single one (H200). Rows stored in another way are 0.023 or
#: more over many tokens, which only the kernel's own tests tell apart.
MAX_FLIP_ERROR = 3e-2


def layer_bound(recipe: Precision) -> float:
    """The largest relative error of the layer that is rounding."""
    return MAX_FLIP_ERROR if recipe.hidden.has_scales else MAX_ERROR


def layer_of(plan: Plan, job: Job = ALONE) -> megamoe.MegaMoE:
    """The layer of a plan: all ranks of it in a process that is alone, else this rank's."""
    model = plan.case.model
    ranks = {"world": plan.case.num_ranks} if job.alone else {"group": dist.group.WORLD}
    return megamoe.MegaMoE(
        num_experts=model.num_experts,
        top_k=model.top_k,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        max_tokens_per_rank=plan.max_tokens,
        precision=plan.case.precision,
        device=str(plan.device),
        num_sms=plan.num_sms,
        kernel_dir=plan.kernel_dir,
        kernel_options=plan.kernel_options,
        num_shared_experts=model.num_shared_experts,
        **ranks,
    )


def config_of(moe: megamoe.MegaMoE) -> str:
    """The layer's configuration in one cell."""
    values = {**dataclasses.asdict(moe.kernel_config), "num_sms": moe.num_sms}
    return " ".join(f"{name}={value}" for name, value in values.items())


def columns_of(inputs: Sequence[Inputs]) -> list[list[torch.Tensor]]:
    """x, topk_idx and topk_weights, each of all ranks."""
    return [[getattr(i, f.name) for i in inputs] for f in dataclasses.fields(Inputs)]


def layer_call(
    moe: megamoe.MegaMoE, inputs: Sequence[Inputs]
) -> Callable[[], Sequence[torch.Tensor]]:
    """A forward that returns the output of every rank of this process. The layer takes and returns
    tensors of one rank, or lists.
    """
    columns = columns_of(inputs)
    if len(inputs) != 1:
        return partial(moe, *columns)
    arguments = [column[0] for column in columns]
    return lambda: [moe(*arguments)]


def outputs_of(moe: megamoe.MegaMoE, inputs: Sequence[Inputs]) -> Sequence[torch.Tensor]:
    """The layer's outputs of the ranks of this process."""
    return layer_call(moe, inputs)()
