"""The command `ablation`: the parts of one launch alone, GEMMs, dispatch and combine, beside all.

Each part is a kernel of its own (`KernelConfig.only`) with a workspace of its own, timed on the
same inputs as the layer. Its FC1 rows, or the slots that it adds, are random numbers that were put
there before; zeros would cost less power. What the sum of the parts exceeds the layer by is what
overlap saves, with two reservations. Each part counts its tokens, stages or quantises them and
passes both barriers, which the sum therefore holds three times. And no part holds the stores of FC2
into the slots of other ranks: GEMMs alone store no row of FC2.

Only the layer's own output is checked; that of a part means nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

import megamoe
from megamoe import reference
from megamoe.config import COMBINE, GEMMS
from perf.running.checks import check_here
from perf.running.contenders import Contender, layer_contender
from perf.running.jobs import place_of
from perf.running.layer import layer_of
from perf.running.options import DEFAULTS, TimedOptions, list_configs_option
from perf.running.plan import Plan, plans_of, write_configs
from perf.running.points import Point, medians_of
from perf.running.runner import Runner
from perf.running.session import run_table
from perf.workload.parts import ABLATION_KERNELS, MEGAMOE, PARTS, part_name

SUMMARY = "time GEMMs, dispatch and combine of a launch alone, beside the whole (needs a GPU)"
EPILOG = (
    "Rows are called megamoe, megamoe-gemms, megamoe-dispatch and megamoe-combine. Without the DSL "
    "kernels are built ahead of time: --list-configs FILE, python -m megamoe.compile --list FILE "
    "--out DIR, then --kernel-dir DIR. Exit status: as sweep."
)


def plan_for(whole: Plan, part: str) -> Plan:
    """The plan of a layer that does this part alone."""
    return dataclasses.replace(whole, kernel_options=whole.kernel_options | {"only": part})


def fill_pool(moe: megamoe.MegaMoE) -> None:
    """Random rows, of the dtype that tokens travel in, in the pools of this process."""
    recipe = moe.config.recipe
    for rank in moe.local_ranks:
        regions = moe.workspace.regions(rank)
        pool = regions["l1_token_buffer"]
        blocks = pool.view(-1, moe.kernel_config.block_m, pool.shape[1])
        for number, rows in enumerate(blocks):
            values = torch.randn(rows.shape, device=rows.device)
            if recipe.tokens.has_scales:
                values, scales = reference.quantize(values, recipe.tokens.scale_columns)
                regions["l1_scale_buffer"][number].copy_(scales.T)
            rows.copy_(values)


def fill_slots(moe: megamoe.MegaMoE) -> None:
    """Random rows in the combine slots of this process."""
    for rank in moe.local_ranks:
        for rows in moe.workspace.regions(rank)["combine_output"]:
            rows.copy_(torch.randn(rows.shape, device=rows.device))


#: What must lie in the workspace before a part runs.
FILL = {GEMMS: fill_pool, COMBINE: fill_slots}


class AblationRunner(Runner):
    def make_contenders(self) -> list[Contender]:
        """Every part, with the weights of the layer; what it works on is put there now."""
        return [self.part(part) for part in PARTS]

    def part(self, part: str) -> Contender:
        moe = layer_of(plan_for(self.plan, part), self.job)
        moe.load_weights(*self.weights)
        FILL.get(part, lambda moe: None)(moe)
        facts = {"impl": part_name(part), "max_error": inf, "part": True}
        return layer_contender(moe, self.plan.mode, **facts)


def table(points: Iterable[Point]) -> str:
    """Microseconds of all and of every part at the token counts where all have finished."""
    impls = [MEGAMOE, *map(part_name, PARTS)]
    heads = [("precision", 10), ("tokens/rank", 11), ("all", 10)]
    heads += [(part, 10) for part in PARTS] + [("sum - all", 10)]
    lines = ["  ".join(title.rjust(width) for title, width in heads)]
    for (precision, tokens), us in medians_of(points, impls):
        saved = sum(us[1:]) - us[0]
        cells = [precision, str(tokens), *(f"{time:,.1f}" for time in (*us, saved))]
        columns = zip(cells, heads, strict=True)
        lines.append("  ".join(cell.rjust(width) for cell, (_, width) in columns))
    return "\n".join(lines)


@dataclass(frozen=True)
class Options(TimedOptions):
    default_tokens = dict.fromkeys(DEFAULTS, (128, 2048, 8192))
    list_configs: Path | None = list_configs_option()


def check_memory_and_kernels(plans: Sequence[Plan]) -> None:
    """ValueError unless this machine holds a workspace for all and each part, and their kernels."""
    for whole in plans:
        total = len(ABLATION_KERNELS) * whole.workspace_bytes
        parts = [plan_for(whole, part) for part in PARTS]
        check_here([dataclasses.replace(one, workspace_bytes=total) for one in parts])


def run(options: Options) -> int:
    """Measure, print the table; the exit status of `sweep`. ValueError without a GPU."""
    if options.list_configs:
        return write_configs(options, ABLATION_KERNELS)
    if options.device == "cpu":
        raise ValueError("an ablation needs --device cuda: a CPU's times say nothing of its parts")
    check_memory_and_kernels(plans_of(options, place_of(os.environ)))
    title = "microseconds of all and of each part alone, and what overlap saves:"
    return run_table(options, AblationRunner, title, table)
