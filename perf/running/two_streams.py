"""What engines do with shared experts today: a layer of the routed ones and one of the shared ones,
on two streams of each GPU, and then a sum.

A GPU's SMs are split between the two, because a launch holds its SMs until it ends and all CTAs of
the routed layer must be there together. Virtual ranks of a GPU have one layer of shared experts,
which takes their tokens one rank after the other.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence

import torch

from megamoe import reference
from megamoe.streams import Streams
from perf.running.contenders import Contender
from perf.running.jobs import ALONE, Job
from perf.running.layer import layer_bound, layer_call, layer_of
from perf.running.options import LEAST_SMS
from perf.running.plan import Plan
from perf.workload.cases import Inputs
from perf.workload.parts import TWO_STREAMS
from perf.workload.shared import halves_of, with_shared_slots
from perf.workload.stored import chosen_weights


def split_sms(
    total: int, ranks: int, top_k: int, shared: int, asked: int | None = None
) -> tuple[int, int]:
    """(SMs of every rank's routed experts, SMs of the shared ones) of a GPU with `ranks` ranks:
    as asked, else by the slots of a token; ValueError if nothing is left for the routed ones.
    """
    own = asked or max(LEAST_SMS, round(total * shared / (top_k + shared)))
    per_rank = (total - own) // ranks
    if per_rank < 1:
        raise ValueError(
            f"{own} SMs for shared experts (--shared-sms) leave none of {total} for each of "
            f"{ranks} rank(s)"
        )
    return per_rank, own


def plans_for(plan: Plan) -> tuple[Plan, Plan]:
    """(plan of the routed experts, plan of the shared ones); on a CPU, which has no SMs, as many
    CTAs as the layer's. ValueError if the SMs cannot be split.
    """
    cases, model = halves_of(plan.case), plan.case.model
    sms: tuple[int | None, int | None] = plan.num_sms, plan.shared_sms
    if not plan.emulated:
        ranks = plan.case.ranks_per_gpu
        there = torch.cuda.get_device_properties(plan.device).multi_processor_count
        total = plan.num_sms * ranks if plan.num_sms else there
        sms = split_sms(total, ranks, model.top_k, model.num_shared_experts, plan.shared_sms)
    routed, shared = (
        dataclasses.replace(plan, case=case, num_sms=n) for case, n in zip(cases, sms, strict=True)
    )
    return routed, shared


class TwoStreams:
    """Both layers of a plan, over the weights of `experts`, which this process holds. Collective,
    as a layer is.
    """

    def __init__(self, plan: Plan, job: Job, weights: reference.Weights, experts: Sequence[int]):
        self.case, model = plan.case, plan.case.model
        routed, shared = plans_for(plan)
        self.routed, self.shared = layer_of(routed, job), layer_of(shared, ALONE)
        chosen = [expert for expert in experts if expert < model.num_experts]
        self.routed.load_weights(*chosen_weights(weights, experts, chosen))
        self.shared.load_weights(*chosen_weights(weights, experts, model.shared_experts))
        self.streams = None
        if not plan.emulated:
            self.streams = Streams(self.routed.device, 2)
            weakref.finalize(self, self.streams.close).atexit = False

    def prepare(self, inputs: Sequence[Inputs]) -> Callable[[], Sequence[torch.Tensor]]:
        """As `Contender.prepare`. The shared experts' rows go to buffers that are made here."""
        own = with_shared_slots(self.case, inputs)
        buffers = [torch.empty_like(i.x) for i in inputs]
        of_routed = layer_call(self.routed, inputs)

        def of_shared() -> Sequence[torch.Tensor]:
            for i, buffer in zip(own, buffers, strict=True):
                self.shared(i.x, i.topk_idx, i.topk_weights, out=buffer)
            return buffers

        def call() -> Sequence[torch.Tensor]:
            ys, rows = self.side_by_side(of_routed, of_shared)
            return [y.add_(row) for y, row in zip(ys, rows, strict=True)]

        return call

    def side_by_side(
        self, *calls: Callable[[], Sequence[torch.Tensor]]
    ) -> list[Sequence[torch.Tensor]]:
        """What each call returns, each made on a stream of its own, behind and before what the
        current stream holds; on a CPU one after the other.
        """
        if self.streams is None:
            return [call() for call in calls]
        current = torch.cuda.current_stream(self.routed.device)
        found = [calls[number]() for number, _ in self.streams.fork(current)]
        self.streams.join(current)
        return found

    def synchronize(self) -> None:
        """Raise what a launch of either layer reported."""
        self.routed.synchronize()
        self.shared.synchronize()

    @property
    def config(self) -> str:
        return f"routed_sms={self.routed.num_sms} shared_sms={self.shared.num_sms}"


def stream_contenders(
    plan: Plan, job: Job, weights: reference.Weights, experts: Sequence[int]
) -> list[Contender]:
    """The two layers of a plan with shared experts, if somebody asked."""
    if not plan.two_streams:
        return []
    layers = TwoStreams(plan, job, weights, experts)
    return [
        Contender(
            TWO_STREAMS,
            layers.prepare,
            plan.mode,
            layer_bound(plan.case.recipe),
            layers.config,
            layers.synchronize,
        )
    ]
