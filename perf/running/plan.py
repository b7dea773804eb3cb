"""The options of a sweep, and the frozen plans that they become, one per precision.

A plan has every default filled in and is legal: `plans_of` looks at every configuration before any
of them runs, `check_here` at what this machine has for them.
Neighbours: `sweep` is the command, `measure` runs a plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megamoe import budget, compile, dsl
from megamoe.config import select
from megamoe.module import MegaMoE
from megamoe.precision import ITEM_BYTES, PRECISIONS
from perf.against import deepep
from perf.against.baselines import PROCESS_BASELINES
from perf.against.ceilings import ceilings_of
from perf.against.roofline import DEFAULTS as DEFAULT_CEILINGS
from perf.against.roofline import Ceilings, Roofline, Work, roofline_of
from perf.arguments import (
    MAX_TOKENS,
    check_no_results,
    check_writable,
    checked,
    integer,
    names,
    one_of,
    path_name,
    token_counts,
)
from perf.running.processes import Place
from perf.running.timing import COLD, EAGER, GRAPH, L2_STATES, WARM, mode_label
from perf.workload import routings
from perf.workload.cases import MODELS, Case, Model


@dataclass(frozen=True)
class DeviceDefaults:
    """Option values that follow the device."""

    model: str
    ranks: int
    tokens: tuple[int, ...]
    mode: str
    reps: int
    warmup: int


DEFAULTS = {
    "cpu": DeviceDefaults("emulated", ranks=8, tokens=(1, 4, 16, 64), mode=EAGER, reps=1, warmup=0),
    "cuda": DeviceDefaults(
        "v3", ranks=1, tokens=(1, 8, 64, 512, 4096), mode=GRAPH, reps=30, warmup=3
    ),
}


#: Name of a model whose sizes were given.
CUSTOM = "custom"
#: Options that replace a size of the model, by field.
SIZES = {
    "hidden": "--hidden-size",
    "intermediate": "--intermediate-size",
    "num_experts": "--num-experts",
    "top_k": "--top-k",
}


def _follows(name: str) -> str:
    """A default that follows the device, in words."""
    return ", ".join(f"{getattr(row, name)} on {device}" for device, row in DEFAULTS.items())


def _adder(parser: argparse.ArgumentParser) -> Callable:
    """`parser.add_argument` with a help text that ends in the default."""

    def add(*names: str, text: str, **kwargs) -> None:
        value = kwargs.get("default")
        value = ",".join(value) if isinstance(value, tuple) else value
        default = "" if value in (None, "", ()) else f" (default: {value})"
        parser.add_argument(*names, help=text + default, **kwargs)

    return add


def add_launch_options(
    parser: argparse.ArgumentParser,
    tokens: str | None = None,
    precision: str = "bf16",
    verify: bool = True,
) -> None:
    """The options that say what is launched; one without a value here follows the device
    (DEFAULTS). `tokens` describes the default of a command that has its own, `precision` is the
    default; without `verify` there is no such option.
    """

    def names_in(table) -> dict[str, object]:
        return {"type": one_of(table), "metavar": "NAME"}

    add = _adder(parser)
    ranks, count = integer(choices=(1, 2, 4, 8)), integer(1)
    add("--device", default="cpu", **names_in(DEFAULTS), text=", ".join(DEFAULTS))
    add(
        "--ranks",
        type=ranks,
        metavar="W",
        text=f"1, 2, 4 or 8; {_follows('ranks')}; under torchrun its number of processes",
    )
    add("--model", **names_in(MODELS), text=f"{', '.join(MODELS)}; {_follows('model')}")
    for letter, size in zip("HIEK", SIZES.values(), strict=True):
        what = size[2:].replace("-", " ").replace("num ", "number of ")
        add(size, type=count, metavar=letter, text=f"{what}, instead of the model's")
    add(
        "--experts-per-gpu",
        type=count,
        metavar="N",
        text="number of experts on each GPU, instead of the model's",
    )
    tokens = tokens or "; ".join(
        f"{','.join(map(str, row.tokens))} on {name}" for name, row in DEFAULTS.items()
    )
    add(
        "--tokens",
        type=token_counts,
        metavar="LIST",
        text=f"per rank: 1,8,64 or 1:4096 (doubling); by default {tokens}",
    )
    add(
        "--max-tokens",
        type=integer(1, MAX_TOKENS),
        metavar="T",
        text="capacity per rank, else the largest of --tokens",
    )
    routing = checked(routings.canonical)
    add("--routing", default="balanced", type=routing, metavar="NAME|FILE", text=routings.HELP)
    add(
        "--precision",
        default=(precision,),
        type=names(PRECISIONS),
        metavar="LIST",
        text=f"one or several of {', '.join(PRECISIONS)}",
    )
    add("--seed", type=integer(0, 2**31), default=0, metavar="N", text="of inputs and weights")
    add("--num-sms", type=count, metavar="N", text="SMs that the kernel may use")
    add("--kernel-dir", type=path_name, metavar="DIR", text="kernels compiled ahead of time")
    if verify:
        add(
            "--verify",
            action=argparse.BooleanOptionalAction,
            default=True,
            text="compare outputs with the oracle",
        )


def add_options(
    parser: argparse.ArgumentParser, beside: bool = True, tokens: str | None = None
) -> None:
    """The options of `sweep`: what is launched, and how it is timed. Without `beside` nothing can
    be asked for that is measured beside the layer.
    """
    add_launch_options(parser, tokens)
    add = _adder(parser)
    add("--graph", dest="mode", action="store_const", const=GRAPH, text="replay a CUDA graph")
    add("--eager", dest="mode", action="store_const", const=EAGER, text="call from the host")
    add(
        "--l2",
        default=WARM,
        type=one_of(L2_STATES),
        metavar="STATE",
        text="L2 cache before a timed call: warm, as the last call left it, or cold, overwritten",
    )
    add("--reps", type=integer(1, 100_000), metavar="N", text=f"timed calls: {_follows('reps')}")
    if beside:
        add(
            "--baseline",
            default=(),
            type=names(PROCESS_BASELINES),
            metavar="LIST",
            text=f"measure beside it one or several of {', '.join(PROCESS_BASELINES)} "
            f"(the last only under torchrun, in {deepep.PRECISION})",
        )
        add(
            "--staging",
            action="store_true",
            text="measure beside it the copy of tokens to where peers read them, which a forward "
            "makes before its launch (only in bf16 on several ranks)",
        )
    add(
        "--ceilings",
        type=path_name,
        metavar="PATH",
        text="rooflines from rows of `python -m perf ceilings`",
    )
    add("--csv", type=path_name, metavar="PATH", text="append a result row per measurement")


def add_list_configs(parser: argparse.ArgumentParser) -> None:
    """The option of `list_configs`."""
    parser.add_argument(
        "--list-configs",
        type=Path,
        metavar="PATH",
        help="write what `python -m megamoe.compile --list` needs for this command, and stop",
    )


@dataclass(frozen=True)
class Plan:
    """A sweep with every default filled in; `case` is its point of the first token count.
    `kernel_options`: fields of `KernelConfig` that differ from the choice for the configuration.
    """

    case: Case
    device: torch.device
    tokens: tuple[int, ...]
    max_tokens: int
    mode: str
    reps: int
    warmup: int
    num_sms: int | None
    kernel_dir: str | None
    baselines: tuple[str, ...]
    verify: bool
    workspace_bytes: int  # of one rank
    ceilings: Ceilings
    kernel_options: dict[str, object] = field(default_factory=dict)
    l2: str = WARM  # before every timed call
    staging: bool = False  # is measured too, where there is any

    def label(self, mode: str) -> str:
        """What stands in `mode` of the rows that this plan measures in a mode of `timing`."""
        return mode_label(mode, self.l2)

    @property
    def emulated(self) -> bool:
        return self.device.type == "cpu"

    @property
    def stages(self) -> bool:
        """Whether a forward copies its tokens before the launch: one that quantises them writes
        them to where peers read them itself, and a single rank has no peers.
        """
        return self.case.num_ranks > 1 and not self.case.recipe.scaled

    def roofline_of(self, work: Work) -> Roofline | None:
        """The bound of `work`; None where nothing runs on a GPU."""
        return None if self.emulated else roofline_of(work, self.ceilings, self.case.recipe.token)

    @property
    def weight_bytes(self) -> int:
        """Of one rank, kept once: scale factors and copies come on top."""
        model = self.case.model
        item = ITEM_BYTES[self.case.recipe.weight]
        return 3 * model.hidden * model.intermediate * self.case.experts_per_rank * item


def _model_of(args: argparse.Namespace, gpus: int) -> Model:
    """The model with the sizes asked for; "custom" once more than its number of experts differs."""
    model = MODELS[args.model or DEFAULTS[args.device].model]
    if args.num_experts and args.experts_per_gpu:
        raise ValueError("--num-experts and --experts-per-gpu exclude each other")
    sizes = {name: getattr(args, option[2:].replace("-", "_")) for name, option in SIZES.items()}
    sizes["num_experts"] = args.num_experts or (args.experts_per_gpu or 0) * gpus
    sizes = {name: size for name, size in sizes.items() if size}
    if any(size != getattr(model, name) for name, size in sizes.items() if name != "num_experts"):
        sizes["name"] = CUSTOM
    return dataclasses.replace(model, **sizes)


def case_of(
    args: argparse.Namespace, gpus: int = 1, precision: str | None = None
) -> tuple[Case, tuple[int, ...], int]:
    """(case of the first token count, token counts, capacity per rank), wherever it will run: all
    ranks on one GPU, or a process and a rank on each of several. Of the first precision unless told
    otherwise.
    """
    default = DEFAULTS[args.device]
    model = _model_of(args, gpus)
    tokens = tuple(args.tokens or default.tokens)
    max_tokens = args.max_tokens or max(tokens)
    if max(tokens) > max_tokens:
        raise ValueError(f"--tokens {max(tokens)} is more than --max-tokens {max_tokens}")
    if gpus > 1 and args.ranks not in (None, gpus):
        raise ValueError(f"--ranks {args.ranks}, but torchrun started {gpus} processes")
    ranks = gpus if gpus > 1 else args.ranks or default.ranks
    case = Case(
        model=model,
        num_ranks=ranks,
        tokens=tokens[0],
        ranks_per_gpu=ranks // gpus,
        routing=args.routing,
        precision=precision or args.precision[0],
        seed=args.seed,
        spread=getattr(args, "spread", 0),
    )
    config = case.config(max_tokens)
    budget.check(config, select(config))
    case.check_routing(max(tokens))
    return case, tokens, max_tokens


def kernels_of(
    args: argparse.Namespace, gpus: int = 1, kernels: Sequence[dict[str, object]] = ({},)
) -> list[dict]:
    """Entries for `python -m megamoe.compile --list`: a kernel per precision and options."""
    entries = []
    for precision in args.precision:
        case, _, max_tokens = case_of(args, gpus, precision)
        fields = dataclasses.asdict(case.config(max_tokens))
        entries += [fields | ({"kernel": options} if options else {}) for options in kernels]
    return entries


def list_configs(args: argparse.Namespace, kernels: Sequence[dict[str, object]]) -> int:
    """Write these entries to the file that was asked for; 0."""
    check_no_results("--list-configs", args.list_configs)
    check_writable("--list-configs", args.list_configs)
    args.list_configs.write_text(json.dumps(kernels_of(args, kernels=kernels)))
    return 0


def plan_of(
    args: argparse.Namespace, place: Place | None = None, precision: str | None = None
) -> Plan:
    """The plan that the options ask for, in the job of `place` if there is one; ValueError if it
    cannot run here. Of the first precision unless told otherwise.
    """
    default, device = DEFAULTS[args.device], torch.device(args.device)
    if place and args.device == "cpu":
        raise ValueError("torchrun needs --device cuda; on a CPU one process holds all ranks")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; use --device cpu")
    mode = args.mode or default.mode
    if args.device == "cpu" and mode == GRAPH:
        raise ValueError("--graph needs --device cuda; use --eager")
    l2 = getattr(args, "l2", WARM)
    if args.device == "cpu" and l2 == COLD:
        raise ValueError("--l2 cold needs --device cuda: a CPU's L2 is another")
    if place:
        if place.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {place.local_rank} of this machine has no GPU of its own: "
                f"torch sees {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", place.local_rank)
    case, tokens, max_tokens = case_of(args, place.size if place else 1, precision)
    kernel_options = getattr(args, "kernel_options", {})
    baselines = getattr(args, "baseline", ())
    if deepep.NAME in baselines:
        deepep.check_available(case.precision, place is not None, args.verify)
    return Plan(
        case=case,
        device=device,
        tokens=tokens,
        max_tokens=max_tokens,
        mode=mode,
        reps=args.reps or default.reps,
        warmup=default.warmup,
        num_sms=args.num_sms,
        kernel_dir=args.kernel_dir,
        baselines=baselines,
        verify=args.verify,
        workspace_bytes=_workspace_bytes(case, max_tokens, kernel_options),
        ceilings=_ceilings(args, device, case),
        kernel_options=kernel_options,
        l2=l2,
        staging=getattr(args, "staging", False),
    )


def _ceilings(args: argparse.Namespace, device: torch.device, case: Case) -> Ceilings:
    """Of the file asked for, else the defaults; ValueError if they do not cover the precision."""
    found = DEFAULT_CEILINGS
    if device.type == "cpu":
        if args.ceilings:
            raise ValueError("--ceilings needs --device cuda: a CPU has no roofline")
        return found
    if args.ceilings:
        found = ceilings_of(args.ceilings, torch.cuda.get_device_name(device), case.num_gpus)
    found.gemm(case.recipe.token)
    return found


def _workspace_bytes(case: Case, max_tokens: int, kernel_options: dict[str, object]) -> int:
    """Of one rank; ValueError if the layer cannot run this shape."""
    config = case.config(max_tokens)
    sizes = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    sizes |= {"world": sizes.pop("num_ranks"), "kernel_options": kernel_options}
    return MegaMoE.workspace_bytes(**sizes)["total"]


def plans_of(args: argparse.Namespace, place: Place | None = None) -> list[Plan]:
    """A plan for every precision; ValueError if any of them cannot run here."""
    return [plan_of(args, place, precision) for precision in args.precision]


def _check_gpu(plan: Plan) -> None:
    """ValueError unless the GPU has the SMs and the memory."""
    gpu = torch.cuda.get_device_properties(plan.device)
    case, sms = plan.case, gpu.multi_processor_count
    if (plan.num_sms or 0) * case.ranks_per_gpu > sms:
        raise ValueError(
            f"--num-sms {plan.num_sms} x {case.ranks_per_gpu} rank(s) is more "
            f"than the {sms} SMs of {gpu.name}"
        )
    needed = case.ranks_per_gpu * (plan.workspace_bytes + plan.weight_bytes)
    if needed > gpu.total_memory:
        raise ValueError(
            f"{case.model.name} in {case.precision} needs at least {needed / 2**30:.0f} GiB on "
            f"a GPU, {gpu.name} has {gpu.total_memory / 2**30:.0f}; try fewer --num-experts"
        )


def check_here(plans: Sequence[Plan]) -> None:
    """ValueError unless this machine holds what `plans` need: on a GPU, memory for weights and
    workspace, SMs, and kernels where none can be built.
    """
    for plan in plans:
        case = plan.case
        if not plan.emulated:
            _check_gpu(plan)
        if not dsl.HAVE_DSL:
            config = case.config(plan.max_tokens)
            kernel = select(config, **plan.kernel_options)
            file = compile.kernel_name(config, kernel, cpu=plan.emulated) + ".so"
            places = [Path(place) for place in (plan.kernel_dir, compile.cache_dir()) if place]
            if not any((directory / file).exists() for directory in places):
                special = f" with {plan.kernel_options}" if plan.kernel_options else ""
                where = f"--kernel-dir {plan.kernel_dir}" if plan.kernel_dir else f"{places[0]}"
                raise ValueError(
                    f"{where} has no {file} for {config}{special}, and without nvidia-cutlass-dsl "
                    "it cannot be built here; build it with python -m megamoe.compile and pass "
                    "--kernel-dir"
                )
