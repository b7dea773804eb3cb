"""Running a plan with one process per GPU: this rank's share, joined with the others' after timing.

A repetition's time is the largest of the ranks, which begin it together. The output of the last
repetition is checked on a sample of tokens (`perf.running.sample`). All ranks yield equal points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from perf.against.baselines import PROCESS_BASELINES
from perf.against.roofline import Work, counts_of, work_of_counts
from perf.running.measure import (
    Contender,
    Point,
    baseline_contenders,
    layer_arguments,
    layer_facts,
    layer_of,
    staging_contenders,
)
from perf.running.plan import Plan
from perf.running.processes import Job
from perf.running.sample import Sample, sample_of
from perf.running.timing import Times, flush_of, measure
from perf.workload.cases import Case, Inputs, make_layer_weights, make_rank_inputs


class ProcessRunner:
    """Like `Runner` for one rank of `job`; making one and `points` are collective."""

    def __init__(self, plan: Plan, job: Job):
        self.plan, self.job = plan, job
        case = plan.case
        first = job.rank * case.experts_per_rank
        self.experts = range(first, first + case.experts_per_rank)
        self.weights = make_layer_weights(case, plan.device, self.experts)
        self.moe = layer_of(plan, group=dist.group.WORLD)
        self.moe.load_weights(*self.weights)
        self.flush = flush_of(plan.l2, plan.device)
        self.contenders = self.make_contenders()

    def make_contenders(self) -> list[Contender]:
        """What is measured beside the layer, here its staging and the baselines (eager: their host
        reads counts).
        """
        table, ranks = PROCESS_BASELINES, self.job.size
        return [
            *staging_contenders(self.plan, self.moe),
            *baseline_contenders(self.plan, table, self.weights, self.experts, num_ranks=ranks),
        ]

    def points(self, tokens: int) -> Iterator[Point]:
        """The layer, then its contenders, on the same inputs."""
        plan, case = self.plan, self.plan.case.with_tokens(tokens)
        inputs = make_rank_inputs(case, self.job.rank, plan.device)
        work = self._work(case, inputs)
        point = partial(Point, case=case, work=work, roofline=plan.roofline_of(work))
        sample = None
        if plan.verify:
            sample = sample_of(self.job, inputs, self.weights, case.precision)

        call = partial(self.moe, *layer_arguments([inputs]))
        times, output = self._measure(call, plan.mode, self.moe.synchronize)
        error = self._error(sample, output)
        mode = plan.label(plan.mode)
        yield point(mode=mode, times=times, error=error, **layer_facts(self.moe))
        for contender in self.contenders:
            call = contender.prepare([inputs])
            wanted = None if contender.part else sample
            contender.refuse(self._error(wanted, call()[0]), tokens)
            times, outputs = self._measure(call, contender.mode, contender.check)
            yield point(
                mode=plan.label(contender.mode),
                times=times,
                error=self._error(wanted, outputs[0]),
                **contender.facts,
            )

    def _work(self, case: Case, inputs: Inputs) -> Work:
        """The work of every GPU, from the routings of all ranks."""
        counts_E = counts_of(case, inputs.topk_idx).to(self.job.device)
        counts_WE = self.job.gather(counts_E.unsqueeze(0)).cpu()
        return work_of_counts(case, counts_WE, [case.tokens] * case.num_ranks)

    def _error(self, sample: Sample | None, output: torch.Tensor) -> float | None:
        """The largest relative error of a rank; None without a sample."""
        if sample is None:
            return None
        return self.job.max_over_ranks([sample.error(output)])[0]

    def _measure(
        self, call: Callable[[], object], mode: str, check: Callable[[], object]
    ) -> tuple[Times, object]:
        plan, align = self.plan, self.job.align
        times, output = measure(
            call, plan.device, mode, plan.reps, plan.warmup, check, align=align, flush=self.flush
        )
        return Times(tuple(self.job.max_over_ranks(times.us))), output
