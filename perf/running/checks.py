"""Whether this machine has what plans need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megamoe import compile, dsl
from megamoe.arguments import kernel_config_of
from perf.running.plan import Plan
from perf.running.two_streams import plans_for


def _beside(plan: Plan) -> Sequence[Plan]:
    """Plans of the layers that are measured beside that of the plan; ValueError if its GPU has no
    SMs for them.
    """
    return plans_for(plan) if plan.two_streams else ()


def _check_gpu(plan: Plan) -> None:
    """ValueError unless the GPU has the SMs and the memory."""
    gpu = torch.cuda.get_device_properties(plan.device)
    case, sms = plan.case, gpu.multi_processor_count
    if (plan.num_sms or 0) * case.ranks_per_gpu > sms:
        raise ValueError(
            f"--num-sms {plan.num_sms} x {case.ranks_per_gpu} rank(s) is more "
            f"than the {sms} SMs of {gpu.name}"
        )
    workspaces = 2 if _beside(plan) else 1
    needed = case.ranks_per_gpu * (workspaces * plan.workspace_bytes + plan.weight_bytes)
    if needed > gpu.total_memory:
        raise ValueError(
            f"{case.model.name} in {case.precision} needs at least {needed / 2**30:.0f} GiB on "
            f"a GPU, {gpu.name} has {gpu.total_memory / 2**30:.0f}; try fewer --num-experts"
        )


def check_here(plans: Sequence[Plan]) -> None:
    """ValueError unless this machine holds what `plans` need: on a GPU, memory for weights and
    workspace, SMs, and kernels where none can be built.
    """
    for plan in plans:
        if not plan.emulated:
            _check_gpu(plan)
    for plan in [one for whole in plans for one in (whole, *_beside(whole))]:
        case = plan.case
        if not dsl.HAVE_DSL:
            config = case.config(plan.max_tokens)
            kernel = kernel_config_of(config, plan.kernel_options, plan.device)
            file = compile.kernel_name(config, kernel, cpu=plan.emulated) + ".so"
            places = [Path(place) for place in (plan.kernel_dir, compile.cache_dir()) if place]
            if not any((directory / file).exists() for directory in places):
                special = f" with {plan.kernel_options}" if plan.kernel_options else ""
                where = f"--kernel-dir {plan.kernel_dir}" if plan.kernel_dir else f"{places[0]}"
                raise ValueError(
                    f"{where} has no {file} for {config}{special}, and without nvidia-cutlass-dsl "
                    "it cannot be built here; build it with python -m megamoe.compile and pass "
                    "--kernel-dir"
                )
