"""The command `router`: `megamoe.route` against the same router made of torch operations.

A graph holds CALLS routers, one behind the other; a time is that of a replay divided by their
number. So it is what a router adds to a graph of a model, without the start of the graph, and with
what programmatic dependent launches save between two of the kernel's. Logits are in the L2 cache,
as behind the product that makes them.

Implementations: the kernel; torch's operations, captured as they are; and compiled by
`torch.compile`, which a machine without a C compiler leaves out. Every one is compared with
`router_reference` in float64: a token counts as wrong if its experts differ and the choice was
decided by more than rounding.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megamoe
from megamoe import router_reference
from perf.against.routers import torch_route
from perf.arguments import (
    check_no_results,
    check_writable,
    integer,
    names,
    option,
    path_name,
    token_counts,
)
from perf.recording.columns import IDENTIFIES, POSITIVE, Environment, column
from perf.recording.environment import environment
from perf.recording.files import ResultsFile
from perf.running.options import csv_option, list_configs_option
from perf.running.timing import GRAPH, measure
from perf.workload.parts import MEGAMOE
from perf.workload.routers import ROUTERS, RouterCase, RouterInputs, inputs_of

SUMMARY = "time the router kernel against torch operations, eager and compiled (needs a GPU)"
EPILOG = (
    "Without the DSL kernels are built ahead of time: --list-configs FILE, python -m "
    "megamoe.compile --list FILE --out DIR, then --kernel-dir DIR. Exit status: 1 if experts or "
    "weights of the kernel are wrong."
)

#: Routers in a graph.
CALLS = 10
TORCH, COMPILED = "torch", "torch-compiled"
#: Scores, in float32, that are nearer than this may be taken for equal.
NEAR = 2e-6
#: Relative, of weights.
MAX_ERROR = 1e-5
Routed = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class RouterRow(Environment):
    """One implementation of one router at one number of tokens; times are of one router.

    wrong: tokens with other experts than the definition has. error_rel: largest relative error of a
    weight of the others.
    """

    model: str = column(IDENTIFIES)
    num_experts: int = column(IDENTIFIES)
    top_k: int = column(IDENTIFIES)
    score: str = column(IDENTIFIES)
    num_groups: int = column(IDENTIFIES)
    topk_groups: int = column(IDENTIFIES)
    logits: str = column(IDENTIFIES)
    tokens: int = column(IDENTIFIES)
    mode: str = column(IDENTIFIES)
    impl: str = column(IDENTIFIES)
    us_min: float = column(POSITIVE)
    us_median: float = column(POSITIVE)
    us_p95: float = column(POSITIVE)
    wrong: int
    error_rel: float


@dataclass(frozen=True)
class Options:
    model: tuple[str, ...] = option(
        f"one or several of {', '.join(ROUTERS)}",
        default=tuple(ROUTERS),
        type=names(ROUTERS),
        metavar="LIST",
    )
    tokens: Sequence[int] = option(
        "1,8,64 or 1:4096 (doubling) (default: 1:8192)", type=token_counts, metavar="LIST"
    )
    reps: int = option("timed replays", default=30, type=integer(1, 10_000), metavar="N")
    kernel_dir: str | None = option("kernels compiled ahead of time", type=path_name, metavar="DIR")
    csv: str | None = csv_option("append a row per measurement")
    list_configs: Path | None = list_configs_option()


def implementations(
    case: RouterCase, inputs: RouterInputs, kernel_dir: str | None
) -> Iterator[tuple[str, Callable[[], Routed]]]:
    """(name, call) of each."""
    config, factor = case.config, case.factor

    def kernel() -> Routed:
        return megamoe.route(
            inputs.logits, config.top_k, score=config.score, num_groups=config.num_groups,
            topk_groups=config.topk_groups, correction_bias=inputs.correction_bias,
            routed_scaling_factor=factor, kernel_dir=kernel_dir,
        )  # fmt: skip

    yield MEGAMOE, kernel
    operations = functools.partial(torch_route, config, factor=factor)
    yield TORCH, lambda: operations(inputs.logits, inputs.correction_bias)
    torch._dynamo.reset()  # a function per shape
    compiled = torch.compile(operations, dynamic=False)
    yield COMPILED, lambda: compiled(inputs.logits, inputs.correction_bias)


def check(case: RouterCase, inputs: RouterInputs, got: Routed) -> tuple[int, float]:
    """(tokens with wrong experts, largest relative error of a weight of the others)."""
    idx, weights = router_reference.route(
        case.config, inputs.logits, correction_bias=inputs.correction_bias,
        routed_scaling_factor=case.factor, compute=torch.float64,
    )  # fmt: skip
    mine, theirs = (part[0].long().sort(dim=1) for part in (got, (idx, weights)))
    same = (mine.values == theirs.values).all(dim=1)
    pairs = got[1].double().gather(1, mine.indices), weights.gather(1, theirs.indices)
    errors = ((pairs[0] - pairs[1]).abs() / pairs[1])[same]
    wrong = ~same & decided(case, inputs)
    return int(wrong.sum()), errors.max().item() if errors.numel() else 0.0


def decided(case: RouterCase, inputs: RouterInputs) -> Tensor:
    """bool [T]: tokens of which neither a group nor an expert is chosen by less than NEAR."""
    config = case.config
    choice = router_reference.scores_of(config, inputs.logits.double()) + inputs.correction_bias
    clear = torch.ones(len(choice), dtype=torch.bool, device=choice.device)

    def margin(values: Tensor, count: int) -> Tensor:
        best = values.sort(dim=1, descending=True).values
        return best[:, count - 1] - best[:, count]

    if config.num_groups > 1:
        pairs = choice.unflatten(1, (config.num_groups, -1)).topk(2, dim=2).values.sum(dim=2)
        clear &= margin(pairs, config.topk_groups) > NEAR
        kept = router_reference.kept_groups(choice, config.num_groups, config.topk_groups)
        kept = kept.repeat_interleave(config.group_size, dim=1)
        choice = choice.masked_fill(~kept, float("-inf"))
    return clear & (margin(choice, config.top_k) > NEAR)


def repeated(call: Callable[[], Routed]) -> Callable[[], Routed]:
    def calls() -> Routed:
        for _ in range(CALLS):
            routed = call()
        return routed

    return calls


def measured(options: Options, device: torch.device) -> Iterator[RouterRow]:
    """Rows as they are measured. An implementation that this machine cannot run is named on stderr
    and left out.
    """
    where: dict[str, Any] = environment(device)
    for name in options.model:
        case = ROUTERS[name]
        facts = asdict(case.config)
        for unused in ("softmax_over", "renormalize", "correction_bias", "hashed"):
            facts.pop(unused)
        for tokens in options.tokens or token_counts("1:8192"):
            inputs = inputs_of(case, tokens, device)
            for impl, call in implementations(case, inputs, options.kernel_dir):
                try:
                    call()
                    times, routed = measure(repeated(call), device, GRAPH, options.reps)
                except RuntimeError as error:
                    if impl != COMPILED:
                        raise
                    print(f"{impl} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                assert isinstance(routed, tuple)
                wrong, error_rel = check(case, inputs, routed)
                us: dict[str, Any] = {part: value / CALLS for part, value in _times(times).items()}
                yield RouterRow(
                    **where, model=name, **facts, tokens=tokens, mode=GRAPH, impl=impl, **us,
                    wrong=wrong, error_rel=error_rel,
                )  # fmt: skip


def _times(times) -> dict[str, float]:
    return {name: getattr(times, name) for name in ("us_min", "us_median", "us_p95")}


def is_wrong(row: RouterRow) -> bool:
    return row.impl == MEGAMOE and (row.wrong > 0 or not row.error_rel <= MAX_ERROR)


def line_of(row: RouterRow) -> str:
    return (
        f"{row.model:>6}  {row.tokens:>6}  {row.impl:>14}  {row.us_min:>8.2f}  "
        f"{row.us_median:>8.2f}  {row.us_p95:>8.2f}  {row.wrong:>5}  {row.error_rel:.1e}"
    )


HEADING = (
    f"{'model':>6}  {'tokens':>6}  {'impl':>14}  {'us min':>8}  {'median':>8}  {'p95':>8}  "
    f"{'wrong':>5}  error"
)


def run(options: Options) -> int:
    """Measure, print and store; 1 if the kernel is wrong. ValueError without a GPU."""
    if options.list_configs:
        check_no_results("--list-configs", options.list_configs)
        check_writable("--list-configs", options.list_configs)
        entries = [{"router": asdict(ROUTERS[name].config)} for name in options.model]
        options.list_configs.write_text(json.dumps(entries))
        return 0
    if not torch.cuda.is_available():
        raise ValueError("a router is timed on a GPU, and torch sees none")
    file = ResultsFile(options.csv, RouterRow) if options.csv else None
    print(HEADING)
    found = 0
    for row in measured(options, torch.device("cuda", torch.cuda.current_device())):
        if file:
            file.append(row)
        print(line_of(row), flush=True)
        found |= is_wrong(row)
    return int(found)
