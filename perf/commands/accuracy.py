"""The command `accuracy`: how far the layer is from exact arithmetic, beside an unfused pipeline.

Exact is float64, one expert at a time, from either of two things:

- `stored`: the tokens and weights as the layer stores them, quantised, with their scales. What is
  left is what computing costs: sums, hidden rows in FP8, BF16 rows. The bounds (BOUNDS) are for
  this one.
- `original`: the BF16 tokens and weights before they were quantised. Three more roundings to FP8
  come on top, which no implementation of the precision can avoid. Printed, not judged.

The unfused pipeline is the baseline of the precision, over the very weights and scales of the
layer: tokens quantised; FC1, stored in BF16; SwiGLU; hidden rows quantised; FC2, rows stored in
BF16; weighted sum. On a GPU its products are torch's scaled ones, on a CPU float32 products of
dequantised operands; the layer is the kernel, on a CPU too. With `fp8_channel` it
stores hidden rows with one scale each, the finest that torch multiplies by output channels. 4-bit
weights it takes as e4m3: those of MXFP4 with a scale per 128 x 128 block, which holds nearly all of
them exactly, those of INT4 with their own scale per row and 128 columns.

Errors are over the tokens of all ranks together, at most SAMPLED of each rank, spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from megamoe import reference
from megamoe.precision import PRECISIONS, Precision, precision_of
from perf.against.baselines import baseline_name
from perf.arguments import integer, option
from perf.recording.columns import IDENTIFIES, Launched, column
from perf.running.contenders import Contender, baseline_of, one_batch
from perf.running.expected import spread_evenly
from perf.running.jobs import ALONE, Job
from perf.running.layer import columns_of as columns_of_inputs
from perf.running.layer import outputs_of
from perf.running.listing import Listing, title_of, titles
from perf.running.options import Options as AllOptions
from perf.running.options import csv_option, precision_option
from perf.running.plan import Plan
from perf.running.runner import Runner
from perf.running.session import run_plans
from perf.running.timing import EAGER
from perf.workload.cases import Case, Inputs, make_weights
from perf.workload.parts import MEGAMOE
from perf.workload.routings import may_mask
from perf.workload.stored import fp8_weights

SUMMARY = "the layer's error against exact arithmetic, beside that of an unfused pipeline"

#: Tokens per rank that are compared: float64 slots of Pro take 0.3 MB each.
SAMPLED = 1024
STORED, ORIGINAL = "stored", "original"


@dataclass(frozen=True)
class Bounds:
    """The most that the layer may be off against `stored`."""

    relative: float
    calc_diff: float
    ratio: float = 1.1  # to the error of the unfused pipeline


#: By how hidden rows are stored, which is most of it: FP8 costs 0.023, BF16 rounds by at most 2^-9,
#: three times in all.
BOUNDS = {"bfloat16": Bounds(4e-3, 8e-6), "float8_e4m3fn": Bounds(3.2e-2, 6e-4)}


def bounds_of(recipe: Precision) -> Bounds:
    return BOUNDS[recipe.hidden.storage]


EPILOG = (
    "Errors are printed against exact arithmetic on the tokens and weights as the layer stores "
    "them (stored), and as they were before they were quantised (original). Exit status: 1 if the "
    "layer's error against stored is above a bound ("
    + "; ".join(
        f"{name}: relative L2 {b.relative:g}, {b.ratio:g} times that of the unfused pipeline, "
        f"calc_diff {b.calc_diff:g}"
        for name, b in ((name, bounds_of(recipe)) for name, recipe in PRECISIONS.items())
    )
    + "), otherwise as sweep. With a process per GPU: torchrun --nproc-per-node N -m perf accuracy "
    "--device cuda ..."
)


def calc_diff(out: torch.Tensor, exact: torch.Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in float64, as DeepGEMM defines it; 0 when both are empty or
    zero, inf for NaN in `out`.
    """
    out, exact = out.double(), exact.double()
    if not torch.isfinite(out).all():
        return inf
    scale = (out * out + exact * exact).sum().item()
    return 1 - 2 * (out * exact).sum().item() / scale if scale else 0.0


