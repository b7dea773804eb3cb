"""The command `zeroing`: what two habits of other implementations would cost here.

- `megamoe+full_zeroing`: before every launch all of a rank's workspace is set to zero, local and
  symmetric regions alike, but for the barrier header, whose epochs must survive. The layer itself
  resets only what must be zero, inside the launch. With several processes a peer may signal as soon
  as its own launch begins, so all ranks meet between the zeroing and the launch; that meeting is
  timed too, because whoever zeroes needs it.
- `megamoe+separate_sum`: after every launch the combine slots are added once more by torch: cast to
  float32, sum over the top-k, cast back. The layer adds them inside the launch, which this variant
  still does, so its excess is what separate operations take, not a saving net of the fused sum.

Both variants are checked against the oracle. Ratios are to the layer as it is, on the same inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

import torch

import megamoe
from perf.running import plan
from perf.running.measure import (
    Contender,
    Point,
    Runner,
    layer_bound,
    medians_of,
    outputs_of,
)
from perf.running.process_runner import ProcessRunner
from perf.running.session import run_table
from perf.workload.cases import Inputs
from perf.workload.parts import MEGAMOE
from perf.workload.routings import may_mask
from workspace.layout import LOCAL, SYMMETRIC
from workspace.views import Workspace

SUMMARY = "time full-workspace zeroing and a separate sum of the slots against the fused layer"
EPILOG = (
    "Rows are called megamoe, megamoe+full_zeroing and megamoe+separate_sum. Exit status: as sweep."
)

FULL_ZEROING, SEPARATE_SUM = f"{MEGAMOE}+full_zeroing", f"{MEGAMOE}+separate_sum"
#: Tokens per rank unless asked otherwise.
TOKENS = {"cpu": [4, 16], "cuda": [4096, 8192, 16384, 32768]}


def zeroed_spans(workspace: Workspace) -> list[torch.Tensor]:
    """uint8 views of everything but the barrier header, of every rank of this process."""
    _, header_end = workspace.layout.header_span
    spaces = [workspace.allocation.spaces[rank] for rank in workspace.local_ranks]
    return [span for s in spaces for span in (s[LOCAL], s[SYMMETRIC][header_end:])]


def sum_of_slots(slots_TKH: torch.Tensor) -> torch.Tensor:
    """[T, H] in the slots' dtype by three operations: cast, sum, cast."""
    return slots_TKH.float().sum(dim=1).to(slots_TKH.dtype)


def contenders_of(
    moe: megamoe.MegaMoE, mode: str, meet: Callable[[], object] = lambda: None
) -> list[Contender]:
    """The layer with each of the two habits; `meet` lets all ranks of a job begin together."""
    workspace = moe.workspace
    spans, bound = zeroed_spans(workspace), layer_bound(moe.config.recipe)
    num_bytes = sum(span.nbytes for span in spans) // len(workspace.local_ranks)

    def zeroing(inputs: Sequence[Inputs]) -> Callable[[], list[torch.Tensor]]:
        def call() -> list[torch.Tensor]:
            for span in spans:
                span.zero_()
            meet()
            return outputs_of(moe, inputs)

        return call

    def summing(inputs: Sequence[Inputs]) -> Callable[[], list[torch.Tensor]]:
        slots = [
            workspace.regions(rank)["combine_output"][: i.x.shape[0]]
            for rank, i in zip(workspace.local_ranks, inputs, strict=True)
        ]

        def call() -> list[torch.Tensor]:
            outputs_of(moe, inputs)
            return [sum_of_slots(slots_TKH) for slots_TKH in slots]

        return call

    return [
        Contender(FULL_ZEROING, zeroing, mode, bound, f"zeroed_bytes={num_bytes}", moe.synchronize),
        Contender(SEPARATE_SUM, summing, mode, bound, check=moe.synchronize),
    ]


class ZeroingRunner(Runner):
    """Every rank of the job in this process."""

    def make_contenders(self) -> list[Contender]:
        return contenders_of(self.moe, self.plan.mode)


class ZeroingProcessRunner(ProcessRunner):
    """One rank of a job."""

    def make_contenders(self) -> list[Contender]:
        return contenders_of(self.moe, self.plan.mode, self.job.align)


def ratios(points: Iterable[Point]) -> list[tuple[str, int, float, float, float]]:
    """(precision, tokens, us of the layer, zeroing / layer, sum / layer) of finished points."""
    return [
        (*key, layer, zeroing / layer, summing / layer)
        for key, (layer, zeroing, summing) in medians_of(
            points, (MEGAMOE, FULL_ZEROING, SEPARATE_SUM)
        )
    ]


def table(points: Iterable[Point]) -> str:
    lines = [f"{'precision':>10}  {'tokens/rank':>11}  {'megamoe us':>12}  {'full zeroing':>12}  "
             f"{'separate sum':>12}"]  # fmt: skip
    lines += [
        f"{precision:>10}  {tokens:>11}  {us:>12,.1f}  {zeroing:>11.2f}x  {summing:>11.2f}x"
        for precision, tokens, us, zeroing, summing in ratios(points)
    ]
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    tokens = "; ".join(f"{','.join(map(str, TOKENS[name]))} on {name}" for name in TOKENS)
    plan.add_options(parser, beside=False, tokens=tokens)


def run(args: argparse.Namespace) -> int:
    """Measure, print ratios; the exit status of `sweep`. ValueError for a routing that masks slots:
    a masked slot holds what an earlier launch left there, which a plain sum would add.
    """
    if may_mask(args.routing):
        raise ValueError(
            f"--routing {args.routing} masks slots, which a plain sum cannot leave out"
        )
    args.tokens = args.tokens or TOKENS[args.device]
    title = "time as a multiple of the layer's:"
    return run_table(args, ZeroingRunner, ZeroingProcessRunner, title, table)
