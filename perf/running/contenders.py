"""What is measured on the same inputs: the layer, baselines, and parts of the layer's work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import hypot, inf
from typing import Any

import torch

import megamoe
from megamoe import reference
from perf.against.baselines import BASELINES, PROCESS_BASELINES, Baseline
from perf.against.experts import MAX_FP8_ERROR
from perf.running.jobs import Job
from perf.running.layer import columns_of, config_of, layer_bound, layer_call
from perf.running.plan import Plan
from perf.running.timing import EAGER
from perf.workload.cases import Case, Inputs, make_weights
from perf.workload.parts import MEGAMOE, STAGING
from perf.workload.routings import may_mask
from perf.workload.shared import with_all_slots, with_shared_slots
from perf.workload.stored import chosen_weights, expanded_weights

#: Takes the inputs of the ranks of this process and returns the call that is timed.
Prepare = Callable[[Sequence[Inputs]], Callable[[], Sequence[torch.Tensor]]]


class WrongResult(RuntimeError):
    """A contender is wrong, so there is nothing to compare with."""


@dataclass(frozen=True)
class Contender:
    """One implementation.

    prepare: takes the inputs of the ranks of this process and returns the call that is timed; a
    call returns [T, H] of each of these ranks. mode: of `timing`. max_error: relative, against the
    oracle. config: what a result row says of it. check: waits for the device and raises what a
    launch reported. part: it does part of the layer's work, so that there is neither an output to
    check nor a roofline.
    """

    impl: str
    prepare: Prepare
    mode: str
    max_error: float
    config: str = ""
    check: Callable[[], object] = lambda: None
    part: bool = False

    def refuse(self, error: float, tokens: int) -> None:
        """WrongResult if an output with this error is no rounding."""
        if not error <= self.max_error:
            raise WrongResult(f"{self.impl} is wrong at {tokens} tokens: error {error:.2e}")


def layer_contender(moe: megamoe.MegaMoE, mode: str, **changes) -> Contender:
    """A layer as it is; `changes` to what is said of it."""
    facts: dict[str, Any] = {"impl": MEGAMOE, "max_error": layer_bound(moe.config.recipe)} | changes
    call, config = partial(layer_call, moe), config_of(moe)
    return Contender(prepare=call, mode=mode, config=config, check=moe.synchronize, **facts)


def one_batch(
    layer: Callable[..., torch.Tensor],
) -> Prepare:
    """`Contender.prepare` of a layer of one rank, which gets the tokens of all as one batch."""

    def prepare(inputs: Sequence[Inputs]) -> Callable[[], Sequence[torch.Tensor]]:
        tokens = [i.x.shape[0] for i in inputs]
        batch = [torch.cat(c) if len(c) > 1 else c[0] for c in columns_of(inputs)]
        return lambda: layer(*batch).split(tokens)

    return prepare


def baseline_of(job: Job, name: str, w13: torch.Tensor, w2: torch.Tensor, **arguments):
    """A baseline for the ranks of this process."""
    if job.alone:
        return BASELINES[name](w13, w2, **arguments)
    return PROCESS_BASELINES[name](w13, w2, num_ranks=job.size, **arguments)


def baseline_contenders(
    plan: Plan, job: Job, weights: reference.Weights, experts: Sequence[int]
) -> list[Contender]:
    """The plan's baselines over the experts of this process; where it is alone the tokens of all
    ranks become one batch, and shared experts are some more that all tokens name; else a layer of
    the shared ones adds its rows afterwards. They take the layer's quantised weights if they say
    so, else bf16 weights: the layer's if it has such, those that its 4-bit weights stand for (what
    engines do that have no kernel for them), else the same drawn once more. Where the oracle itself
    rounds operands to FP8, its error comes on top of the baseline's, independent of it.
    """
    if not plan.baselines:
        return []
    table: Mapping[str, type[Baseline]] = BASELINES if job.alone else PROCESS_BASELINES
    masked, scaled = may_mask(plan.case.routing), plan.case.recipe.weights.has_scales
    case, shared, matrices = plan.case, plan.case.model.shared_experts, weights[:2]
    if scaled and not all(table[name].quantised for name in plan.baselines):
        if plan.case.recipe.weights.packed:
            matrices = expanded_weights(weights)
        else:
            matrices = make_weights(plan.case, plan.device, experts)

    def contender(name: str) -> Contender:
        quantised = table[name].quantised
        source = weights if quantised else reference.Weights(*matrices)
        routed = [expert for expert in experts if expert not in shared]
        chosen = chosen_weights(source, experts, case.model.experts if job.alone else routed)
        scales = chosen[2:] if quantised else ()
        layer = baseline_of(job, name, *chosen[:2], masked=masked, scales=scales)
        prepare = one_batch(layer)
        if shared and job.alone:
            prepare = partial(_widened, case, prepare)
        elif shared:
            own = chosen_weights(source, experts, shared)
            beside = one_batch(BASELINES[name](*own[:2], masked=False))
            prepare = partial(_added, case, prepare, beside)
        mode = plan.mode if layer.capturable else EAGER
        own_rounding = scaled and not quantised
        bound = hypot(layer.max_error, MAX_FP8_ERROR if own_rounding else 0.0)
        return Contender(name, prepare, mode, bound, layer.config)

    return [contender(name) for name in plan.baselines]


def _widened(
    case: Case, layer: Prepare, inputs: Sequence[Inputs]
) -> Callable[[], Sequence[torch.Tensor]]:
    """`Contender.prepare` of a layer to which shared experts are some more routed ones."""
    return layer(with_all_slots(case, inputs))


def _added(
    case: Case, routed: Prepare, shared: Prepare, inputs: Sequence[Inputs]
) -> Callable[[], Sequence[torch.Tensor]]:
    """`Contender.prepare` of a layer of routed experts and one of shared ones."""
    calls = routed(inputs), shared(with_shared_slots(case, inputs))
    return lambda: [torch.add(*rows) for rows in zip(*(call() for call in calls), strict=True)]


def staging_contenders(plan: Plan, moe: megamoe.MegaMoE) -> list[Contender]:
    """The copy that a forward of the plan makes before its launch, if it makes one and somebody
    asked. Virtual ranks copy one after the other here, side by side in a forward.
    """
    if not (plan.staging and plan.stages):
        return []

    def prepare(inputs: Sequence[Inputs]) -> Callable[[], Sequence[torch.Tensor]]:
        pairs = [
            (moe.input_buffer(rank)[: i.x.shape[0]], i.x)
            for rank, i in zip(moe.local_ranks, inputs, strict=True)
        ]
        return lambda: [buffer.copy_(x) for buffer, x in pairs]

    return [Contender(STAGING, prepare, plan.mode, inf, part=True)]
