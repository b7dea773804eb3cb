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

import argparse
import dataclasses
import os
from collections.abc import Iterable, Sequence
from functools import partial
from math import inf

import torch
import torch.distributed as dist

import megamoe
from megamoe import reference
from megamoe.config import COMBINE, GEMMS
from perf.running import plan
from perf.running.measure import (
    Contender,
    Point,
    Runner,
    layer_facts,
    layer_of,
    medians_of,
    outputs_of,
)
from perf.running.plan import Plan
from perf.running.process_runner import ProcessRunner
from perf.running.processes import place_of
from perf.running.session import run_table
from perf.workload.parts import ABLATION_KERNELS, MEGAMOE, PARTS, part_name

SUMMARY = "time GEMMs, dispatch and combine of a launch alone, beside the whole (needs a GPU)"
EPILOG = (
    "Rows are called megamoe, megamoe-gemms, megamoe-dispatch and megamoe-combine. Without the DSL "
    "kernels are built ahead of time: --list-configs FILE, python -m megamoe.compile --list FILE "
    "--out DIR, then --kernel-dir DIR. Exit status: as sweep."
)

#: Tokens per rank unless asked otherwise.
TOKENS = [128, 2048, 8192]


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
            if recipe.scaled:
                values, scales = reference.quantize(values, recipe.token_block)
                regions["l1_sf_buffer"][number].copy_(scales.T)
            rows.copy_(values)


def fill_slots(moe: megamoe.MegaMoE) -> None:
    """Random rows in the combine slots of this process."""
    for rank in moe.local_ranks:
        for rows in moe.workspace.regions(rank)["combine_output"]:
            rows.copy_(torch.randn(rows.shape, device=rows.device))


#: What must lie in the workspace before a part runs.
FILL = {GEMMS: fill_pool, COMBINE: fill_slots}


def contender_of(moe: megamoe.MegaMoE, mode: str, part: str) -> Contender:
    """A layer that does `part` alone; what it works on is put there now."""
    FILL.get(part, lambda moe: None)(moe)
    return Contender(
        part_name(part),
        lambda inputs: partial(outputs_of, moe, inputs),
        mode,
        inf,
        layer_facts(moe)["config"],
        moe.synchronize,
        part=True,
    )


def contenders_of(runner: Runner | ProcessRunner, **ranks) -> list[Contender]:
    """Every part, with the weights of the runner's layer; `ranks` is `world` or `group`."""
    contenders = []
    for part in PARTS:
        moe = layer_of(plan_for(runner.plan, part), **ranks)
        moe.load_weights(*runner.weights)
        contenders.append(contender_of(moe, runner.plan.mode, part))
    return contenders


class AblationRunner(Runner):
    """Every rank of the job in this process."""

    def make_contenders(self) -> list[Contender]:
        return contenders_of(self, world=self.plan.case.num_ranks)


class AblationProcessRunner(ProcessRunner):
    """One rank of a job."""

    def make_contenders(self) -> list[Contender]:
        return contenders_of(self, group=dist.group.WORLD)


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


def add_options(parser: argparse.ArgumentParser) -> None:
    plan.add_options(parser, beside=False, tokens=",".join(map(str, TOKENS)))
    plan.add_list_configs(parser)


def check_memory_and_kernels(plans: Sequence[Plan]) -> None:
    """ValueError unless this machine holds a workspace for all and each part, and their kernels."""
    for whole in plans:
        total = len(ABLATION_KERNELS) * whole.workspace_bytes
        parts = [plan_for(whole, part) for part in PARTS]
        plan.check_here([dataclasses.replace(one, workspace_bytes=total) for one in parts])


def run(args: argparse.Namespace) -> int:
    """Measure, print the table; the exit status of `sweep`. ValueError without a GPU."""
    args.tokens = args.tokens or TOKENS
    if args.list_configs:
        return plan.list_configs(args, ABLATION_KERNELS)
    if args.device == "cpu":
        raise ValueError("an ablation needs --device cuda: a CPU's times say nothing of its parts")
    check_memory_and_kernels(plan.plans_of(args, place_of(os.environ)))
    title = "microseconds of all and of each part alone, and what overlap saves:"
    return run_table(args, AblationRunner, AblationProcessRunner, title, table)
