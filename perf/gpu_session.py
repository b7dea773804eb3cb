"""The measurements that are published, in one go on a GPU machine.

`python -m perf.gpu_session DIR`. Each step is one sweep in its own process with a time limit and
writes DIR/<step>.csv, so that a hang, a crash or a lost CUDA context costs that step only. The most
wanted figures come first. Exit status: 1 if any step failed.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.options import Parser, integer, nearest
from perf.plan import add_options, case_of

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One sweep: options beyond `--device cuda --csv`, and seconds it may take."""

    name: str
    options: str
    limit_s: int = 240


#: A rank's share of V3's experts at EP8: what one GPU of a deployment holds.
_V3 = "--model v3 --num-experts 32 --graph"

STEPS = (
    Step(
        "smoke",
        "--model tiny --ranks 1 --tokens 1,64,512 --eager --reps 5 --baseline torch_bf16",
        120,
    ),
    Step("v3_prefill", f"{_V3} --ranks 1 --tokens 4096 --baseline torch_bf16"),
    Step("v3_tokens", f"{_V3} --ranks 1 --tokens 1:4096 --baseline torch_bf16"),
    Step("v3_ranks2", f"{_V3} --ranks 2 --tokens 1,8,64,512,2048 --baseline torch_bf16"),
    Step("v3_ranks4", f"{_V3} --ranks 4 --tokens 1,8,64,512,1024 --baseline torch_bf16"),
    Step("v3_ranks8", f"{_V3} --ranks 8 --tokens 1,8,64,512 --baseline torch_bf16"),
    Step("tiny", "--model tiny --ranks 1 --tokens 1:4096 --graph --baseline torch_bf16"),
    Step("tiny_ranks8", "--model tiny --ranks 8 --tokens 1:512 --graph --baseline torch_bf16"),
    Step(
        "v3_eager",
        f"{_V3.replace('--graph', '--eager')} --ranks 1 --tokens 1,64,4096 --baseline torch_bf16",
    ),
    Step("v3_skewed", f"{_V3} --ranks 4 --routing skewed --tokens 64,1024 --baseline torch_bf16"),
    Step(
        "v3_hot_expert",
        f"{_V3} --ranks 4 --routing hot-expert --tokens 64,1024 --baseline torch_bf16",
    ),
    Step(
        "v3_hot_rank", f"{_V3} --ranks 4 --routing hot-rank --tokens 64,1024 --baseline torch_bf16"
    ),
)


def configs_of(steps: Sequence[Step]) -> list[dict]:
    """Fields of every configuration that `steps` run, for `python -m megamoe.compile --list`."""
    parser = Parser()
    add_options(parser)
    configs = []
    for step in steps:
        case, _, max_tokens = case_of(
            parser.parse_args(["--device", "cuda", *step.options.split()])
        )
        fields = dataclasses.asdict(case.config(max_tokens))
        if fields not in configs:
            configs.append(fields)
    return configs


def command_of(step: Step, directory: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command line of a step."""
    csv = str(directory / f"{step.name}.csv")
    return [
        sys.executable,
        "-m",
        "perf",
        "sweep",
        "--device",
        "cuda",
        *step.options.split(),
        *extra,
        "--csv",
        csv,
    ]


def run_step(command: Sequence[str], limit_s: float) -> str:
    """Run one step with its output on ours; "ok", or what went wrong."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    return "ok" if done.returncode == 0 else f"exit status {done.returncode}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, print a summary; the exit status."""
    names = [step.name for step in STEPS]
    parser = Parser(prog="python -m perf.gpu_session", description="Measure what is published.")
    parser.add_argument("directory", type=Path, help="where the CSV files go")
    parser.add_argument("--only", metavar="STEPS", help=f"comma-separated, of {', '.join(names)}")
    parser.add_argument(
        "--limit", type=integer(1), metavar="SECONDS", help="start no step after this long"
    )
    parser.add_argument("--reps", metavar="N", help="passed on to every sweep")
    parser.add_argument("--num-sms", metavar="N", help="passed on to every sweep")
    parser.add_argument("--kernel-dir", metavar="DIR", help="passed on to every sweep")
    parser.add_argument(
        "--list-configs",
        action="store_true",
        help="write the configurations to DIR/configs.json, to build ahead of time, and stop",
    )
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else names
    for name in wanted:
        if name not in names:
            parser.error(f"{name!r} is not a step; {nearest(name, names)}")

    passed_on = {"--reps": args.reps, "--num-sms": args.num_sms, "--kernel-dir": args.kernel_dir}
    extra = [word for option, value in passed_on.items() if value for word in (option, value)]
    directory = args.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if args.list_configs:
        configs = configs_of([step for step in STEPS if step.name in wanted])
        (directory / "configs.json").write_text(json.dumps(configs))
        return 0
    begin, outcomes = time.monotonic(), {}
    for step in (step for step in STEPS if step.name in wanted):
        spent = time.monotonic() - begin
        limit_s = step.limit_s if args.limit is None else min(step.limit_s, args.limit - spent)
        if limit_s <= 0:
            outcomes[step.name] = "not started: out of time"
            continue
        print(f"== {step.name}: {step.options}", flush=True)
        outcomes[step.name] = run_step(command_of(step, directory, extra), limit_s)
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return 0 if all(outcome == "ok" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
