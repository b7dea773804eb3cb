"""The command `publish`: the measurements that are published, in one go on a GPU machine.

Each step is one sweep, or another command, in its own process with a time limit, so that a hang, a
crash or a lost CUDA context costs that step only. A step appends its rows, one at a time and with
token counts ascending, to the file of its table, DIR/<table>.csv: sweeps of one GPU, precision and
number of GPUs share a file unless they name another. The most wanted figures come first. On a
machine of several GPUs the steps are those with a process per GPU: those of the largest number of
GPUs that it has, then those of fewer; else the steps of one GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamoe.precision import precision_of
from perf.against.baselines import baseline_name
from perf.arguments import (
    Parser,
    add_options,
    check_writable,
    integer,
    names,
    option,
    path_name,
    read_options,
)
from perf.recording.environment import REPOSITORY
from perf.running.options import Options as Launched
from perf.running.options import SweepOptions
from perf.running.plan import kernels_of
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
    `--csv`; the table that its rows belong to, in which {gpu} is the GPU; seconds it may take;
    processes with a GPU each (one: all ranks on one GPU); and whether a sweep measures the baseline
    of the precision beside it.
    """

    name: str
    options: str
    table: str = ""
    precision: str = "bf16"
    limit_s: int = 240
    gpus: int = 1
    command: str = SWEEP
    baseline: bool = True

    def file(self, gpu: str) -> str:
        """Name of the CSV file: of the table asked for, or of this GPU, precision and place."""
        kind = "bf16" if self.precision == "bf16" else "fp8"
        place = "one_gpu" if self.gpus == 1 else f"ep{self.gpus}"
        return f"{self.table or f'{{gpu}}_{kind}_{place}'}.csv".format(gpu=gpu)

    @property
    def arguments(self) -> list[str]:
        """The options of the command, but for the file."""
        given = self.options.split()
        beside = self.command == SWEEP and self.baseline
        baseline = ["--baseline", baseline_name(precision_of(self.precision))] if beside else []
        return ["--device", "cuda", *given, "--precision", self.precision, *baseline]


