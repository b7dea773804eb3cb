"""Running a plan: the layer and its baseline on the same inputs, checked against the oracle.

The output that is checked is that of the last timed call, so a wrong result cannot hide behind a
fast time. `Runner` holds every rank of the job; `process_runner` has one for a process per rank.
Neighbours: `plan` says what to run, `timing` how to time it, `sweep` prints the points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import megamoe
from megamoe import reference
from perf.baselines import BASELINES
from perf.cases import Case, Inputs, make_inputs, make_layer_weights, make_weights
from perf.plan import Plan
from perf.results import Row
from perf.roofline import Roofline, Work, roofline_of, work_of
from perf.timing import Times, measure

MEGAMOE = "megamoe"
#: A relative error above this is no rounding: the sweep says so and exits with status 1. In FP8
#: codes of hidden values flip, about 0.01 in all; storing them in another way is 0.023 or more.
MAX_ERROR = 2e-2


class WrongResult(RuntimeError):
    """A baseline is wrong, so there is nothing to compare with."""


@dataclass(frozen=True)
class Point:
    """What one implementation did at one token count; None is what was not measured."""

    case: Case
    mode: str
    impl: str
    times: Times
    work: Work
    roofline: Roofline | None  # None where the time is no GPU's
    error: float | None
    nvlink_bytes: int | None = None  # counted by the emulator
    reset_bytes: int | None = None
    workspace_bytes: int | None = None
    config: str = ""

    def row(self, where: dict[str, object]) -> Row:
        """The result row of this point, measured at `where` (`results.environment`)."""
        case, us = self.case, self.times.us_median
        optional = {
            "reset_bytes": self.reset_bytes,
            "workspace_bytes": self.workspace_bytes,
            "error_rel": self.error,
        }
        if self.roofline:
            optional |= {
                "tflops": self.work.tflops(us),
                "roofline_us": self.roofline.us,
                "roofline_bound": self.roofline.bound,
                "roofline_share": self.roofline.share(us),
            }
        return Row(
            **where,
            num_ranks=case.num_ranks,
            ranks_per_gpu=case.ranks_per_gpu,
            model=case.model.name,
            hidden=case.model.hidden,
            intermediate=case.model.intermediate,
            num_experts=case.model.num_experts,
            top_k=case.model.top_k,
            tokens=case.tokens,
            precision=case.precision,
            routing=case.routing,
            mode=self.mode,
            impl=self.impl,
            us_min=self.times.us_min,
            us_median=us,
            us_p95=self.times.us_p95,
            **{name: value for name, value in optional.items() if value is not None},
            config=self.config,
        )


def oracle(
    inputs: Sequence[Inputs], weights: reference.Weights, precision: str
) -> list[torch.Tensor]:
    """The expected output of every rank, with true float32 products on the inputs' device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return [
        reference.moe_forward(i.x, i.topk_idx, i.topk_weights, *weights, precision=precision)
        for i in inputs
    ]


def largest_error(
    outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor] | None
) -> float | None:
    """The largest relative error of a rank; None without an expected output."""
    if expected is None:
        return None
    pairs = zip(outputs, expected, strict=True)
    return max(reference.relative_error(out, want) for out, want in pairs)


def layer_facts(moe: megamoe.MegaMoE) -> dict[str, object]:
    """What a point says of the layer itself: memory, and its configuration in one cell."""
    values = {**dataclasses.asdict(moe.kernel_config), "num_sms": moe.num_sms}
    return {
        "impl": MEGAMOE,
        "reset_bytes": moe.workspace.reset_bytes,
        "workspace_bytes": moe.workspace.total_bytes,
        "config": " ".join(f"{name}={value}" for name, value in values.items()),
    }


def layer_of(plan: Plan, **ranks) -> megamoe.MegaMoE:
    """The layer of a plan; `ranks` is `world` or `group`."""
    model = plan.case.model
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
        **ranks,
    )


class Runner:
    """Weights, the layer and the baseline of a plan, made once; `points(tokens)` measures them."""

    def __init__(self, plan: Plan):
        self.plan = plan
        case = plan.case
        self.weights = make_layer_weights(case, plan.device)
        self.moe = layer_of(plan, world=case.num_ranks)
        self.moe.load_weights(*self.weights)
        self.baseline = None
        if plan.baseline:
            masked = case.routing == "masked"
            weights = self.weights[:2]
            if case.config(1).recipe.scaled:
                weights = make_weights(case, plan.device)
            self.baseline = BASELINES[plan.baseline](*weights, masked=masked)

    def points(self, tokens: int) -> Iterator[Point]:
        """The layer, then the baseline: same inputs, mode and repetitions."""
        plan, case = self.plan, self.plan.case.with_tokens(tokens)
        inputs = make_inputs(case, plan.device)
        work = work_of(case, [i.topk_idx for i in inputs])
        roofline = None if plan.emulated else roofline_of(work)
        point = partial(Point, case=case, mode=plan.mode, work=work, roofline=roofline)
        expected = oracle(inputs, self.weights, case.precision) if plan.verify else None
        columns = [[getattr(i, f.name) for i in inputs] for f in dataclasses.fields(Inputs)]
        single = case.num_ranks == 1

        arguments = [column[0] for column in columns] if single else columns
        times, output = self._measure(lambda: self.moe(*arguments), self.moe.synchronize)
        yield point(
            times=times,
            error=largest_error([output] if single else output, expected),
            nvlink_bytes=self.moe.nvlink_bytes,
            **layer_facts(self.moe),
        )
        if self.baseline is None:
            return
        joined = [torch.cat(column) for column in columns]
        times, output = self._measure(lambda: self.baseline(*joined), lambda: None)
        error = largest_error(output.split(tokens), expected)
        yield point(impl=plan.baseline, times=times, error=error)

    def _measure(
        self, call: Callable[[], object], check: Callable[[], object]
    ) -> tuple[Times, object]:
        plan = self.plan
        return measure(call, plan.device, plan.mode, plan.reps, plan.warmup, check)
