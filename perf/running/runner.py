"""Running a plan: the layer and its contenders on the same inputs, checked against the oracle.

The output that is checked is that of the last timed call, so a wrong result cannot hide behind a
fast time; a contender is checked before it is timed too, because a wrong one is nothing to compare
with. A process is alone and holds every rank, or holds one rank of a job; then a repetition's time
is the largest of the ranks, which begin it together, and all ranks yield equal points.
Neighbours: `plan` says what to run, `timing` how to time it, `session` prints the points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from perf.against.roofline import Work, counts_of, work_of_counts
from perf.running.contenders import (
    Contender,
    baseline_contenders,
    layer_contender,
    staging_contenders,
)
from perf.running.expected import Expected, expected_of
from perf.running.jobs import ALONE, Job
from perf.running.layer import layer_of
from perf.running.plan import Plan
from perf.running.points import Point
from perf.running.timing import Times, flush_of
from perf.running.together import measure_together
from perf.running.two_streams import stream_contenders
from perf.workload.cases import Case, Inputs, make_rank_inputs
from perf.workload.stored import make_layer_weights


class Runner:
    """Weights, the layer and its contenders, made once; `points(tokens)` measures them. Making one
    and its methods are collective.
    """

    def __init__(self, plan: Plan, job: Job = ALONE):
        self.plan, self.job = plan, job
        case = plan.case
        self.ranks = range(case.num_ranks) if job.alone else [job.rank]
        self.experts = case.experts_of(self.ranks)
        self.weights = make_layer_weights(case, plan.device, self.experts)
        self.moe = layer_of(plan, job)
        self.moe.load_weights(*self.weights)
        self.flush = flush_of(plan.l2, plan.device)
        self.layer = layer_contender(self.moe, plan.mode)
        self.contenders = self.make_contenders()

    def make_contenders(self) -> list[Contender]:
        """What is measured beside the layer, here its staging and the baselines."""
        return [
            *staging_contenders(self.plan, self.moe),
            *stream_contenders(self.plan, self.job, self.weights, self.experts),
            *baseline_contenders(self.plan, self.job, self.weights, self.experts),
        ]

    def inputs_of(self, case: Case) -> list[Inputs]:
        """Of the ranks of this process."""
        return [make_rank_inputs(case, rank, self.plan.device) for rank in self.ranks]

    def expected_of(self, inputs: Sequence[Inputs]) -> Expected | None:
        """The oracle's answer; None if nobody asked."""
        if not self.plan.verify:
            return None
        return expected_of(self.job, inputs, self.weights, self.plan.case)

    def points(self, tokens: int) -> Iterator[Point]:
        """The layer, then its contenders: same inputs and repetitions."""
        plan, case = self.plan, self.plan.case.with_tokens(tokens)
        inputs = self.inputs_of(case)
        work = self._work(case, inputs)
        expected = self.expected_of(inputs)
        for contender in (self.layer, *self.contenders):
            ours, known = contender is self.layer, None if contender.part else expected
            whole = None if contender.part or plan.emulated else work
            call = contender.prepare(inputs)
            if known and not ours:
                contender.refuse(known.error(call()), tokens)
            times, outputs = self._measure(call, contender.mode, contender.check)
            yield Point(
                case=case,
                mode=plan.label(contender.mode),
                impl=contender.impl,
                times=times,
                work=whole,
                roofline=plan.roofline_of(work) if whole else None,
                error=known.error(outputs) if known else None,
                config=contender.config,
                max_error=contender.max_error,
                **(self._held() if ours else {}),
            )

    def _held(self) -> dict[str, Any]:
        """What a point says of the layer alone."""
        return {
            "nvlink_bytes": self.moe.nvlink_bytes if self.plan.emulated else None,
            "reset_bytes": self.moe.workspace.reset_bytes,
            "workspace_bytes": self.moe.workspace.total_bytes,
        }

    def _work(self, case: Case, inputs: Sequence[Inputs]) -> Work:
        """The work of every GPU, from the routings of all ranks."""
        counts_LE = torch.stack([counts_of(case, i.topk_idx) for i in inputs])
        counts_WE = self.job.gather(counts_LE.to(self.plan.device)).cpu()
        return work_of_counts(case, counts_WE, [case.tokens] * case.num_ranks)

    def _measure(
        self, call: Callable[[], Sequence[torch.Tensor]], mode: str, check: Callable[[], object]
    ) -> tuple[Times, Sequence[torch.Tensor]]:
        plan = self.plan
        return measure_together(
            self.job, call, plan.device, mode, plan.reps, plan.warmup, check, flush=self.flush
        )
