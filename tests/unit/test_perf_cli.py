"""The command line: options, one-line errors, rows as they finish, and sweeps on a CPU for real."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megamoe
from megamoe import compile, dsl, reference
from megamoe.backends import GpuBackend
from megamoe.config import KernelConfig, select
from megamoe.faults import LaunchTimeout
from megamoe.precision import PRECISIONS, Operand, precision_of
from megamoe.progress import Progress
from perf.__main__ import COMMANDS, main, options_of
from perf.against.baselines import TorchBf16
from perf.arguments import check_writable, nearest, token_counts
from perf.commands import publish
from perf.recording.files import ResultsFile, load
from perf.running import listing, session
from perf.running.checks import check_here
from perf.running.contenders import staging_contenders
from perf.running.options import DEFAULTS
from perf.running.plan import Plan, plan_of
from perf.running.points import Point
from perf.running.timing import COLD, EAGER, GRAPH, Times, measure
from perf.workload.cases import Model, make_rank_inputs
from tests.machine import max_relative_error
from tests.nights import at_night, built
from tests.unit.perf_helpers import error_line, pretend_gpu

REPOSITORY = Path(__file__).resolve().parents[2]


class FakeMoE:
    """The oracle behind the layer's interface; `fault(number of the call)` runs before a call."""

    made: list[FakeMoE] = []
    fault = staticmethod(lambda call: None)
    scale = 1.0

    def __init__(self, **arguments):
        self.arguments = arguments
        self.calls = 0
        self.workspace = SimpleNamespace(reset_bytes=1024, total_bytes=65536)
        self.kernel_config = KernelConfig()
        self.num_sms = 5 if arguments["num_sms"] is None else arguments["num_sms"]
        self.nvlink_bytes = 4096
        self.config = SimpleNamespace(recipe=precision_of(arguments["precision"]))
        self.made.append(self)

    def load_weights(self, w13, w2, *scales):
        self.w13, self.w2 = w13, w2

    def __call__(self, x, topk_idx, topk_weights):
        self.fault(self.calls)
        self.calls += 1
        if self.arguments["world"] == 1:
            return self._forward(x, topk_idx, topk_weights)
        return [self._forward(*rank) for rank in zip(x, topk_idx, topk_weights, strict=True)]

    def _forward(self, *inputs):
        assert all(isinstance(tensor, torch.Tensor) for tensor in inputs)
        return reference.moe_forward(*inputs, self.w13, self.w2) * self.scale

    def synchronize(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    made: list[FakeMoE] = []
    cls = type("Fake", (FakeMoE,), {"made": made})
    monkeypatch.setattr(megamoe, "MegaMoE", cls, raising=False)
    return cls


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["swep"], ["'swep'", "did you mean sweep?"]),
        ([], ["COMMAND"]),
        (["sweep", "--modle", "v3"], ["--modle", "did you mean --model"]),
        (["sweep", "--model", "v4"], ["--model", "'v4'", "did you mean v3?"]),
        (["sweep", "--model", "zzz"], ["choose from pro, flash, v3, mimo, qwen3, tiny, emulated"]),
        (["sweep", "--routing", "hotrank"], ["--routing", "did you mean hot-rank"]),
        (["sweep", "--device", "gpu"], ["--device", "'gpu'", "cpu"]),
        (["sweep", "--ranks", "3"], ["--ranks", "did you mean 2 or 4?"]),
        (["sweep", "--routing", "zipf:x"], ["--routing", "'x' is not a number"]),
        (["sweep", "--routing", "balanced:1"], ["--routing", "takes no parameter"]),
        (["sweep", "--routing", "no/such.pt"], ["no/such.pt cannot be read: No such file"]),
        (["sweep", "--precision", "bf61"], ["--precision", "did you mean bf16?"]),
        (["sweep", "--precision", "bf16,pf8"], ["--precision", "'pf8'", "bf16"]),
        (["sweep", "--precision", ""], ["--precision", "'' is not valid"]),
        (["sweep", "--hidden-size", "100"], ["hidden_size=100 is not a multiple of 128"]),
        (["sweep", "--intermediate-size", "64"], ["intermediate_size=64"]),
        (["sweep", "--top-k", "17"], ["top_k=17 must be in 1..16"]),
        (["sweep", "--baseline", "torch-bf16,torch-bf17"], ["did you mean torch_bf16"]),
        (["sweep", "--baseline", "torch-fp9"], ["'torch_fp9'", "did you mean torch_fp8"]),
        (["sweep", "--baseline", "torch"], ["--baseline", "torch_bf16", "did you mean torch_"]),
        (["sweep", "--tokens", "1,x"], ["--tokens", "'x' is not an integer"]),
        (["sweep", "--tokens", "0"], ["--tokens", "0 must be in 1.."]),
        (["sweep", "--tokens", "8:1"], ["--tokens", "did you mean 1:8?"]),
        (["sweep", "--reps", "-1"], ["--reps", "-1 must be in 1.."]),
        (["sweep", "--tokens", "64", "--max-tokens", "32"], ["64 is more than --max-tokens 32"]),
        (["sweep", "--graph"], ["--graph needs --device cuda"]),
        (["sweep", "--l2", "cold"], ["--l2 cold needs --device cuda"]),
        (["sweep", "--l2", "cool"], ["--l2", "'cool'", "did you mean cold?"]),
        (["sweep", "--num-experts", "12"], ["num_experts=12", "num_ranks=8"]),
        (["sweep", "--num-experts", "2", "--ranks", "1"], ["top_k=4", "num_experts=2"]),
        (["accuracy", "--spread", "99"], ["99 must be in 0..24"]),
        (["accuracy", "--precision", "fp4"], ["'fp4' is not valid"]),
        (["accuracy", "--baseline", "torch_fp8"], ["unknown argument --baseline"]),
        (["accuracy", "--no-verify"], ["unknown argument --no-verify"]),
        (["accuracy", "--hidden-size", "100"], ["hidden_size=100"]),
        (["zeroing", "--routing", "masked:0.2"], ["masks slots"]),
        (["zeroing", "--baseline", "torch_bf16"], ["unknown argument --baseline"]),
        (["zeroing", "--tokens", "x"], ["'x' is not an integer"]),
        (["ablation"], ["an ablation needs --device cuda"]),
        (["ablation", "--baseline", "torch_bf16"], ["unknown argument --baseline"]),
        (
            ["ablation", "--list-configs", "/nowhere/a.json"],
            ["--list-configs /nowhere/a.json cannot be"],
        ),
        (["ablation", "--tokens", "x"], ["'x' is not an integer"]),
    ],
)
def test_bad_arguments_end_in_one_line(argv, expected, capsys, fake):
    line = error_line(argv, capsys)
    for part in expected:
        assert part in line
    assert fake.made == []


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((name, "--csv") for name in ("sweep", "accuracy", "zeroing", "ablation", "ceilings")),
        *((name, "--ceilings") for name in ("sweep", "zeroing", "ablation")),
        *((name, "--kernel-dir") for name in ("sweep", "accuracy", "trace")),
        ("trace", "--phases"),
        *(("report", option) for option in ("--output", "--pictures", "--peers")),
    ],
)
def test_an_empty_path_is_one_line(command, option, capsys, monkeypatch):
    """It comes from a variable that nobody set, and would leave the option out."""
    monkeypatch.setattr(COMMANDS[command], "run", lambda args: 0)
    assert f"{option}: '' is no path" in error_line([command, option, ""], capsys)


