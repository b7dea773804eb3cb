"""The options of a sweep, and the frozen plan that they become.

A plan has every default filled in and can run here.
Neighbours: `sweep` is the command, `measure` runs a plan.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

import torch

from megamoe.config import supports
from megamoe.precision import PRECISIONS
from perf.baselines import BASELINES
from perf.cases import MODELS, ROUTINGS, Case
from perf.options import MAX_TOKENS, integer, one_of, token_counts
from perf.processes import Place
from perf.timing import EAGER, GRAPH


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sweep`; one without a value here follows the device (DEFAULTS)."""

    def add(*names: str, text: str, **kwargs) -> None:
        default = f" (default: {kwargs['default']})" if "default" in kwargs else ""
        parser.add_argument(*names, help=text + default, **kwargs)

    def names_in(table) -> dict[str, object]:
        return {"type": one_of(table), "metavar": "NAME"}

    def follows(field: str) -> str:
        return ", ".join(f"{getattr(row, field)} on {name}" for name, row in DEFAULTS.items())

    ranks, count = integer(choices=(1, 2, 4, 8)), integer(1)
    add("--device", default="cpu", **names_in(DEFAULTS), text=", ".join(DEFAULTS))
    add(
        "--ranks",
        type=ranks,
        metavar="W",
        text=f"1, 2, 4 or 8; {follows('ranks')}; under torchrun its number of processes",
    )
    add("--model", **names_in(MODELS), text=f"{', '.join(MODELS)}; {follows('model')}")
    add("--num-experts", type=count, metavar="E", text="experts, instead of the model's")
    add("--experts-per-gpu", type=count, metavar="N", text="the same, per GPU")
    add("--tokens", type=token_counts, metavar="LIST", text="per rank: 1,8,64 or 1:4096 (doubling)")
    add(
        "--max-tokens",
        type=integer(1, MAX_TOKENS),
        metavar="T",
        text="capacity per rank, else the largest of --tokens",
    )
    add("--routing", default="balanced", **names_in(ROUTINGS), text=", ".join(ROUTINGS))
    add("--precision", default="bf16", **names_in(PRECISIONS), text=", ".join(PRECISIONS))
    add("--seed", type=integer(0, 2**31), default=0, metavar="N", text="of inputs and weights")
    add("--graph", dest="mode", action="store_const", const=GRAPH, text="replay a CUDA graph")
    add("--eager", dest="mode", action="store_const", const=EAGER, text="call from the host")
    add("--reps", type=integer(1, 100_000), metavar="N", text=f"timed calls: {follows('reps')}")
    add("--num-sms", type=count, metavar="N", text="SMs that the kernel may use")
    add("--kernel-dir", metavar="DIR", text="kernels compiled ahead of time")
    add("--baseline", **names_in(BASELINES), text=f"measure beside: {', '.join(BASELINES)}")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        text="compare outputs with the oracle",
    )
    add("--csv", metavar="PATH", text="append a result row per measurement")


@dataclass(frozen=True)
class Plan:
    """A sweep with every default filled in; `case` is its point of the first token count."""

    case: Case
    device: torch.device
    tokens: tuple[int, ...]
    max_tokens: int
    mode: str
    reps: int
    warmup: int
    num_sms: int | None
    kernel_dir: str | None
    baseline: str | None
    verify: bool

    @property
    def emulated(self) -> bool:
        return self.device.type == "cpu"


def case_of(args: argparse.Namespace, gpus: int = 1) -> tuple[Case, tuple[int, ...], int]:
    """(case of the first token count, token counts, capacity per rank), wherever it will run: all
    ranks on one GPU, or a process and a rank on each of several.
    """
    default = DEFAULTS[args.device]
    if args.num_experts and args.experts_per_gpu:
        raise ValueError("--num-experts and --experts-per-gpu exclude each other")
    tokens = tuple(args.tokens or default.tokens)
    max_tokens = args.max_tokens or max(tokens)
    if max(tokens) > max_tokens:
        raise ValueError(f"--tokens {max(tokens)} is more than --max-tokens {max_tokens}")
    if gpus > 1 and args.ranks not in (None, gpus):
        raise ValueError(f"--ranks {args.ranks}, but torchrun started {gpus} processes")
    ranks = gpus if gpus > 1 else args.ranks or default.ranks
    model = MODELS[args.model or default.model]
    experts = args.num_experts or (args.experts_per_gpu or 0) * gpus
    case = Case(
        model=dataclasses.replace(model, num_experts=experts or model.num_experts),
        num_ranks=ranks,
        tokens=tokens[0],
        ranks_per_gpu=ranks // gpus,
        routing=args.routing,
        precision=args.precision,
        seed=args.seed,
    )
    supports(case.config(max_tokens))
    return case, tokens, max_tokens


def plan_of(args: argparse.Namespace, place: Place | None = None) -> Plan:
    """The plan that the options ask for, in the job of `place` if there is one; ValueError if it
    cannot run here.
    """
    default, device = DEFAULTS[args.device], torch.device(args.device)
    if place and args.device == "cpu":
        raise ValueError("torchrun needs --device cuda; the emulator holds all ranks by itself")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; use --device cpu")
    mode = args.mode or default.mode
    if args.device == "cpu" and mode == GRAPH:
        raise ValueError("--graph needs --device cuda; use --eager")
    if place:
        if place.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {place.local_rank} of this machine has no GPU of its own: "
                f"torch sees {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", place.local_rank)
    case, tokens, max_tokens = case_of(args, place.size if place else 1)
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
        baseline=args.baseline,
        verify=args.verify,
    )