#: One capacity, so that the steps of a model, a precision and a number of ranks share a kernel.
_ROOM = "--max-tokens 8192"
_ALL_TOKENS = f"{_ROOM} --tokens 1,8,32,128,512,1024,2048,4096,8192"
_SKEWED = f"{_ROOM} --tokens 128,1024,8192"
#: Experts that one GPU of a deployment at EP4 holds.
_EP4_SHARE = {"pro": 96, "flash": 64, "v3": 64, "mimo": 96, "qwen3": 32}
_ONE = {
    name: f"--model {name} --num-experts {n} --ranks 1 --graph" for name, n in _EP4_SHARE.items()
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
        yield _fp8(f"{name}_{place}_of_ep8", options, gpus, "{gpu}_fp8_share_of_ep8")


def _sweeps(place: str, layers: dict[str, str], both: str, fp8: str = "") -> Iterator[Step]:
    """The sweeps over all token counts of these models, of some in FP8 alone."""
    gpus = 1 if place == "one" else int(place.removeprefix("ep"))
    for name in both.split():
        yield from _both(f"{name}_{place}", f"{layers[name]} {_ALL_TOKENS}", gpus)
    for name in fp8.split():
        yield _fp8(f"{name}_{place}", f"{layers[name]} {_ALL_TOKENS}", gpus)


def _recipe(precision: str, model: str, place: str, layers: dict[str, str], gpus: int = 1) -> Step:
    """The sweep over all token counts in another recipe, with a table of its own."""
    table = f"{{gpu}}_{precision}_{'one_gpu' if gpus == 1 else place}"
    options = f"{layers[model]} {_ALL_TOKENS}"
    return Step(f"{model}_{place}_{precision}", options, table, precision, gpus=gpus)


def _mxfp4(
    place: str, layers: dict[str, str], gpus: int = 1, precision: str = "fp8_mxfp4"
) -> list[Step]:
    return [_recipe(precision, name, place, layers, gpus) for name in ("pro", "flash", "v3")]


STEPS = (
    Step("smoke", "--model tiny --ranks 1 --tokens 1,64,512 --eager --reps 5", SMOKE, limit_s=120),
    *_sweeps("one", _ONE, "pro"),
    _recipe("fp8_channel", "pro", "one", _ONE),
    *_mxfp4("one", _ONE),
    _recipe("fp8_int4", "pro", "one", _ONE),
    *_sweeps("one", _ONE, "flash v3", fp8="mimo qwen3"),
    *_share_of_ep8(1),
    _errors("pro_errors_fp8", _PRO_ERRORS, "fp8_block"),
    _errors("pro_errors_fp8_spread", f"{_PRO_ERRORS} --spread 16", "fp8_block"),
    _errors("pro_errors_fp8_channel", _PRO_ERRORS, "fp8_channel"),
    _errors("pro_errors_fp8_mxfp4", _PRO_ERRORS, "fp8_mxfp4"),
    _errors("pro_errors_fp8_mxfp4_spread", f"{_PRO_ERRORS} --spread 16", "fp8_mxfp4"),
    _errors("pro_errors_fp8_mxfp4_token", _PRO_ERRORS, "fp8_mxfp4_token"),
    _errors("pro_errors_fp8_mxfp4_token_spread", f"{_PRO_ERRORS} --spread 16", "fp8_mxfp4_token"),
    _errors("pro_errors_fp8_int4", _PRO_ERRORS, "fp8_int4"),
    _errors("pro_errors", _PRO_ERRORS, "bf16"),
    _ablation("pro_ablation_fp8", _ONE["pro"]),
    Step("zeroing", f"{_V3} --tokens 4096,8192,16384,32768", ZEROING, "fp8_block", command=ZEROING),
)


_SMOKE = "--model tiny --tokens 1,64,512 --reps 5 --graph"
#: All experts of a model, whatever the number of GPUs, and at EP2 as many on a rank as at EP4.
_EP = {name: f"--model {name} --graph" for name in _EP4_SHARE}
_EP2 = {name: f"--model {name} --num-experts {2 * n} --graph" for name, n in _EP4_SHARE.items()}


def _smoke(gpus: int) -> Iterator[Step]:
    for name, precision in {"smoke": "bf16", "smoke_fp8": "fp8_block"}.items():
        name = name.replace("smoke", f"smoke_ep{gpus}")
        yield Step(name, _SMOKE, SMOKE, precision, limit_s=120, gpus=gpus)


def _skewed(gpus: int, layer: str) -> Iterator[tuple[Step, Step]]:
    """Routings of a layer of Pro that load some experts or ranks more than others."""
    routings = {"skewed": "zipf", "hot_expert": "hot-expert:0.3", "hot_rank": "hot-rank:0.6"}
    for name, routing in routings.items():
        yield _both(f"pro_ep{gpus}_{name}", f"{layer} --routing {routing} {_SKEWED}", gpus)


#: What engines do, beside shared experts in the layer.
_SHARED = f"--shared-experts 1 --two-streams {_ROOM} --tokens 1,8,128,512,2048,8192"


def _alone(name: str, options: str, table: str, precision: str = "bf16") -> Step:
    """A sweep of Pro on two GPUs without a baseline."""
    options = f"{_EP2['pro']} {options} {_ROOM}"
    return Step(f"pro_ep2_{name}", options, table, precision, gpus=2, baseline=False)


EP_STEPS = (
    *_smoke(8),
    *_sweeps("ep8", _EP, "pro"),
    _errors("pro_errors_ep8_fp8", f"{_PRO_ERRORS} {_ROOM}", "fp8_block", gpus=8),
    *_sweeps("ep8", _EP, "flash v3 mimo"),
    *(fp8 for _, fp8 in _skewed(8, _EP["pro"])),
    *_smoke(4),
    *_sweeps("ep4", _EP, "pro"),
    _errors("pro_errors_ep4_fp8", f"{_PRO_ERRORS} {_ROOM}", "fp8_block", gpus=4),
    *_sweeps("ep4", _EP, "flash v3", fp8="mimo qwen3"),
    _recipe("fp8_channel", "pro", "ep4", _EP, 4),
    *_mxfp4("ep4", _EP, 4),
    *(step for both in _skewed(4, _EP["pro"]) for step in both),
    _ablation("pro_ablation_ep4_fp8", _EP["pro"], 4),
    Step("smoke_ep2", _SMOKE, SMOKE, limit_s=120, gpus=2),
    *_sweeps("ep2", _EP2, "pro"),
    *_mxfp4("ep2", _EP2, 2),
    *_mxfp4("ep2", _EP2, 2, "fp8_mxfp4_token"),
    _recipe("fp8_int4", "pro", "ep2", _EP2, 2),
    _ablation("pro_ablation_ep2_fp8", _EP2["pro"], 2),
    *_sweeps("ep2", _EP2, "flash v3"),
    *(fp8 for _, fp8 in _skewed(2, _EP2["pro"])),
    *_share_of_ep8(2),
    _alone("staging", "--staging --tokens 1,512,8192", "staging"),
    _alone("cold_l2", "--l2 cold --tokens 1,8192", "cold_l2", "fp8_block"),
    Step(
        "pro_shared_ep2_fp8",
        f"{_EP2['pro']} {_SHARED}",
        "shared_experts",
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
    configs: list[dict] = []
    for step in steps:
        parser, kind = Parser(), SweepOptions if step.command == SWEEP else Launched
        add_options(parser, kind)
        launched: Launched = read_options(kind, parser.parse_known_args(step.arguments)[0])
        kernels = ABLATION_KERNELS if step.command == ABLATION else ({},)
        configs += [c for c in kernels_of(launched, step.gpus, kernels) if c not in configs]
    return configs


def gpu_word() -> str:
    """What files call the GPU here: h200 for "NVIDIA H200", h100 for "NVIDIA H100 80GB HBM3"."""
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()


def command_of(step: Step, directory: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command line of a step on the GPUs here."""
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
        str(directory / step.file(gpu_word())),
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


def _passed_on(which: str, **how) -> Any:
    return option(f"passed on to every step{which}", **how)


@dataclass(frozen=True)
class Options:
    directory: Path = option("where the CSV files go", "directory", type=Path)
    only: tuple[str, ...] = option(
        f"comma-separated, of {', '.join(STEP_OF)}",
        default=(),
        type=names(STEP_OF),
        metavar="STEPS",
    )
    gpus: int | None = option(
        "the steps of a machine with N GPUs (default: as many as there are here)",
        type=integer(1),
        metavar="N",
    )
    reps: int | None = _passed_on(" that times", type=integer(1), metavar="N")
    num_sms: int | None = _passed_on("", type=integer(1), metavar="N")
    kernel_dir: str | None = _passed_on("", type=path_name, metavar="DIR")
    list_configs: bool = option(
        "write the configurations to DIR/configs.json, to build ahead of time, and stop",
        default=False,
        action="store_true",
    )


def passed_on(options: Options, step: Step) -> list[str]:
    """The words that a step gets of ours."""
    words = {"--num-sms": options.num_sms, "--kernel-dir": options.kernel_dir}
    if step.command != ACCURACY:
        words["--reps"] = options.reps
    return [str(word) for option in words.items() if option[1] for word in option]


def run(options: Options) -> int:
    """Run the steps, print a summary; 1 if any failed."""
    steps = [step for name, step in STEP_OF.items() if name in options.only]
    steps = steps or steps_for(options.gpus or torch.cuda.device_count())
    directory = options.directory.resolve()
    check_writable("directory", directory, parents=True, directory=True)
    directory.mkdir(parents=True, exist_ok=True)
    if options.list_configs:
        (directory / "configs.json").write_text(json.dumps(configs_of(steps)))
        return 0
    outcomes = {}
    for step in steps:
        print(f"== {step.name}: {' '.join(step.arguments)}", flush=True)
        command = command_of(step, directory, passed_on(options, step))
        outcomes[step.name] = run_step(command, step.limit_s, step.gpus)
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return 0 if all(outcome == "ok" for outcome in outcomes.values()) else 1