@pytest.mark.parametrize("command", ["sweep", "ablation", "trace"])
def test_cuda_without_a_gpu(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device is available" in error_line([command, "--device", "cuda"], capsys)


def test_a_layer_that_refuses_its_arguments_is_one_line(capsys, monkeypatch):
    def refuse(**arguments):
        raise ValueError(f"top_k={arguments['top_k']} is more than 2")

    monkeypatch.setattr(megamoe, "MegaMoE", refuse, raising=False)
    assert "top_k=3 is more than 2" in error_line(["sweep", "--top-k", "3"], capsys)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("8", [8]),
        ("1,8,64", [1, 8, 64]),
        ("1:8", [1, 2, 4, 8]),
        ("3:20", [3, 6, 12, 20]),
        ("4:4,1,2:4", [4, 1, 2]),
    ],
)
def test_token_counts(text, counts):
    assert token_counts(text) == counts


@pytest.mark.parametrize(
    ("path", "options", "problem"),
    [
        ("file", {}, ""),
        ("new.csv", {}, ""),
        ("made/a/b.csv", {"parents": True}, ""),
        ("made/a", {"parents": True, "directory": True}, ""),
        (".", {"directory": True}, ""),
        ("made/b.csv", {}, "made is no directory"),
        (".", {}, "it is a directory"),
        ("file/b.csv", {}, "file is no directory"),
        ("file/a/b.csv", {"parents": True}, "file is no directory"),
        ("file", {"parents": True, "directory": True}, "file is no directory"),
    ],
)
def test_what_can_be_written(path, options, problem, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    before = list(tmp_path.iterdir())
    if problem:
        with pytest.raises(ValueError, match=f"^--out .* cannot be written: .*{problem}$"):
            check_writable("--out", tmp_path / path, **options)
    else:
        check_writable("--out", tmp_path / path, **options)
        monkeypatch.setattr(os, "access", lambda place, mode: not place.exists())
        with pytest.raises(ValueError, match=f"no permission to write {tmp_path}"):
            check_writable("--out", tmp_path / path, **options)
    assert list(tmp_path.iterdir()) == before


def test_nearest():
    assert nearest("7", [1, 2, 4, 8]) == "did you mean 8 or 4?"
    assert nearest("V3", ["v3", "pro"]) == "did you mean v3?"
    assert nearest("?", ["a", "b"]) == "choose from a, b"


def plan_for(*argv: str) -> Plan:
    return plan_of(options_of(["sweep", *argv]))


def test_defaults_are_a_small_layer_at_ep8_on_a_cpu():
    default = plan_for()
    assert default.emulated and default.mode == EAGER and default.verify
    assert (default.case.num_ranks, default.case.model.name) == (8, "emulated")
    assert default.max_tokens == max(default.tokens)


def test_sizes_of_the_model():
    case = plan_for("--model", "qwen3", "--ranks", "4").case
    shape = (case.model.hidden, case.model.intermediate, case.model.num_experts, case.model.top_k)
    assert shape == (4096, 1536, 128, 8)
    fewer = plan_for("--model", "qwen3", "--num-experts", "32").case.model
    assert (fewer.name, fewer.num_experts) == ("qwen3", 32)
    sizes = ["--hidden-size", "512", "--intermediate-size", "384", "--num-experts", "16"]
    own = plan_for(*sizes, "--top-k", "2").case.model
    assert own == Model("custom", 512, 384, 16, 2)


def test_lists_of_names_take_dashes_and_drop_repeats():
    plan = plan_for("--baseline", "torch-bf16,torch_bf16")
    assert plan.baselines == ("torch_bf16",) and plan_for().baselines == ()


@pytest.fixture
def second_precision(monkeypatch):
    """One more row in the table of precisions, as another kernel would add."""
    again = dataclasses.replace(PRECISIONS["bf16"], name="bf16_again")
    monkeypatch.setitem(PRECISIONS, "bf16_again", again)


def test_precisions_are_measured_one_after_the_other(second_precision, fake, capsys, tmp_path):
    path = tmp_path / "rows.csv"
    assert main([*SMALL, "--precision", "bf16,bf16-again", "--csv", str(path)]) == 0
    rows = load(path)
    assert rows.precision.tolist() == ["bf16", "bf16", "bf16_again", "bf16_again"]
    assert [moe.arguments["precision"] for moe in fake.made] == ["bf16", "bf16_again"]
    err = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in err] == [
        "[1/4] bf16", "[2/4] bf16", "[3/4] bf16_again", "[4/4] bf16_again"]  # fmt: skip


