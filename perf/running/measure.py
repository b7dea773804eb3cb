"""Running a plan: the layer and its contenders on the same inputs, checked against the oracle.

The output that is checked is that of the last timed call, so a wrong result cannot hide behind a
fast time; a contender is checked before it is timed too, because a wrong one is nothing to compare
with. `Runner` holds every rank of the job; `process_runner` has one for a process per rank.
Neighbours: `plan` says what to run, `timing` how to time it, `sweep` prints the points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import hypot, inf

import torch

import megamoe
from megamoe import reference
from megamoe.precision import Precision
from perf.against.baselines import BASELINES
from perf.against.experts import MAX_ERROR, MAX_FP8_ERROR
from perf.against.roofline import Roofline, Work, work_of
from perf.recording.results import Row
from perf.running.plan import Plan
from perf.running.timing import EAGER, Times, flush_of, measure
from perf.workload.cases import Case, Inputs, make_inputs, make_layer_weights, make_weights
from perf.workload.parts import MEGAMOE, STAGING
from perf.workload.routings import may_mask

#: The layer's relative error against the oracle, which stores hidden rows in FP8 as the layer does.
#: Above this it is no rounding: sums in another order flip codes of hidden values, 0.013 to 0.018
#: over many tokens and up to 0.022 of a single one (H200). Rows stored in another way are 0.023 or
#: more over many tokens, which only the kernel's own tests tell apart.
MAX_FLIP_ERROR = 3e-2


class WrongResult(RuntimeError):
    """A contender is wrong, so there is nothing to compare with."""


def out_of_memory(error: Exception) -> bool:
    """Whether a GPU or the host has no memory left; for the host's torch has no class of error."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


@dataclass(frozen=True)
class Contender:
    """What is measured beside the layer.

    prepare: takes the inputs of the ranks of this process and returns the call that is timed; a
    call returns [T, H] of each of these ranks. mode: of `timing`. max_error: relative, against the
    oracle. config: what a result row says of it. check: waits for the device and raises what a
    launch reported. part: it does part of the layer's work, so that there is neither an output to
    check nor a roofline.
    """

    impl: str
    prepare: Callable[[Sequence[Inputs]], Callable[[], Sequence[torch.Tensor]]]
    mode: str
    max_error: float
    config: str = ""
    check: Callable[[], object] = lambda: None
    part: bool = False

    @property
    def facts(self) -> dict[str, object]:
        """What a point says of the contender itself."""
        facts = {"impl": self.impl, "config": self.config, "max_error": self.max_error}
        return facts | ({"roofline": None} if self.part else {})

    def refuse(self, error: float | None, tokens: int) -> None:
        """WrongResult if an output with this error is no rounding."""
        if error is not None and not error <= self.max_error:
            raise WrongResult(f"{self.impl} is wrong at {tokens} tokens: error {error:.2e}")


@dataclass(frozen=True)
class Point:
    """What one implementation did at one token count; None is what was not measured. `mode`: as
    `Plan.label` has it.
    """

    case: Case
    mode: str
    impl: str
    times: Times
    work: Work
    roofline: Roofline | None  # None where the time is no GPU's, or not of all of the work
    error: float | None
    nvlink_bytes: int | None = None  # counted on a CPU
    reset_bytes: int | None = None
    workspace_bytes: int | None = None
    config: str = ""
    max_error: float | None = None  # None: the layer's

    @property
    def wrong(self) -> bool:
        bound = layer_bound(self.case.recipe) if self.max_error is None else self.max_error
        return self.error is not None and not self.error <= bound

    @property
    def problem(self) -> str:
        """Why the measurement failed, in a line; empty if it did not."""
        if not self.wrong:
            return ""
        return f"{self.impl} is wrong at {self.case.tokens} tokens: error {self.error:.2e}"

    def row(self, where: dict[str, object]) -> Row:
        """The result row of this point, measured at `where` (`results.environment`)."""
        us = self.times.us_median
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
            **self.case.columns,
            mode=self.mode,
            impl=self.impl,
            us_min=self.times.us_min,
            us_median=us,
            us_p95=self.times.us_p95,
            **{name: value for name, value in optional.items() if value is not None},
            config=self.config,
        )


def medians_of(
    points: Iterable[Point], impls: Sequence[str]
) -> list[tuple[tuple[str, int], list[float]]]:
    """((precision, tokens), median us of each of `impls`) where all of them have finished."""
    us: dict[tuple[str, int], dict[str, float]] = {}
    for point in points:
        key = (point.case.precision, point.case.tokens)
        us.setdefault(key, {})[point.impl] = point.times.us_median
    return [
        (key, [by[impl] for impl in impls]) for key, by in us.items() if by.keys() >= set(impls)
    ]


def layer_bound(recipe: Precision) -> float:
    """The largest relative error of the layer that is rounding."""
    return MAX_FLIP_ERROR if recipe.scaled else MAX_ERROR


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
        kernel_options=plan.kernel_options,
        **ranks,
    )


