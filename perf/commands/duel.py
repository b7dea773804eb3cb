"""The command `duel`: contenders in turns on one machine, and how far apart they are.

Two runs of one commit can differ by 9 % where power holds the clocks down; the ratio of two
contenders that take turns, batch by batch, does not. `pairing` says who goes when and what the
interval means, `teams` which processes run them. A batch is a rest, a warm-up and repetitions, as
in `sweep`; where those asked for take less than BATCH_MS there are up to ten times as many, so that
power and energy are known.

Outputs are not compared with the oracle, which `sweep` does, but some rows of each with those of
the first contender: one that must agree, because it has the same recipe, and does not is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from megamoe.progress import Progress
from megamoe.reference import relative_error
from perf.arguments import check_no_results, check_writable, checked, integer, option
from perf.recording.columns import DuelRow
from perf.recording.environment import environment, version_of
from perf.recording.files import ResultsFile
from perf.running.jobs import place_of
from perf.running.layer import layer_bound
from perf.running.listing import title_of
from perf.running.messages import Batch, Orders
from perf.running.nvml import Load
from perf.running.options import DEFAULTS, csv_option, list_configs_option, precision_option
from perf.running.options import Options as Launched
from perf.running.pairing import Ratio, fought, ratio_of
from perf.running.plan import case_of, kernels_of
from perf.running.teams import Entry, TeamFailed, entry_of, started, teams_of
from perf.workload.cases import Case

SUMMARY = "time contenders in turns: kernels, recipes, or other versions of the sources"
EPILOG = (
    "A contender is [TREE:][KERNEL_DIR][@RECIPE]: sources (these, unless told otherwise), kernels "
    "compiled ahead of time from them, and a recipe (else that of --precision). Those with the "
    "same sources and kernels share processes. Exit status: 1 if a contender fails, or differs "
    "from a first of the same recipe."
)

#: Milliseconds that a batch should last.
BATCH_MS = 250


@dataclass(frozen=True)
class Options(Launched):
    contenders: Sequence[Entry] = option(
        "[TREE:][KERNEL_DIR][@RECIPE], two or more",
        "contenders",
        default=(),
        type=checked(entry_of),
        nargs="+",
        metavar="CONTENDER",
    )
    precision: tuple[str, ...] = precision_option("fp8_block")
    gpus: int = option(
        "a process and a rank on each of N GPUs", default=1, type=integer(1), metavar="N"
    )
    rounds: int = option(
        "batches of every contender and token count", default=10, type=integer(1, 1000), metavar="N"
    )
    reps: int | None = option("timed calls of a batch", type=integer(1, 10_000), metavar="N")
    csv: str | None = csv_option("append a row per contender and token count")
    list_configs: Path | None = list_configs_option()
    verify: bool = False


@dataclass(frozen=True)
class Outcome:
    """One contender at one token count. differs: from the first; infinite if it is no number."""

    entry: Entry
    case: Case
    us: float
    ratio: Ratio
    load: Load
    differs: float
    max_error: float  # infinite where the recipe is another

    @property
    def problem(self) -> str:
        """Why the contender failed, in a line; empty if it did not."""
        if self.differs <= self.max_error and self.differs < float("inf"):
            return ""
        return f"{self.entry.text} is wrong at {self.case.tokens} tokens: {self.differs:.2e}"


def mean_of(loads: Sequence[Load]) -> Load:
    """Over the batches that know it."""
    columns = [
        [value for value in column if value is not None]
        for column in zip(*map(dataclasses.astuple, loads), strict=True)
    ]
    return Load(*(fmean(column) if column else None for column in columns))


def outcomes_of(
    entries: Sequence[Entry], cases: Sequence[Case], batches: Sequence[Sequence[Batch]], rows
) -> list[Outcome]:
    """At one token count, from the batches and the output rows of every contender."""
    us = [[batch.us_median for batch in mine] for mine in batches]
    found = []
    for number, (entry, case) in enumerate(zip(entries, cases, strict=True)):
        ours, first = (torch.from_numpy(rows[i]) for i in (number, 0))
        alike = case.precision == cases[0].precision
        found.append(
            Outcome(
                entry=entry,
                case=case,
                us=median(us[number]),
                ratio=ratio_of(us[number], us[0]),
                load=mean_of([batch.load for batch in batches[number]]),
                differs=float(relative_error(ours, first)),
                max_error=layer_bound(case.recipe) if alike else float("inf"),
            )
        )
    return found


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


#: Heading, width and text of every printed column, of a contender's letter and its outcome.
COLUMNS: tuple[tuple[str, int, Callable[[str, Outcome], str]], ...] = (
    ("tokens/rank", 11, lambda letter, o: f"{o.case.tokens}"),
    ("contender", 9, lambda letter, o: letter),
    ("median us", 10, lambda letter, o: f"{o.us:,.1f}"),
    ("ratio", 6, lambda letter, o: f"{o.ratio.value:.4f}"),
    ("interval", 16, lambda letter, o: f"{o.ratio.low:.4f}..{o.ratio.high:.4f}"),
    ("is", 6, lambda letter, o: o.ratio.verdict),
    ("SM MHz", 6, lambda letter, o: f"{o.load.sm_mhz:.0f}" if o.load.sm_mhz else "-"),
    ("W", 5, lambda letter, o: _number(o.load.power_w)),
    ("mJ/launch", 9, lambda letter, o: _number(o.load.energy_mj, 1)),
    ("differs", 8, lambda letter, o: f"{o.differs:.1e}"),
)


def letter_of(number: int) -> str:
    return chr(ord("A") + number)


def table(outcomes: Sequence[Sequence[Outcome]]) -> str:
    """A line per contender of every token count."""
    lines = ["  ".join(title.rjust(width) for title, width, _ in COLUMNS)]
    for together in outcomes:
        for number, one in enumerate(together):
            cells = (text(letter_of(number), one).rjust(width) for _, width, text in COLUMNS)
            lines.append("  ".join(cells))
    return "\n".join(lines)


def row_of(outcome: Outcome, first: Entry, where: dict, rounds: int, mode: str) -> DuelRow:
    commit, dirty = version_of(outcome.entry.tree)
    return DuelRow(
        **where | {"commit": commit, "dirty": dirty},
        **outcome.case.columns,
        mode=mode,
        contender=outcome.entry.text,
        against=first.text,
        rounds=rounds,
        us_median=outcome.us,
        ratio=outcome.ratio.value,
        ratio_low=outcome.ratio.low,
        ratio_high=outcome.ratio.high,
        differs=outcome.differs,
        **outcome.load.columns,
    )


def check(options: Options) -> None:
    """ValueError unless the duel can be held here."""
    if place_of(os.environ):
        raise ValueError("a duel starts its processes itself: use --gpus, not torchrun")
    if len(options.contenders) < 2:
        raise ValueError("a duel needs two contenders or more, separated by blanks")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device == "cuda" and options.gpus > here:
        raise ValueError(f"--gpus {options.gpus}: torch sees {here} CUDA device(s)")
    if options.device == "cpu" and options.gpus > 1:
        raise ValueError("--gpus needs --device cuda; on a CPU one process holds all ranks")


def cases_of(options: Options) -> tuple[list[Case], tuple[int, ...], int]:
    """(case of every contender, token counts, capacity per rank)."""
    if len(options.precision) > 1:
        raise ValueError("--precision: name one, and others as CONTENDER@RECIPE")
    found = [
        case_of(options, options.gpus, entry.precision or options.precision[0])
        for entry in options.contenders
    ]
    _, tokens, max_tokens = found[0]
    return [case for case, _, _ in found], tokens, max_tokens


def write_configs(options: Options, path: Path, cases: Sequence[Case]) -> int:
    """The kernels of every recipe, for `python -m megamoe.compile --list`; 0."""
    check_no_results("--list-configs", path)
    check_writable("--list-configs", path)
    recipes = tuple(dict.fromkeys(case.precision for case in cases))
    asked = dataclasses.replace(options, precision=recipes)
    path.write_text(json.dumps(kernels_of(asked, options.gpus)))
    return 0


def orders_of(
    options: Options, cases: Sequence[Case], tokens: tuple[int, ...], max_tokens: int
) -> list[Orders]:
    """What every team makes ready."""
    default = DEFAULTS[options.device]
    whole = Orders(
        cases=(),
        tokens=tokens,
        max_tokens=max_tokens,
        device=options.device,
        mode=default.mode,
        reps=options.reps or default.reps,
        warmup=default.warmup,
        batch_us=BATCH_MS * 1e3 if options.device == "cuda" else 0,
        num_sms=options.num_sms,
    )
    orders = []
    for members in teams_of(options.contenders):
        kernels = options.contenders[members[0]].kernel_dir
        orders.append(
            dataclasses.replace(
                whole,
                cases=tuple(cases[member] for member in members),
                kernel_dir=None if kernels is None else str(kernels),
            )
        )
    return orders


def hold(options: Options) -> list[list[Outcome]]:
    """The outcomes of every token count; TeamFailed if a contender fails."""
    entries = options.contenders
    cases, tokens, max_tokens = cases_of(options)
    members_of = teams_of(entries)
    seat = {member: (i, j) for i, of in enumerate(members_of) for j, member in enumerate(of)}
    progress = Progress(len(members_of) + options.rounds * len(tokens) * len(entries))
    with started(entries, options.gpus) as teams:
        outputs = []
        for team, orders in zip(teams, orders_of(options, cases, tokens, max_tokens), strict=True):
            progress.start(f"{team.name} gets ready")
            outputs.append(team.prepare(orders).outputs)

        def batch(number: int, contender: int) -> Batch:
            progress.start(f"{tokens[number]} tokens per rank, {letter_of(contender)}")
            team, member = seat[contender]
            return teams[team].batch(member, number)

        batches = fought(len(tokens), len(entries), options.rounds, batch)
    progress.clear()
    return [
        outcomes_of(
            entries,
            [case.with_tokens(count) for case in cases],
            batches[number],
            [outputs[seat[i][0]][seat[i][1]][number] for i in range(len(entries))],
        )
        for number, count in enumerate(tokens)
    ]


def with_kernels(options: Options) -> Options:
    """With --kernel-dir where a contender of these sources names no kernels."""
    if options.kernel_dir is None:
        return options
    kernels = Path(options.kernel_dir).resolve()
    entries = [
        dataclasses.replace(entry, kernel_dir=kernels)
        if entry.own and entry.kernel_dir is None
        else entry
        for entry in options.contenders
    ]
    return dataclasses.replace(options, contenders=entries)


def run(options: Options) -> int:
    """Hold the duel, print and keep the outcomes; 1 if a contender failed or is wrong."""
    cases, _, _ = cases_of(options)
    if options.list_configs:
        return write_configs(options, options.list_configs, cases)
    check(options)
    options = with_kernels(options)
    file = ResultsFile(options.csv, DuelRow) if options.csv else None
    where = environment(options.device)
    mode = DEFAULTS[options.device].mode
    machine = where["gpu"] if options.gpus == 1 else f"{options.gpus} x {where['gpu']}"
    print(f"{title_of(cases[0])}, {mode}, {options.rounds} round(s), {machine}")
    for number, (entry, case) in enumerate(zip(options.contenders, cases, strict=True)):
        commit, dirty = version_of(entry.tree)
        source = commit[:7] + ("-dirty" if dirty else "")
        print(f"{letter_of(number)}: {entry.text}, {case.precision}, commit {source}", flush=True)
    try:
        outcomes = hold(options)
    except TeamFailed as error:
        print(error, file=sys.stderr)
        return 1
    flat = [one for together in outcomes for one in together]
    if file:
        for one in flat:
            file.append(row_of(one, options.contenders[0], where, options.rounds, mode))
    print(table(outcomes))
    problems = [one.problem for one in flat if one.problem]
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0