def test_every_configuration_is_checked_before_the_first_runs(second_precision, fake, monkeypatch):
    float32 = Operand("float32", 32, "float32")
    wide = dataclasses.replace(PRECISIONS["bf16"], name="bf16_again", tokens=float32)
    monkeypatch.setitem(PRECISIONS, "bf16_again", wide)
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, "--precision", "bf16,bf16_again"])
    assert stop.value.code == 2 and fake.made == []


def test_a_kernel_that_cannot_be_built_is_one_line(capsys, monkeypatch):
    def lack(**arguments):
        raise compile.KernelNotFound("no C compiler")

    monkeypatch.setattr(megamoe, "MegaMoE", lack)
    assert "error: no C compiler" in error_line(["sweep"], capsys)


def test_what_is_lacking_ends_the_sweep_in_one_line(fake, capsys, monkeypatch):
    def lack(plans):
        raise ValueError(f"{len(plans)} plan(s), no memory")

    monkeypatch.setattr(session, "check_here", lack)
    assert "1 plan(s), no memory" in error_line(["sweep"], capsys)
    assert fake.made == []


def test_a_wrong_baseline_is_not_timed(fake, capsys, monkeypatch, tmp_path):
    calls = []

    def wrong(layer, x, topk_idx, topk_weights):
        calls.append(len(x))
        return x.clone()

    monkeypatch.setattr(TorchBf16, "__call__", wrong)
    path = tmp_path / "rows.csv"
    assert main([*SMALL, "--baseline", "torch_bf16", "--csv", str(path)]) == 1
    assert "torch_bf16 is wrong at 2 tokens" in capsys.readouterr().err
    assert calls == [4] and load(path).impl.tolist() == ["megamoe"]
    assert main([*SMALL, "--baseline", "torch_bf16", "--no-verify"]) == 0
    assert len(calls) == 1 + 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_leaves_nothing_on_a_terminal():
    terminal, log, none = Terminal(), io.StringIO(), io.StringIO()
    for stream, total in ((terminal, 2), (log, 2), (none, 0)):
        progress = Progress(total, stream)
        for what in ("one", "two"):
            progress.start(what)
        progress.clear()
        progress.clear()
    assert log.getvalue() == "[1/2] one, 0 s so far\n[2/2] two, 0 s so far\n"
    first, second = "[1/2] one, 0 s so far", "[2/2] two, 0 s so far"
    blank = "\r" + " " * len(first) + "\r"
    assert terminal.getvalue() == first + blank + second + blank
    assert none.getvalue() == ""


