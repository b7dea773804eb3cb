"""The options of commands that launch the layer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megamoe.config import MAX_TOP_K
from megamoe.precision import PRECISIONS
from perf.against import deepep
from perf.against.baselines import PROCESS_BASELINES
from perf.arguments import (
    MAX_TOKENS,
    checked,
    integer,
    names,
    one_of,
    option,
    path_name,
    switches,
    token_counts,
)
from perf.running.timing import EAGER, GRAPH, L2_STATES, WARM
from perf.workload import routings
from perf.workload.cases import MODELS

#: SMs of shared experts on a stream of their own, where nobody says how many.
LEAST_SMS = 8
#: Token counts per rank by device.
TokensOf = Mapping[str, Sequence[int]]


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


def _follows(name: str) -> str:
    """A default that follows the device, in words."""
    return ", ".join(f"{getattr(row, name)} on {device}" for device, row in DEFAULTS.items())


def _size(letter: str, what: str) -> Any:
    text = f"{what}, instead of the model's"
    return option(text, type=integer(1), metavar=letter)


def _tokens_text(kind: type[Options]) -> str:
    told = [f"{','.join(map(str, few))} on {name}" for name, few in kind.default_tokens.items()]
    return f"per rank: 1,8,64 or 1:4096 (doubling); by default {'; '.join(told)}"


def precision_option(default: str) -> Any:
    text = f"one or several of {', '.join(PRECISIONS)}"
    return option(text, default=(default,), type=names(PRECISIONS), metavar="LIST")


def csv_option(text: str, **how) -> Any:
    return option(text, type=path_name, metavar="PATH", **how)


def list_configs_option() -> Any:
    text = "write what `python -m megamoe.compile --list` needs for this command, and stop"
    return option(text, type=Path, metavar="PATH")


@dataclass(frozen=True)
class Options:
    """What is launched, and how it is timed and kept; None follows the device (DEFAULTS), the model
    or the other options. The command line has what says what is launched; commands declare more.
    """

    default_tokens: ClassVar[TokensOf] = {name: row.tokens for name, row in DEFAULTS.items()}

    device: str = option(", ".join(DEFAULTS), default="cpu", type=one_of(DEFAULTS), metavar="NAME")
    ranks: int | None = option(
        f"1, 2, 4 or 8; {_follows('ranks')}; under torchrun its number of processes",
        type=integer(choices=(1, 2, 4, 8)),
        metavar="W",
    )
    model: str | None = option(
        f"{', '.join(MODELS)}; {_follows('model')}", type=one_of(MODELS), metavar="NAME"
    )
    hidden_size: int | None = _size("H", "hidden size")
    intermediate_size: int | None = _size("I", "intermediate size")
    num_experts: int | None = _size("E", "number of experts")
    top_k: int | None = _size("K", "top k")
    shared_experts: int = option(
        "experts beside the routed ones that every token goes to, on its own rank",
        default=0,
        type=integer(0, MAX_TOP_K),
        metavar="S",
    )
    tokens: Sequence[int] | None = option(_tokens_text, type=token_counts, metavar="LIST")
    max_tokens: int | None = option(
        "capacity per rank, else the largest of --tokens", type=integer(1, MAX_TOKENS), metavar="T"
    )
    routing: str = option(
        routings.HELP, default="balanced", type=checked(routings.canonical), metavar="NAME|FILE"
    )
    precision: tuple[str, ...] = precision_option("bf16")
    seed: int = option("of inputs and weights", default=0, type=integer(0, 2**31), metavar="N")
    num_sms: int | None = option("SMs that the kernel may use", type=integer(1), metavar="N")
    kernel_dir: str | None = option("kernels compiled ahead of time", type=path_name, metavar="DIR")
    verify: bool = option(
        "compare outputs with the oracle", default=True, action=argparse.BooleanOptionalAction
    )
    spread: int = 0
    mode: str | None = None
    l2: str = WARM
    reps: int | None = None
    baseline: tuple[str, ...] = ()
    staging: bool = False
    two_streams: bool = False
    shared_sms: int | None = None
    ceilings: str | None = None
    csv: str | None = None
    list_configs: Path | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Token counts per rank."""
        return tuple(self.tokens or self.default_tokens[self.device])


@dataclass(frozen=True)
class TimedOptions(Options):
    """The same on the command line with how it is timed and kept."""

    mode: str | None = switches({GRAPH: "replay a CUDA graph", EAGER: "call from the host"})
    l2: str = option(
        "L2 cache before a timed call: warm, as the last call left it, or cold, overwritten",
        default=WARM,
        type=one_of(L2_STATES),
        metavar="STATE",
    )
    reps: int | None = option(
        f"timed calls: {_follows('reps')}", type=integer(1, 100_000), metavar="N"
    )
    ceilings: str | None = csv_option("rooflines from rows of `python -m perf ceilings`")
    csv: str | None = csv_option("append a result row per measurement")


@dataclass(frozen=True)
class SweepOptions(TimedOptions):
    """The same with what is measured beside the layer."""

    baseline: tuple[str, ...] = option(
        f"measure beside it one or several of {', '.join(PROCESS_BASELINES)} "
        f"(the last only under torchrun, in {deepep.PRECISION})",
        default=(),
        type=names(PROCESS_BASELINES),
        metavar="LIST",
    )
    staging: bool = option(
        "measure beside it the copy of tokens to where peers read them, which a forward makes "
        "before its launch (only in bf16 on several ranks)",
        default=False,
        action="store_true",
    )
    two_streams: bool = option(
        "measure beside it what engines do: routed and shared experts as two layers, on two "
        "streams of each GPU, and a sum",
        default=False,
        action="store_true",
    )
    shared_sms: int | None = option(
        "SMs of the shared experts on their stream; default: by their part of the work, at least "
        f"{LEAST_SMS}",
        type=integer(1),
        metavar="N",
    )
    list_configs: Path | None = list_configs_option()
