"""The command `publish`: the measurements that are published, in one go on a GPU machine.

Each step is one sweep, or another command, in its own process with a
time limit, so that a hang, a crash or a lost CUDA context costs that step only. A step appends its
rows, one at a time and with token counts ascending, to the file of its table, DIR/<table>.csv:
sweeps of one precision and one number of GPUs share a file unless they name another. The most
wanted figures come first. On a machine of several GPUs the steps are those with a process per GPU:
those of the largest number of GPUs that it has, then those of fewer; else the steps of one GPU.
Exit status: 1 if any step failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from perf.against.baselines import BASELINE_OF
from perf.arguments import Parser, check_writable, integer, names, path_name
from perf.recording.results import REPOSITORY
from perf.running.plan import add_launch_options, kernels_of
from perf.workload.parts import ABLATION_KERNELS

SUMMARY = "measure what is published, each step in a process of its own"
EPILOG = "Exit status: 1 if any step failed."

#: Seconds that torchrun gets to end its ranks when a step has used up its time.
GRACE_S = 45

#: Table of the steps that only show that everything works.
SMOKE = "smoke"
#: Commands that steps run.
SWEEP, ACCURACY, ABLATION, ZEROING = "sweep", "accuracy", "ablation", "zeroing"


@dataclass(frozen=True)
class Step:
    """One sweep, or another command: options beyond `--device cuda`, precision, baseline and
    `--csv`; the table that its rows belong to; seconds it may take; processes with a GPU each (one:
    all ranks on one GPU); and whether a sweep measures the baseline of the precision beside it.
    """

    name: str
    options: str
    table: str = ""
    precision: str = "bf16"
    limit_s: int = 240
    gpus: int = 1
    command: str = SWEEP
    baseline: bool = True

    @property
    def file(self) -> str:
        """Name of the CSV file: of the GPU whose figures are published, or the table asked for."""
        kind = "bf16" if self.precision == "bf16" else "fp8"
        place = "one_gpu" if self.gpus == 1 else f"ep{self.gpus}"
        return f"{self.table or f'h200_{kind}_{place}'}.csv"

    @property
    def arguments(self) -> list[str]:
        """The options of the command, but for the file."""
        given = self.options.split()
        beside = self.command == SWEEP and self.baseline
        baseline = ["--baseline", BASELINE_OF[self.precision]] if beside else []
        return ["--device", "cuda", *given, "--precision", self.precision, *baseline]


#: One capacity, so that the steps of a model, a precision and a number of ranks share a kernel.
_ROOM = "--max-tokens 8192"
_ALL_TOKENS = f"{_ROOM} --tokens 1,8,32,128,512,1024,2048,4096,8192"
_SKEWED = f"{_ROOM} --tokens 128,1024,8192"
#: Experts that one GPU of a deployment at EP4 holds.
_EP4_SHARE = {"pro": 96, "flash": 64, "v3": 64, "mimo": 96, "qwen3": 32}
_ONE = {
    name: f"--model {name} --num-experts {experts} --ranks 1"
    for name, experts in _EP4_SHARE.items()
}
#: A layer of several ranks that fits one GPU: a rank's share of V3 at EP8.
_V3 = "--model v3 --num-experts 32 --graph"
#: All experts of Pro fit on one GPU.
_PRO_ERRORS = "--model pro --tokens 1,64,512"


def _errors(name: str, options: str, precision: str, gpus: int = 1) -> Step:
    return Step(name, options, ACCURACY, precision, gpus=gpus, command=ACCURACY)


def _ablation(name: str, options: str, gpus: int = 1) -> Step:
    options = f"{options} {_ROOM} --tokens 128,2048,8192"
    return Step(name, options, ABLATION, "fp8_block", gpus=gpus, command=ABLATION)


def _fp8(name: str, options: str, gpus: int = 1, table: str = "") -> Step:
    """The sweep in FP8 with the scales of DeepSeek-V3."""
    return Step(f"{name}_fp8", options, table, "fp8_block", gpus=gpus)


def _both(name: str, options: str, gpus: int = 1) -> tuple[Step, Step]:
    """The sweep in BF16 and in FP8."""
    return Step(name, options, gpus=gpus), _fp8(name, options, gpus)


def _share_of_ep8(gpus: int) -> Iterator[Step]:
    """As many experts on each of a few GPUs, with a rank each, as at EP8: half of those at EP4."""
    place = "one" if gpus == 1 else f"ep{gpus}"
    for name in ("pro", "flash", "v3", "mimo"):
        experts = gpus * _EP4_SHARE[name] // 2
        options = f"--model {name} --num-experts {experts} --ranks {gpus} --graph {_ALL_TOKENS}"
        yield _fp8(f"{name}_{place}_of_ep8", options, gpus, "h200_fp8_share_of_ep8")


STEPS = (
    Step("smoke", "--model tiny --ranks 1 --tokens 1,64,512 --eager --reps 5", SMOKE, limit_s=120),
    *_both("pro_one", f"{_ONE['pro']} --graph {_ALL_TOKENS}"),
    Step(
        "pro_one_fp8_channel",
        f"{_ONE['pro']} --graph {_ALL_TOKENS}",
        "h200_fp8_channel_one_gpu",
        "fp8_channel",
    ),
    *_both("flash_one", f"{_ONE['flash']} --graph {_ALL_TOKENS}"),
    *_both("v3_one", f"{_ONE['v3']} --graph {_ALL_TOKENS}"),
    _fp8("mimo_one", f"{_ONE['mimo']} --graph {_ALL_TOKENS}"),
    _fp8("qwen3_one", f"{_ONE['qwen3']} --graph {_ALL_TOKENS}"),
    *_share_of_ep8(1),
    *_both("v3_ranks2", f"{_V3} --ranks 2 --tokens 1,8,64,512,2048"),
    *_both("v3_ranks4", f"{_V3} --ranks 4 --tokens 1,8,64,512,1024"),
    *_both("v3_ranks8", f"{_V3} --ranks 8 --tokens 1,8,64,512"),
    Step("tiny", "--model tiny --ranks 1 --tokens 1:4096 --graph"),
    Step("tiny_ranks8", "--model tiny --ranks 8 --tokens 1:512 --graph"),
    Step("v3_eager", f"{_ONE['v3']} --eager {_ROOM} --tokens 1,32,512,2048,8192"),
    Step("v3_skewed", f"{_V3} --ranks 4 --routing zipf --tokens 64,1024"),
    Step("v3_hot_expert", f"{_V3} --ranks 4 --routing hot-expert --tokens 64,1024"),
    Step("v3_hot_rank", f"{_V3} --ranks 4 --routing hot-rank --tokens 64,1024"),
    _errors("pro_errors_fp8", _PRO_ERRORS, "fp8_block"),
    _errors("pro_errors_fp8_spread", f"{_PRO_ERRORS} --spread 16", "fp8_block"),
    _errors("pro_errors_fp8_channel", _PRO_ERRORS, "fp8_channel"),
    _errors("pro_errors", _PRO_ERRORS, "bf16"),
    _ablation("pro_ablation_fp8", f"{_ONE['pro']} --graph"),
    Step(
        "zeroing",
        f"{_V3} --tokens 4096,8192,16384,32768",
        ZEROING,
        "fp8_block",
        command=ZEROING,
    ),
)


_SMOKE = "--model tiny --tokens 1,64,512 --reps 5 --graph"
#: All experts of a model, whatever the number of GPUs, and at EP2 as many on a rank as at EP4.
_EP = {name: f"--model {name} --graph" for name in _EP4_SHARE}
_EP2 = {
    name: f"--model {name} --num-experts {2 * experts} --graph"
    for name, experts in _EP4_SHARE.items()
}


def _skewed(gpus: int, layer: str) -> Iterator[tuple[Step, Step]]:
    """Routings of a layer of Pro that load some experts or ranks more than others."""
    for name, routing in {
        "skewed": "zipf",
        "hot_expert": "hot-expert:0.3",
        "hot_rank": "hot-rank:0.6",
    }.items():
        yield _both(f"pro_ep{gpus}_{name}", f"{layer} --routing {routing} {_SKEWED}", gpus)


EP_STEPS = (
    Step("smoke_ep8", _SMOKE, SMOKE, limit_s=120, gpus=8),
    Step("smoke_ep8_fp8", _SMOKE, SMOKE, "fp8_block", limit_s=120, gpus=8),
    *_both("pro_ep8", f"{_EP['pro']} {_ALL_TOKENS}", 8),
    _errors("pro_errors_ep8_fp8", f"{_PRO_ERRORS} {_ROOM}", "fp8_block", gpus=8),
    *_both("flash_ep8", f"{_EP['flash']} {_ALL_TOKENS}", 8),
    *_both("v3_ep8", f"{_EP['v3']} {_ALL_TOKENS}", 8),
    *_both("mimo_ep8", f"{_EP['mimo']} {_ALL_TOKENS}", 8),
    *(fp8 for _, fp8 in _skewed(8, _EP["pro"])),
    Step("smoke_ep4", _SMOKE, SMOKE, limit_s=120, gpus=4),
    Step("smoke_ep4_fp8", _SMOKE, SMOKE, "fp8_block", limit_s=120, gpus=4),
    *_both("pro_ep4", f"{_EP['pro']} {_ALL_TOKENS}", 4),
    _errors("pro_errors_ep4_fp8", f"{_PRO_ERRORS} {_ROOM}", "fp8_block", gpus=4),
    *_both("flash_ep4", f"{_EP['flash']} {_ALL_TOKENS}", 4),
    *_both("v3_ep4", f"{_EP['v3']} {_ALL_TOKENS}", 4),
    _fp8("mimo_ep4", f"{_EP['mimo']} {_ALL_TOKENS}", 4),
    _fp8("qwen3_ep4", f"{_EP['qwen3']} {_ALL_TOKENS}", 4),
    Step(
        "pro_ep4_fp8_channel",
        f"{_EP['pro']} {_ALL_TOKENS}",
        "h200_fp8_channel_ep4",
        "fp8_channel",
        gpus=4,
    ),
    *(step for both in _skewed(4, _EP["pro"]) for step in both),
    _ablation("pro_ablation_ep4_fp8", _EP["pro"], 4),
    Step("smoke_ep2", _SMOKE, SMOKE, limit_s=120, gpus=2),
    *_both("pro_ep2", f"{_EP2['pro']} {_ALL_TOKENS}", 2),
    _ablation("pro_ablation_ep2_fp8", _EP2["pro"], 2),
    *_both("flash_ep2", f"{_EP2['flash']} {_ALL_TOKENS}", 2),
    *_both("v3_ep2", f"{_EP2['v3']} {_ALL_TOKENS}", 2),
    *(fp8 for _, fp8 in _skewed(2, _EP2["pro"])),
    *_share_of_ep8(2),
    Step(
        "pro_ep2_staging",
        f"{_EP2['pro']} --staging {_ROOM} --tokens 1,512,8192",
        "staging",
        gpus=2,
        baseline=False,
    ),
    Step(
        "pro_ep2_cold_l2",
        f"{_EP2['pro']} --l2 cold {_ROOM} --tokens 1,8192",
        "cold_l2",
        "fp8_block",
        gpus=2,
        baseline=False,
    ),
)


STEP_OF = {step.name: step for step in (*STEPS, *EP_STEPS)}


def steps_for(gpus: int) -> list[Step]:
    """The steps of a machine with that many GPUs: with a process per GPU if there are several, on
    most of them first.
    """
    steps = [step for step in EP_STEPS if step.gpus <= gpus]
    return sorted(steps, key=lambda step: -step.gpus) or list(STEPS)


def configs_of(steps: Sequence[Step]) -> list[dict]:
    """Every kernel that `steps` run, for `python -m megamoe.compile --list`."""
    parser, configs = Parser(), []
    add_launch_options(parser)
    for step in steps:
        launched, _ = parser.parse_known_args(step.arguments)
        kernels = ABLATION_KERNELS if step.command == ABLATION else ({},)
        configs += [c for c in kernels_of(launched, step.gpus, kernels) if c not in configs]
    return configs


def command_of(step: Step, directory: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command line of a step."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(step.gpus), "-m"]
    return [
        sys.executable,
        "-m",
        *(torchrun if step.gpus > 1 else []),
        "perf",
        step.command,
        *step.arguments,
        *extra,
        "--csv",
        str(directory / step.file),
    ]


def run_torchrun(command: Sequence[str], limit_s: float) -> int:
    """The exit status; TimeoutExpired, after torchrun was told to end its ranks: killed outright it
    would leave them behind on their GPUs.
    """
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        try:
            return process.wait(limit_s)
        except BaseException:
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def run_step(command: Sequence[str], limit_s: float, gpus: int = 1) -> str:
    """Run one step with its output on ours; "ok", or what went wrong."""
    try:
        if gpus > 1:
            status = run_torchrun(command, limit_s)
        else:
            status = subprocess.run(command, cwd=REPOSITORY, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    return "ok" if status == 0 else f"exit status {status}"


def add_options(parser: argparse.ArgumentParser) -> None:
    count = integer(1)
    parser.add_argument("directory", type=Path, help="where the CSV files go")
    parser.add_argument(
        "--only",
        type=names(STEP_OF),
        default=(),
        metavar="STEPS",
        help=f"comma-separated, of {', '.join(STEP_OF)}",
    )
    parser.add_argument(
        "--gpus",
        type=count,
        metavar="N",
        help="the steps of a machine with N GPUs (default: as many as there are here)",
    )
    parser.add_argument(
        "--limit", type=count, metavar="SECONDS", help="start no step after this long"
    )
    parser.add_argument(
        "--reps", type=count, metavar="N", help="passed on to every step that times"
    )
    parser.add_argument("--num-sms", type=count, metavar="N", help="passed on to every step")
    parser.add_argument(
        "--kernel-dir", type=path_name, metavar="DIR", help="passed on to every step"
    )
    parser.add_argument(
        "--list-configs",
        action="store_true",
        help="write the configurations to DIR/configs.json, to build ahead of time, and stop",
    )


def passed_on(args: argparse.Namespace, step: Step) -> list[str]:
    """The words that a step gets of ours."""
    options = {"--num-sms": args.num_sms, "--kernel-dir": args.kernel_dir}
    if step.command != ACCURACY:
        options["--reps"] = args.reps
    return [str(word) for option in options.items() if option[1] for word in option]


def run(args: argparse.Namespace) -> int:
    """Run the steps, print a summary; 1 if any failed."""
    steps = [step for name, step in STEP_OF.items() if name in args.only]
    steps = steps or steps_for(args.gpus or torch.cuda.device_count())
    directory = args.directory.resolve()
    check_writable("directory", directory, parents=True, directory=True)
    directory.mkdir(parents=True, exist_ok=True)
    if args.list_configs:
        (directory / "configs.json").write_text(json.dumps(configs_of(steps)))
        return 0
    begin, outcomes = time.monotonic(), {}
    for step in steps:
        spent = time.monotonic() - begin
        limit_s = step.limit_s if args.limit is None else min(step.limit_s, args.limit - spent)
        if limit_s <= 0:
            outcomes[step.name] = "not started: out of time"
            continue
        print(f"== {step.name}: {' '.join(step.arguments)}", flush=True)
        command = command_of(step, directory, passed_on(args, step))
        outcomes[step.name] = run_step(command, limit_s, step.gpus)
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return 0 if all(outcome == "ok" for outcome in outcomes.values()) else 1