def test_a_sweep_without_stderr_has_no_progress(fake, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it after `2>&-`
    assert main(SMALL) == 0


def gpu_of(gigabytes: int) -> SimpleNamespace:
    return SimpleNamespace(name="GPU", multi_processor_count=100, total_memory=gigabytes << 30)


def test_what_the_machine_lacks_is_said_before_anything_runs(monkeypatch, tmp_path):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu_of(16))
    monkeypatch.setattr(dsl, "HAVE_DSL", True)
    cuda = ("--device", "cuda", "--model", "v3")
    check_here([plan_for(*cuda, "--num-experts", "32")])
    with pytest.raises(ValueError, match=r"needs at least \d+ GiB on a GPU, GPU has 16"):
        check_here([plan_for(*cuda)])
    few = (*cuda, "--num-experts", "32")
    with pytest.raises(ValueError, match=r"--num-sms 60 x 2 rank\(s\) is more than the 100 SMs"):
        check_here([plan_for(*few, "--ranks", "2", "--num-sms", "60")])
    monkeypatch.setattr(dsl, "HAVE_DSL", False)
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    wanted = plan_for(*few, "--kernel-dir", str(tmp_path / "kernels"))
    with pytest.raises(ValueError, match="--kernel-dir .*kernels has no megamoe-bf16-.*.so"):
        check_here([wanted])
    anywhere = plan_for(*few)
    with pytest.raises(ValueError, match=f"^{tmp_path} has no .* with python -m megamoe.compile"):
        check_here([anywhere])
    config = wanted.case.config(wanted.max_tokens)
    (tmp_path / f"{compile.kernel_name(config, select(config))}.so").touch()
    check_here([wanted, anywhere])


