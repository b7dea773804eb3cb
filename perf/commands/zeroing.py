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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

import megamoe
from perf.running.contenders import Contender, layer_contender
from perf.running.layer import outputs_of
from perf.running.options import TimedOptions
from perf.running.points import Point, medians_of
from perf.running.runner import Runner
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
    spans = zeroed_spans(workspace)
    num_bytes = sum(span.nbytes for span in spans) // len(workspace.local_ranks)

    def zeroing(inputs: Sequence[Inputs]) -> Callable[[], Sequence[torch.Tensor]]:
        def call() -> Sequence[torch.Tensor]:
            for span in spans:
                span.zero_()
            meet()
            return outputs_of(moe, inputs)

        return call

    def summing(inputs: Sequence[Inputs]) -> Callable[[], Sequence[torch.Tensor]]:
        slots = [
            workspace.regions(rank)["combine_output"][: i.x.shape[0]]
            for rank, i in zip(workspace.local_ranks, inputs, strict=True)
        ]

        def call() -> Sequence[torch.Tensor]:
            outputs_of(moe, inputs)
            return [sum_of_slots(slots_TKH) for slots_TKH in slots]

        return call

    layer = layer_contender(moe, mode)
    config = f"zeroed_bytes={num_bytes}"
    return [
        replace(layer, impl=FULL_ZEROING, prepare=zeroing, config=config),
        replace(layer, impl=SEPARATE_SUM, prepare=summing, config=""),
    ]


class ZeroingRunner(Runner):
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


@dataclass(frozen=True)
class Options(TimedOptions):
    default_tokens = {"cpu": (4, 16), "cuda": (4096, 8192, 16384, 32768)}


def run(options: Options) -> int:
    """Measure, print ratios; the exit status of `sweep`. ValueError for a routing that masks slots:
    a masked slot holds what an earlier launch left there, which a plain sum would add.
    """
    if may_mask(options.routing):
        raise ValueError(
            f"--routing {options.routing} masks slots, which a plain sum cannot leave out"
        )
    title = "time as a multiple of the layer's:"
    return run_table(options, ZeroingRunner, title, table)