def baseline_contenders(
    plan: Plan, table: dict, weights: reference.Weights, experts: range | None = None, **ranks
) -> list[Contender]:
    """The plan's baselines, made by the classes of `table`; for one rank, with these `experts`, or
    for all ranks of the job, whose tokens become one batch. They take the layer's quantised weights
    if they say so, else bf16 weights: the layer's if it has such, else the same drawn once more.
    Where the oracle itself rounds these to FP8, its error comes on top of the baseline's,
    independent of it.
    """
    if not plan.baselines:
        return []
    masked, scaled = may_mask(plan.case.routing), plan.case.recipe.scaled
    matrices = weights[:2]
    if scaled and not all(table[name].quantised for name in plan.baselines):
        matrices = make_weights(plan.case, plan.device, experts)

    def contender(name: str) -> Contender:
        kind = table[name]
        if kind.quantised:
            layer = kind(*weights[:2], **ranks, masked=masked, scales=weights[2:])
        else:
            layer = kind(*matrices, **ranks, masked=masked)
        mode = plan.mode if layer.capturable else EAGER
        own_rounding = scaled and not kind.quantised
        bound = hypot(layer.max_error, MAX_FP8_ERROR if own_rounding else 0.0)
        return Contender(name, one_batch(layer), mode, bound, layer.config)

    return [contender(name) for name in plan.baselines]


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


def one_batch(
    layer: Callable[..., torch.Tensor],
) -> Callable[[Sequence[Inputs]], Callable[[], Sequence[torch.Tensor]]]:
    """`Contender.prepare` of a layer of one rank, which gets the tokens of all as one batch."""

    def prepare(inputs: Sequence[Inputs]) -> Callable[[], Sequence[torch.Tensor]]:
        tokens = [i.x.shape[0] for i in inputs]
        columns = [[getattr(i, f.name) for i in inputs] for f in dataclasses.fields(Inputs)]
        batch = [torch.cat(c) if len(c) > 1 else c[0] for c in columns]
        return lambda: layer(*batch).split(tokens)

    return prepare


def layer_arguments(inputs: Sequence[Inputs]) -> list:
    """x, topk_idx and topk_weights as the layer takes them: tensors of one rank, else lists."""
    columns = [[getattr(i, f.name) for i in inputs] for f in dataclasses.fields(Inputs)]
    return [column[0] for column in columns] if len(inputs) == 1 else columns


def outputs_of(moe: megamoe.MegaMoE, inputs: Sequence[Inputs]) -> list[torch.Tensor]:
    """The layer's outputs of the ranks of this process."""
    output = moe(*layer_arguments(inputs))
    return [output] if len(inputs) == 1 else output


class Runner:
    """Weights, the layer and its contenders, made once; `points(tokens)` measures them."""

    def __init__(self, plan: Plan):
        self.plan = plan
        case = plan.case
        self.weights = make_layer_weights(case, plan.device)
        self.moe = layer_of(plan, world=case.num_ranks)
        self.moe.load_weights(*self.weights)
        self.flush = flush_of(plan.l2, plan.device)
        self.contenders = self.make_contenders()

    def make_contenders(self) -> list[Contender]:
        """What is measured beside the layer, here its staging and the baselines."""
        return [
            *staging_contenders(self.plan, self.moe),
            *baseline_contenders(self.plan, BASELINES, self.weights),
        ]

    def points(self, tokens: int) -> Iterator[Point]:
        """The layer, then its contenders: same inputs and repetitions."""
        plan, case = self.plan, self.plan.case.with_tokens(tokens)
        inputs = make_inputs(case, plan.device)
        work = work_of(case, [i.topk_idx for i in inputs])
        point = partial(Point, case=case, work=work, roofline=plan.roofline_of(work))
        expected = oracle(inputs, self.weights, case.precision) if plan.verify else None

        call = partial(self.moe, *layer_arguments(inputs))
        times, output = self._measure(call, plan.mode, self.moe.synchronize)
        yield point(
            mode=plan.label(plan.mode),
            times=times,
            error=largest_error([output] if len(inputs) == 1 else output, expected),
            nvlink_bytes=self.moe.nvlink_bytes,
            **layer_facts(self.moe),
        )
        for contender in self.contenders:
            call = contender.prepare(inputs)
            wanted = None if contender.part else expected
            if wanted is not None:
                contender.refuse(largest_error(call(), wanted), tokens)
            times, outputs = self._measure(call, contender.mode, contender.check)
            yield point(
                mode=plan.label(contender.mode),
                times=times,
                error=largest_error(outputs, wanted),
                **contender.facts,
            )

    def _measure(
        self, call: Callable[[], object], mode: str, check: Callable[[], object]
    ) -> tuple[Times, object]:
        plan = self.plan
        return measure(call, plan.device, mode, plan.reps, plan.warmup, check, flush=self.flush)