def test_cuda_options(monkeypatch):
    pretend_gpu(monkeypatch)
    cuda = plan_for("--device", "cuda", "--ranks", "4", "--num-experts", "32", "--no-verify")
    assert cuda.mode == GRAPH and cuda.case.model.name == "v3" and not cuda.verify
    assert cuda.case.model.num_experts == 32
    assert (cuda.case.ranks_per_gpu, cuda.case.num_gpus) == (4, 1)
    argv = ("--device", "cuda", "--eager", "--num-sms", "8", "--kernel-dir", "d", "--reps", "7")
    eager = plan_for(*argv, "--tokens", "1:8", "--max-tokens", "64")
    assert (eager.mode, eager.num_sms, eager.kernel_dir, eager.reps) == (EAGER, 8, "d", 7)
    assert eager.tokens == (1, 2, 4, 8) and eager.max_tokens == 64
    cold = plan_for(*argv, "--l2", "cold")
    assert (eager.label(GRAPH), cold.label(GRAPH)) == ("graph", "graph-cold")


SMALL = ["sweep", "--tokens", "2,3", "--reps", "2", "--num-experts", "8", "--ranks", "2"]


@pytest.mark.parametrize("ranks", ["1", "4"])
def test_a_sweep_prints_and_keeps_a_row_per_measurement(ranks, fake, capsys, tmp_path):
    path = tmp_path / "rows.csv"
    argv = [*SMALL, "--ranks", ranks, "--baseline", "torch_bf16", "--csv", str(path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "CPU emulation" in out and "not GPU figures" in out
    assert "4,096" in out and "1,024 of 65,536" in out and " ms" in out
    rows = load(path)
    assert rows.tokens.tolist() == [2, 2, 3, 3]
    assert rows.impl.tolist() == ["megamoe", "torch_bf16"] * 2
    assert (rows.num_ranks == int(ranks)).all() and (rows.ranks_per_gpu == int(ranks)).all()
    assert rows.error_rel.tolist()[::2] == [0, 0] and (rows.error_rel[1::2] > 0).all()
    assert rows.roofline_us.isna().all() and rows.tflops.isna().all()  # no GPU, no GPU figure
    assert "block_m=128" in rows.config[0] and "num_sms=5" in rows.config[0]
    assert rows.workspace_bytes[0] == 65536
    (moe,) = fake.made
    assert moe.arguments["max_tokens_per_rank"] == 3 and moe.arguments["world"] == int(ranks)
    assert moe.calls == 4  # two token counts, two repetitions


def test_every_row_of_a_cold_sweep_says_so(fake, capsys, monkeypatch, tmp_path):
    """On a CPU, with a flush that is not there."""
    flushed = []

    def measured(*arguments, flush, align):
        flushed.append(flush)
        return measure(*arguments)

    monkeypatch.setattr("perf.running.runner.flush_of", lambda l2, device: l2)
    monkeypatch.setattr("perf.running.together.measure", measured)
    path = tmp_path / "rows.csv"
    warm = plan_for(*SMALL[1:], "--baseline", "torch_bf16")
    cold = dataclasses.replace(warm, l2=COLD)
    assert session.measure_all([cold, warm], ResultsFile(path)) == 0
    assert flushed == ["cold"] * 4 + ["warm"] * 4
    assert load(path)["mode"].tolist() == ["eager-cold"] * 4 + ["eager"] * 4
    assert ", eager-cold, 2 timed call(s)" in capsys.readouterr().out


@pytest.mark.parametrize("precision", built())
@pytest.mark.parametrize("ranks", [1, 2])
def test_staging_is_measured_where_a_forward_stages(precision, ranks):
    """The plan says what the GPU's backend does before it launches: with bf16 tokens, copy them."""
    plan = plan_for("--ranks", str(ranks), "--precision", precision, "--tokens", "3", "--staging")
    case = plan.case
    buffer, launched = torch.zeros(4, case.model.hidden).bfloat16(), []
    backend = object.__new__(GpuBackend)
    backend.__dict__.update(
        layout=SimpleNamespace(config=case.config(4)), quantizes=case.recipe.tokens.has_scales,
        staged=[buffer], staged_scales=[], outputs=[buffer],
        launch=lambda *arguments: launched.append(arguments),
    )  # fmt: skip
    x, *others = dataclasses.astuple(make_rank_inputs(case, 0))
    stream = SimpleNamespace(cuda_stream=0)
    backend._stage_and_launch(0, stream, x, *others, None, None, None)
    assert len(launched) == 1 and bool(buffer.any()) == plan.stages
    moe = SimpleNamespace(local_ranks=[0], input_buffer=lambda rank: torch.zeros_like(buffer))
    for contender in staging_contenders(plan, moe):
        [copied] = contender.prepare([make_rank_inputs(case, 0)])()
        assert torch.equal(copied, buffer[:3]) and contender.mode == plan.mode
    assert len(staging_contenders(plan, moe)) == plan.stages
    assert staging_contenders(dataclasses.replace(plan, staging=False), moe) == []


def test_rows_of_staging(capsys, tmp_path):
    path = tmp_path / "rows.csv"
    argv = [*SMALL, "--reps", "1", "--precision", "bf16,fp8_block", "--staging"]
    assert main([*argv, "--csv", str(path)]) == 0
    rows = load(path)
    assert rows.impl.tolist() == ["megamoe", "megamoe_staging"] * 2 + ["megamoe"] * 2
    assert rows.precision.tolist() == ["bf16"] * 4 + ["fp8_block"] * 2
    staging = rows[rows.impl == "megamoe_staging"]
    assert (staging.us_median > 0).all() and staging.error_rel.isna().all()
    assert staging.tflops.isna().all() and staging.workspace_bytes.isna().all()
    out = capsys.readouterr().out
    assert out.count("nothing is copied before the launch") == 1
    point = Point(plan_for().case, GRAPH, "megamoe_staging", Times((7.0,)), None, None, None)
    cells = [text(point) for _, _, text in listing.GPU_COLUMNS]
    assert cells == ["1", "megamoe_staging", "7.0", "7.0", "7.0", *"-----"]


@pytest.mark.parametrize(("scale", "shown"), [(1.05, "5.0"), (float("nan"), "inf")])
def test_a_wrong_output_is_reported_and_fails_the_sweep(scale, shown, fake, capsys):
    fake.scale = scale
    assert main(SMALL) == 1
    captured = capsys.readouterr()
    assert captured.err.count("megamoe is wrong at") == 2
    assert shown in captured.out
    assert main([*SMALL, "--no-verify"]) == 0


OUT_OF_MEMORY = (
    "bf16, 3 tokens per rank: out of memory after 1 finished row(s), try --num-experts: "
)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: 1 finished row"),
        (LaunchTimeout("rank 1, role math"), 1, "launch failed after 1 finished row(s): rank 1"),
        (OSError("disk"), 1, "stopped after 1 finished row(s): disk"),
        (torch.OutOfMemoryError("64 GiB"), 1, OUT_OF_MEMORY + "64 GiB"),
        (MemoryError(), 1, OUT_OF_MEMORY),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes.\nframe #0"),
            1,
            OUT_OF_MEMORY + "DefaultCPUAllocator: can't allocate memory: 9 bytes.\n",
        ),
    ],
)
def test_finished_rows_survive(error, status, message, fake, capsys, tmp_path):
    def fault(call: int) -> None:
        if call == 3:  # the second repetition of the second token count
            raise error

    fake.fault = staticmethod(fault)
    path = tmp_path / "rows.csv"
    assert main([*SMALL, "--csv", str(path)]) == status
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 3  # after two lines of progress
    assert load(path).tokens.tolist() == [2]