def max_abs(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference in float64; 0 without any value, inf for NaN in `out`."""
    difference = (out.double() - exact.double()).abs().nan_to_num(nan=inf, posinf=inf)
    return difference.max().item() if difference.numel() else 0.0


@dataclass(frozen=True, kw_only=True)
class AccuracyRow(Launched):
    """Errors of one implementation against one exact answer, over the tokens of all ranks.

    seed, spread: of the inputs and weights. exact: STORED or ORIGINAL. ratio: of the layer's
    relative L2 error to the unfused pipeline's.
    """

    seed: int
    spread: int
    impl: str = column(IDENTIFIES)
    exact: str
    error_rel: float
    calc_diff: float
    max_abs: float
    ratio: float | None = None
    config: str = ""


@dataclass(frozen=True)
class Errors:
    """What a row says of an implementation; `unfused` is the pipeline's relative error, None in its
    own rows.
    """

    case: Case
    impl: str
    exact: str
    error_rel: float
    calc_diff: float
    max_abs: float
    unfused: float | None = None
    config: str = ""

    @property
    def ratio(self) -> float | None:
        if self.unfused is None:
            return None
        return self.error_rel / self.unfused if self.unfused else (inf if self.error_rel else 1.0)

    @property
    def problem(self) -> str:
        """The bounds that are exceeded, in a line; empty if none is."""
        if self.ratio is None or self.exact != STORED:
            return ""
        bounds = bounds_of(self.case.recipe)
        found = (
            ("relative L2", self.error_rel, bounds.relative),
            ("calc_diff", self.calc_diff, bounds.calc_diff),
            ("ratio to the unfused pipeline", self.ratio, bounds.ratio),
        )
        over = [f"{name} {value:.3g} > {most:g}" for name, value, most in found if value > most]
        place = f"{self.impl} at {self.case.tokens} tokens, {self.case.precision}"
        return f"{place}: {', '.join(over)}" if over else ""

    def row(self, where: dict[str, Any]) -> AccuracyRow:
        """The result row, measured at `where` (`environment`)."""
        names = ("impl", "exact", "error_rel", "calc_diff", "max_abs", "ratio", "config")
        found = {name: getattr(self, name) for name in names}
        case = self.case
        return AccuracyRow(**where, **case.columns, seed=case.seed, spread=case.spread, **found)


class AccuracyRunner(Runner):
    """`points` are `Errors` of the layer and of the unfused pipeline."""

    def make_contenders(self) -> list[Contender]:
        """The unfused pipeline, over the layer's own weights."""
        plan, case = self.plan, self.plan.case
        name = baseline_name(case.recipe)
        matrices: tuple = self.weights[:2]
        scales: tuple = self.weights[2:] if case.recipe.weights.has_scales else ()
        if case.recipe.weights.packed:
            matrices, scales = fp8_weights(self.weights)
        masked = may_mask(case.routing)
        layer = baseline_of(self.job, name, *matrices, masked=masked, scales=scales)
        emulated = plan.emulated and case.recipe.weights.has_scales
        config = f"{layer.config} products=float32" if emulated else layer.config
        return [Contender(name, one_batch(layer), EAGER, layer.max_error, config)]

    def points(self, tokens: int) -> Iterator[Errors]:  # type: ignore[override]
        case, device = self.plan.case.with_tokens(tokens), self.plan.device
        inputs, [pipeline] = self.inputs_of(case), self.contenders
        sample = spread_evenly(SAMPLED, tokens, device)

        def sampled(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            return self.job.gather(torch.cat([part[sample] for part in parts]))

        mine = sampled(outputs_of(self.moe, inputs))
        self.moe.synchronize()
        theirs = sampled(pipeline.prepare(inputs)())
        asked = Inputs(*map(sampled, columns_of_inputs(inputs)))

        def stored(expert: int) -> reference.Weights | None:
            held = self.experts
            return self.weights.of(held.index(expert)) if expert in held else None

        def original(expert: int) -> reference.Weights | None:
            if expert not in self.experts:
                return None
            drawn = make_weights(case, device, range(expert, expert + 1))
            return reference.Weights(*(matrix[0] for matrix in drawn))

        sources = {STORED: (stored, case.recipe)}
        if case.recipe.weights.has_scales:
            sources[ORIGINAL] = original, precision_of("bf16")
        for name, (weights_of, recipe) in sources.items():
            exact = exact_output(asked, weights_of, recipe, self.job)
            relative = reference.relative_error(theirs, exact)
            if name == STORED and not case.spread:  # wide scales may not fit spread magnitudes
                pipeline.refuse(relative, case.tokens)
            for contender, out, beside in ((self.layer, mine, relative), (pipeline, theirs, None)):
                yield Errors(
                    case=case,
                    impl=contender.impl,
                    exact=name,
                    error_rel=reference.relative_error(out, exact),
                    calc_diff=calc_diff(out, exact),
                    max_abs=max_abs(out, exact),
                    unfused=beside,
                    config=contender.config,
                )


def exact_output(
    tokens: Inputs,
    weights_of: Callable[[int], reference.Weights | None],
    recipe: Precision,
    job: Job = ALONE,
) -> torch.Tensor:
    """[T, H] float64 without any rounding behind the recipe's of the tokens; collective, each rank
    over the experts that `weights_of` gives it (`reference.slot_rows`).
    """
    rows = reference.input_rows(tokens.x, None, recipe)
    slots = reference.slot_rows(
        rows, tokens.topk_idx, tokens.topk_weights, weights_of, recipe, rounding=False
    )
    slots = job.sum_over_ranks(slots)
    return reference.combine(slots, tokens.topk_idx, slots.dtype)


def columns_of(plan: Plan, impls: Sequence[str]):
    """The printed columns: title, width and text."""
    return [
        ("tokens/rank", 11, lambda e: f"{e.case.tokens}"),
        ("impl", max(map(len, (MEGAMOE, *impls))), lambda e: e.impl),
        ("exact from", 10, lambda e: e.exact),
        ("relative L2", 11, lambda e: f"{e.error_rel:.3e}"),
        ("calc_diff", 9, lambda e: f"{e.calc_diff:.2e}"),
        ("max abs", 9, lambda e: f"{e.max_abs:.2e}"),
        ("x unfused", 9, lambda e: "" if e.ratio is None else f"{e.ratio:.3f}"),
    ]


def heading(plan: Plan, gpu: str, columns) -> str:
    """What is compared where, and the titles of the columns."""
    case = plan.case
    spread = f", magnitudes spread by 2^{case.spread}" if case.spread else ""
    ranks = "a process and a rank on each" if case.num_gpus > 1 else "which holds all ranks"
    lines = [
        f"{title_of(case)}, seed {case.seed}{spread}",
        "CPU emulation of every rank; unfused products in float32"
        if plan.emulated
        else f"{case.num_gpus} x {gpu}, {ranks}",
    ]
    return "\n".join([*lines, titles(columns)])


@dataclass(frozen=True)
class Options(AllOptions):
    default_tokens = {"cpu": (16,), "cuda": (512,)}
    precision: tuple[str, ...] = precision_option("fp8_block")
    verify: bool = True
    mode: str = EAGER
    reps: int = 1
    shared_experts: int = 0
    spread: int = option(
        "let blocks of 128 columns of tokens and hidden rows differ by up to 2^BITS in magnitude, "
        "which the weights make up for: 128-wide scales lose nothing, wider ones do from about 16",
        default=0,
        type=integer(0, 24),
        metavar="BITS",
    )
    csv: str | None = csv_option("append a row per line that is printed")


LISTING = Listing(AccuracyRow, columns_of, heading)


def run(options: Options) -> int:
    """Compute and print errors: 0, 1 if the layer is above a bound; otherwise as `sweep`."""
    return run_plans(options, AccuracyRunner, listing=LISTING)