class Closed(io.StringIO):
    """A pipe whose reader, such as `head -3`, has gone after so many lines."""

    lines = 3  # of the heading

    def flush(self):
        if self.getvalue().count("\n") > self.lines:
            raise BrokenPipeError(32, "Broken pipe")


def test_a_row_that_nobody_reads_is_kept(fake, capsys, tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main([*SMALL, "--csv", str(path)]) == 1
    assert "stopped after 1 finished row(s): [Errno 32] Broken pipe" in capsys.readouterr().err
    assert load(path).tokens.tolist() == [2]


def test_another_error_of_a_launch_is_not_out_of_memory(fake):
    def fault(call: int) -> None:
        raise RuntimeError("illegal instruction")

    fake.fault = staticmethod(fault)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        main(SMALL)


def test_a_file_that_can_no_longer_be_written_ends_the_sweep_in_one_line(fake, capsys, tmp_path):
    path, kept = tmp_path / "rows.csv", tmp_path / "kept.csv"

    def fault(call: int) -> None:
        if call == 2:  # the first repetition of the second token count
            path.rename(kept)
            path.mkdir()

    fake.fault = staticmethod(fault)
    assert main([*SMALL, "--csv", str(path)]) == 1
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if not line.startswith("[")]
    assert line.startswith("stopped after 1 finished row(s): ") and line.endswith(f"'{path}'")
    assert [row.split()[0] for row in out.splitlines()[-2:]] == ["2", "3"]
    assert load(kept).tokens.tolist() == [2]


@pytest.mark.parametrize("command", ["sweep", "zeroing", "accuracy"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    command, fake, capsys, tmp_path
):
    (tmp_path / "file").touch()
    argv = [command, "--tokens", "2", "--csv", str(tmp_path / "file" / "rows.csv")]
    assert "cannot be written: " in error_line(argv, capsys)
    assert fake.made == []


def test_a_csv_with_another_header_is_refused_before_anything_runs(fake, capsys, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    assert "another header" in error_line([*SMALL, "--csv", str(path)], capsys)
    assert fake.made == []


def test_help_lists_every_model_and_routing(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "pro, flash, v3, mimo, qwen3, tiny" in text and "hot-expert, hot-rank, masked" in text


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(" ".join(["usage: python -m perf", *command]))


def test_every_published_step_is_a_valid_command(monkeypatch, tmp_path):
    pretend_gpu(monkeypatch)
    for step in publish.STEPS:
        reps = 1 if step.command == "accuracy" else 3
        command = publish.command_of(step, tmp_path, ["--reps", "3"] if reps == 3 else [])
        assert command[1:4] == ["-m", "perf", step.command]
        args = options_of(command[3:])
        measured = plan_of(args)
        assert measured.device.type == "cuda" and measured.reps == reps
        assert args.csv == str(tmp_path / step.file("h200"))


def test_a_failed_step_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    limits = {}
    steps = {tuple(step.arguments): step.name for step in publish.STEPS}

    def run(command, cwd, timeout):
        name = steps[tuple(command[4 : command.index("--csv")])]
        limits[name] = timeout
        if name == "smoke":
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=3 if name == "zeroing" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    directory = tmp_path / "new"
    assert main(["publish", str(directory), "--only", "smoke,zeroing,v3_one"]) == 1
    assert list(limits) == ["smoke", "v3_one", "zeroing"] and directory.is_dir()
    summary = capsys.readouterr().out.splitlines()[-3:]
    assert summary == ["smoke: stopped after 120 s", "v3_one: ok", "zeroing: exit status 3"]
    assert main(["publish", str(directory), "--only", "v3_one"]) == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--only", "v3_onee", "did you mean v3_one"),
        ("--only", "", "--only: '' is not valid; choose from smoke"),
        ("--only", "v3_one,", "--only: '' is not valid"),
        ("--reps", "abc", "--reps: 'abc' is not an integer"),
        ("--num-sms", "abc", "--num-sms: 'abc' is not an integer"),
        ("--num-sms", "0", "--num-sms: 0 must be >= 1"),
        ("--kernel-dir", "", "--kernel-dir: '' is no path"),
    ],
)
def test_wrong_arguments_of_publish_are_one_line(
    option, value, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(publish, "run_step", lambda *step: "ok")
    assert message in error_line(["publish", str(tmp_path / "new"), option, value], capsys)
    assert not (tmp_path / "new").exists()


def test_options_are_passed_on_to_the_steps_that_have_them(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(publish, "run_step", lambda command, *limits: given.append(command) or "ok")
    only = "pro_errors,pro_one,pro_ablation_fp8,zeroing"
    options = ["--only", only, "--reps", "7", "--num-sms", "9", "--kernel-dir", "d"]
    assert main(["publish", str(tmp_path), *options]) == 0
    by_command = {words[3]: options_of(words[3:]) for words in given}
    assert {name: args.reps for name, args in by_command.items()} == {
        "sweep": 7, "accuracy": 1, "ablation": 7, "zeroing": 7}  # fmt: skip
    assert {(args.num_sms, args.kernel_dir) for args in by_command.values()} == {(9, "d")}


@pytest.mark.parametrize("options", [["--list-configs"], ["--only", "smoke"]])
def test_a_directory_that_cannot_be_made_is_one_line(options, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "run_step", None)
    (tmp_path / "file").touch()
    assert "file is no directory" in error_line(
        ["publish", str(tmp_path / "file"), *options], capsys
    )


def test_a_list_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "configs.json").mkdir()
    assert "configs.json" in error_line(
        ["publish", str(tmp_path), "--list-configs", "--only", "smoke"], capsys
    )


def run_perf(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "perf", *argv]
    env = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("precision", ["fp8_block", at_night("fp8_channel")])
def test_a_cpu_sweeps_fp8(precision, tmp_path):
    path = tmp_path / "rows.csv"
    argv = [*SMALL, "--reps", "1", "--precision", precision, "--csv", str(path)]
    assert main([*argv, "--baseline", "torch_bf16,torch_fp8"]) == 0
    rows = load(path)
    assert rows.precision.tolist() == [precision] * 6
    assert rows.impl.tolist() == ["megamoe", "torch_bf16", "torch_fp8"] * 2
    bound = 8e-3 if precision == "fp8_block" else max_relative_error(precision)
    assert (rows.error_rel[rows.impl == "megamoe"] < bound).all()
    assert (rows.error_rel[rows.impl != "megamoe"] > 8e-3).all()


@pytest.mark.slow
def test_the_sweep_on_a_cpu_as_a_user_runs_it(tmp_path):
    """No option but the file: every rank of an EP8 layer on the CPU, each row checked."""
    path = tmp_path / "rows.csv"
    done = run_perf("sweep", "--csv", str(path))
    assert done.returncode == 0, done.stderr
    assert "CPU emulation" in done.stdout
    rows = load(path)
    assert rows.tokens.tolist() == list(DEFAULTS["cpu"].tokens)
    assert (rows.num_ranks == 8).all() and (rows.impl == "megamoe").all()
    assert (rows.error_rel < 8e-3).all()
    assert (rows.reset_bytes > 0).all() and (rows.reset_bytes < rows.workspace_bytes / 10).all()
    nvlink = [int(line.split()[5].replace(",", "")) for line in done.stdout.splitlines()[3:]]
    assert len(nvlink) == len(rows) and nvlink == sorted(nvlink) and nvlink[0] > 0


@pytest.mark.slow
def test_ctrl_c_keeps_finished_rows(tmp_path):
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "perf", "sweep", "--tokens", "1,4,64:4096", "--csv", str(path)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and len(path.read_text().splitlines()) >= 3):  # two rows
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    kept = len(load(path))
    assert process.returncode == 130
    assert f"interrupted: {kept} finished row(s) kept in {path}" in err and "Traceback" not in err
