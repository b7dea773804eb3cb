"""A process per rank: places, collectives, the sampled oracle, the exchanged baseline."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
import torch.distributed as dist

import megamoe
from megamoe import reference
from megamoe.compile import KernelNotFound
from megamoe.config import KernelConfig
from megamoe.faults import LaunchTimeout
from megamoe.precision import precision_of
from megamoe.reference import Weights
from perf.__main__ import main, options_of
from perf.against.baselines import ExchangedTorchBf16, ExchangedTorchFp8, TorchFp8
from perf.against.roofline import work_of
from perf.commands import accuracy
from perf.recording.files import ResultsFile, load
from perf.running import jobs, processes, timing
from perf.running.contenders import baseline_contenders
from perf.running.expected import sample_of
from perf.running.jobs import Place, ProcessJob, place_of
from perf.running.listing import SWEEP, Listing, heading
from perf.running.plan import Plan, plan_of
from perf.running.runner import Runner
from perf.running.session import measure_all
from perf.running.timing import COLD, EAGER, GRAPH, MODES, WARM, Times, flush_of, measure
from perf.workload.cases import MODELS, Case, make_inputs, make_rank_inputs, make_weights
from perf.workload.stored import make_layer_weights
from tests.multigpu.launcher import forked_from_preloaded
from tests.unit.perf_helpers import error_line, pretend_gpu

RANKS, TOKENS, MOST = 2, 37, 16
FP8_RECIPES = ("fp8_block", "fp8_channel")
ROUTINGS = ("balanced", "random", "masked", "hot-rank")
#: A few bf16 roundings (2^-9 each) of independent signs.
BOUND = 8e-3


def torchrun(rank: int = 0, size: int = 4) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}


def case_of(routing: str = "balanced", precision: str = "bf16") -> Case:
    return Case(MODELS["emulated"], RANKS, TOKENS, routing=routing, precision=precision)


def with_shared() -> Plan:
    """Of a layer with shared experts, as each of the processes has it."""
    argv = ["sweep", "--ranks", "2", "--routing", "masked", "--tokens", str(TOKENS)]
    plan = plan_of(options_of([*argv, "--shared-experts", "2", "--baseline", "torch_bf16"]))
    return dataclasses.replace(plan, case=dataclasses.replace(plan.case, ranks_per_gpu=1))


def fields(inputs) -> tuple[torch.Tensor, ...]:
    return inputs.x, inputs.topk_idx, inputs.topk_weights


def config_of(arguments) -> SimpleNamespace:
    return SimpleNamespace(recipe=precision_of(arguments["precision"]))


class FakeMoE:
    """The exchanged baseline behind the layer's interface."""

    scale = 1.0

    def __init__(self, **arguments):
        assert arguments["group"] is dist.group.WORLD and "world" not in arguments
        assert arguments["max_tokens_per_rank"] == 9
        self.workspace = SimpleNamespace(reset_bytes=1024, total_bytes=65536)
        self.kernel_config, self.num_sms = KernelConfig(), 5
        self.config, self.nvlink_bytes = config_of(arguments), None
        self.local_ranks, self.buffer = [dist.get_rank()], torch.zeros(9, arguments["hidden_size"])

    def input_buffer(self, rank):
        assert rank == dist.get_rank()
        return self.buffer

    def load_weights(self, w13, w2, *scales):
        assert w13.shape[0] == w2.shape[0] == MODELS["emulated"].num_experts // RANKS
        quantised = scales[0] is not None
        torch_layer = ExchangedTorchFp8 if quantised else ExchangedTorchBf16
        self.layer = torch_layer(w13, w2, RANKS, scales=scales if quantised else ())

    def __call__(self, *inputs):
        return self.layer(*inputs) * self.scale

    def synchronize(self):
        pass


def command(job: ProcessJob, runner: type, listing: Listing, csv: Path, argv: list[str]):
    """Status and standard output of a command with a process per rank."""
    plan = plan_of(options_of([*argv, "--ranks", "2", "--csv", str(csv)]))
    plan = dataclasses.replace(plan, case=dataclasses.replace(plan.case, ranks_per_gpu=1))
    file, out = ResultsFile(csv, listing.kind), io.StringIO()
    with contextlib.redirect_stdout(out):
        status = measure_all([plan], file, runner, job, listing=listing)
    return status, out.getvalue()


def sweep(job: ProcessJob, csv: Path) -> tuple[int, str]:
    argv = ["sweep", "--tokens", "2,9", "--reps", "3", "--baseline", "torch_bf16", "--staging"]
    return command(job, Runner, SWEEP, csv, argv)


def work(rank: int, directory: Path) -> None:
    """What every process runs; what it found goes to `directory`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=RANKS
    )
    job = ProcessJob(torch.device("cpu"))
    job.align()
    found = {
        "max": job.max_over_ranks([rank, -rank, float("inf") if rank else 0.5]),
        "sum": job.sum_over_ranks(torch.tensor([rank + 1, 10])),
        "gather": job.gather(torch.full((2, 1), rank)),
    }
    for routing in ROUTINGS:
        case = case_of(routing)
        inputs = make_rank_inputs(case, rank)
        own = range(rank * case.experts_per_rank, (rank + 1) * case.experts_per_rank)
        weights = make_weights(case, experts=own)
        sample = sample_of(job, inputs, Weights(*weights), case, MOST)
        found[routing, "sample"] = sample
        masked = routing == "masked"
        found[routing, "out"] = ExchangedTorchBf16(*weights, RANKS, masked)(*fields(inputs))
        found[routing, "fp8"] = ExchangedTorchFp8(*weights, RANKS, masked)(*fields(inputs))
    for precision in FP8_RECIPES:
        case = case_of(precision=precision)
        own = range(rank * case.experts_per_rank, (rank + 1) * case.experts_per_rank)
        weights = make_layer_weights(case, experts=own)
        found[precision] = sample_of(job, make_rank_inputs(case, rank), weights, case, MOST)
    shared = with_shared()
    weights = make_layer_weights(shared.case, experts=shared.case.experts_of([rank]))
    inputs, held = make_rank_inputs(shared.case, rank), shared.case.experts_of([rank])
    [baseline] = baseline_contenders(shared, job, weights, held)
    found["shared"] = sample_of(job, inputs, weights, shared.case, MOST)
    found["shared baseline"] = baseline.prepare([inputs])()[0]
    megamoe.MegaMoE = FakeMoE
    found["sweep"] = sweep(job, directory / "rows.csv")
    argv = ["accuracy", "--tokens", "9"]
    listing, csv = accuracy.LISTING, directory / "errors.csv"
    found["accuracy"] = command(job, accuracy.AccuracyRunner, listing, csv, argv)
    count = SimpleNamespace(job=job, plan=SimpleNamespace(device="cpu"))
    found["work"] = Runner._work(count, case_of(), [make_rank_inputs(case_of(), rank)])
    FakeMoE.scale = 1.05
    found["wrong"] = sweep(job, directory / "wrong.csv")
    torch.save(found, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[list[dict], Path]:
    """What two processes found, and where they wrote."""
    directory = tmp_path_factory.mktemp("job")
    forked_from_preloaded()
    torch.multiprocessing.start_processes(
        work, (directory,), nprocs=RANKS, start_method="forkserver"
    )
    found = [torch.load(directory / f"{r}.pt", weights_only=False) for r in range(RANKS)]
    return found, directory


def test_collectives(ranks):
    for found in ranks[0]:
        assert found["max"] == [1, 0, float("inf")]
        assert found["sum"].tolist() == [3, 20]
        assert found["gather"].flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_sample_and_the_baseline_equal_the_oracle_on_all_weights(ranks, routing):
    case = case_of(routing)
    weights = make_weights(case)
    for found, inputs in zip(ranks[0], make_inputs(case), strict=True):
        whole = reference.moe_forward(*fields(inputs), *weights)
        sample, out = found[routing, "sample"], found[routing, "out"]
        assert sample.tokens.tolist() == [i * TOKENS // MOST for i in range(MOST)]
        assert reference.relative_error(sample.expected, whole[sample.tokens]) < 1e-3
        assert sample.expected.dtype == torch.bfloat16
        assert reference.relative_error(out, whole) < BOUND
        assert sample.error(out) < BOUND
        assert sample.error(out.roll(1, 0)) > 0.5
        out[1, 3] = float("nan")  # a token outside the sample
        assert 1 not in sample.tokens and sample.error(out) == float("inf")


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_fp8_baseline_is_the_same_with_a_process_per_rank(ranks, routing):
    case = case_of(routing)
    whole = TorchFp8(*make_weights(case), masked=routing == "masked")
    for found, inputs in zip(ranks[0], make_inputs(case), strict=True):
        out, alone = found[routing, "fp8"], whole(*fields(inputs))
        assert 0.02 < found[routing, "sample"].error(out) < whole.max_error
        # Alone the router weight is applied before FC2, and so before hidden rows are rounded.
        assert reference.relative_error(out, alone) < 0.04


@pytest.mark.parametrize("precision", FP8_RECIPES)
def test_the_sample_equals_the_oracle_in_fp8_too(ranks, precision):
    case = case_of(precision=precision)
    weights = make_layer_weights(case)
    for found, inputs in zip(ranks[0], make_inputs(case), strict=True):
        whole = reference.moe_forward(*fields(inputs), *weights, precision=precision)
        sample = found[precision]
        assert reference.relative_error(sample.expected, whole[sample.tokens]) < BOUND
        assert sample.error(whole) < BOUND


def test_shared_experts_compute_a_ranks_own_tokens(ranks):
    case = with_shared().case
    weights = make_weights(case)
    for found, inputs in zip(ranks[0], make_inputs(case), strict=True):
        assert inputs.topk_idx.min() == -1
        slots = reference.with_shared(*fields(inputs)[1:], case.model.num_experts, 2)
        whole = reference.moe_forward(inputs.x, *slots, *weights)
        sample = found["shared"]
        assert reference.relative_error(sample.expected, whole[sample.tokens]) < 1e-3
        assert reference.relative_error(found["shared baseline"], whole) < BOUND


def test_rank_0_alone_prints_and_keeps_rows(ranks):
    (first, second), directory = ranks
    assert (first["sweep"][0], second["sweep"][0]) == (0, 0)
    assert second["sweep"][1] == "" and first["sweep"][1].count("torch_bf16") == 2
    rows = load(directory / "rows.csv")
    assert rows.tokens.tolist() == [2] * 3 + [9] * 3
    assert rows.impl.tolist() == ["megamoe", "megamoe_staging", "torch_bf16"] * 2
    assert (rows.num_ranks == RANKS).all() and (rows.ranks_per_gpu == 1).all()
    staging = rows.impl == "megamoe_staging"
    assert rows.error_rel[staging].isna().all()
    assert (rows.error_rel[~staging] > 0).all() and (rows.error_rel[~staging] < BOUND).all()
    assert rows.workspace_bytes[0] == 65536


def test_errors_with_a_process_per_rank(ranks, one_thread, capsys, tmp_path):
    """The same exact answers, so the same errors but for where router weights are applied."""
    (first, second), directory = ranks
    assert (first["accuracy"][0], second["accuracy"][0]) == (0, 0)
    assert second["accuracy"][1] == "" and first["accuracy"][1].count("torch_fp8") == 2
    path = tmp_path / "alone.csv"
    assert main(["accuracy", "--tokens", "9", "--ranks", "2", "--csv", str(path)]) == 0
    joined, alone = (pandas.read_csv(file) for file in (directory / "errors.csv", path))
    same = ["num_ranks", "tokens", "precision", "seed", "impl", "exact"]
    assert joined[same].equals(alone[same]) and (joined.ranks_per_gpu == 1).all()
    assert joined.error_rel.tolist() == pytest.approx(alone.error_rel.tolist(), rel=0.05)
    assert joined.ratio[[0, 2]].tolist() == [1.0, 1.0]  # this layer is the pipeline


def test_every_rank_counts_the_work_of_all(ranks):
    expected = work_of(case_of(), [inputs.topk_idx for inputs in make_inputs(case_of())])
    assert expected.nvlink_bytes[0] > 0
    assert [found["work"] for found in ranks[0]] == [expected] * RANKS


def test_all_ranks_agree_on_a_wrong_output(ranks):
    assert [found["wrong"][0] for found in ranks[0]] == [1, 1]


def test_an_experts_weights_do_not_depend_on_who_makes_them():
    case = case_of()
    for whole, part in zip(
        make_weights(case), make_weights(case, experts=range(5, 7)), strict=True
    ):
        assert torch.equal(whole[5:7], part) and not torch.equal(whole[5], whole[6])


def test_place():
    assert place_of(torchrun(3)) == Place(rank=3, size=4, local_rank=3)
    assert place_of(torchrun(0, size=1)) is None
    assert place_of({"WORLD_SIZE": "4"}) is None and place_of({}) is None
    with pytest.raises(ValueError, match="RANK='x' is not an integer"):
        place_of({**torchrun(), "RANK": "x"})


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["sweep"], "torchrun needs --device cuda"),
        (["accuracy"], "torchrun needs --device cuda"),
        (["sweep", "--device", "cuda", "--ranks", "2"], "--ranks 2, but torchrun started 4 proces"),
        (["sweep", "--device", "cuda", "--num-experts", "18"], "num_experts=18 is not divisible b"),
    ],
)
def test_bad_arguments_under_torchrun_are_one_line(argv, expected, monkeypatch, capsys):
    pretend_gpu(monkeypatch, count=4)
    for name, value in torchrun().items():
        monkeypatch.setenv(name, value)
    assert expected in error_line(argv, capsys)


def test_plan_under_torchrun(monkeypatch):
    pretend_gpu(monkeypatch, count=4)
    argv = ["sweep", "--device", "cuda", "--model", "pro", "--tokens", "1,8", "--graph"]
    args = options_of([*argv, "--num-experts", "32", "--baseline", "torch_bf16"])
    plan = plan_of(args, place_of(torchrun(2)))
    assert plan.device == torch.device("cuda:2") and plan.max_tokens == 8
    assert (plan.case.num_ranks, plan.case.ranks_per_gpu, plan.case.num_gpus) == (4, 1, 4)
    assert plan.case.model.num_experts == 32
    text = heading(plan, "H200", ())
    assert "4 x H200" in text and "counts read by the host" in text
    with pytest.raises(ValueError, match="process 4 of this machine has no GPU"):
        plan_of(args, Place(rank=4, size=8, local_rank=4))


@pytest.mark.parametrize("between", [[], ["align"], ["flush"], ["flush", "align"]])
@pytest.mark.parametrize("mode", MODES)
def test_what_comes_before_the_first_event_of_every_repetition(mode, between, monkeypatch):
    """The GPU rests before the warm-up. A flush, then the meeting of the ranks, so that they still
    begin together.
    """
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            self.name = "begin" if Event.made % 4 < 2 else "end"
            Event.made += 1

        made = 0

        def record(self):
            log.append(self.name)

        def elapsed_time(self, other):
            return 0.5

    monkeypatch.setattr(timing, "sensors_of", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("pause"))
    monkeypatch.setattr(time, "sleep", lambda seconds: log.append(f"rest {seconds}"))
    calls = {name: partial(log.append, name) for name in ("call", "replay", "flush", "align")}
    graph = SimpleNamespace(replay=calls["replay"])
    monkeypatch.setattr(timing, "capture", lambda call: (graph, None))
    hooks = {name: calls[name] for name in between}
    times, _ = measure(calls["call"], "cuda", mode, repetitions=2, warmup=1, **hooks)
    timed = {EAGER: "call", GRAPH: "replay"}[mode]
    repetition = [*between, "begin", timed, "end"]
    rest = ["wait", f"rest {timing.SETTLE_S}"]
    assert log == ["call", *rest, timed, "wait", "pause", *repetition * 2, "wait"]
    assert times.us == (500, 500)


@pytest.mark.parametrize("size", [50 << 20, None])
def test_a_flush_overwrites_more_than_the_l2_holds(size, monkeypatch):
    gpu = SimpleNamespace(L2_cache_size=size) if size else SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert flush_of(WARM, "cpu") is None
    assert flush_of(COLD, "cpu")().nbytes == (3 * size if size else 256 << 20)


@pytest.mark.parametrize("alone", [True, False])
def test_a_runner_flushes_before_whatever_it_measures(alone, monkeypatch):
    def measured(*arguments, flush, align):
        return Times((1.0,)), (flush, align)

    monkeypatch.setattr("perf.running.together.measure", measured)
    same = {"max_over_ranks": lambda us: us, "sum_over_ranks": lambda values: values}
    job = SimpleNamespace(align="align", alone=alone, size=1, device="cpu", **same)
    plan = plan_of(options_of(["sweep"]))
    runner = SimpleNamespace(plan=plan, flush="flush", job=job)
    _, passed = Runner._measure(runner, None, EAGER, None)
    assert passed == ("flush", None if alone else "align")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (LaunchTimeout("rank 1, role math"), 1, "launch failed after 0"),
        (ValueError("no"), 2, "error: no"),
        (KernelNotFound("no DSL"), 2, "error: no DSL"),
        (OSError("disk"), 1, "stopped after 0 finished row(s): disk"),
        (torch.OutOfMemoryError("9 GiB"), 1, "bf16: out of memory after 0 finished row(s)"),
    ],
)
def test_a_failed_rank_says_so_and_ends_its_process(error, status, message, monkeypatch, capsys):
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    def fail(plan, job):
        raise error

    monkeypatch.setattr(os, "_exit", end)
    for name in ("LAST_WORDS_S", "dist"):
        fake = SimpleNamespace(init_process_group=lambda *a, **k: None)
        monkeypatch.setattr(jobs, name, 0 if name == "LAST_WORDS_S" else fake)
    for name in jobs.NO_MULTICAST:
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    job = SimpleNamespace(rank=3, align=lambda: None)
    job.abort = lambda *arguments: ProcessJob.abort(job, *arguments)
    monkeypatch.setattr(jobs, "ProcessJob", lambda device: job)
    plan = plan_of(options_of(["sweep"]))
    with pytest.raises(Ended) as ended, processes.joined(Place(3, 4, 3)) as joined:
        measure_all([plan], None, fail, joined)
    assert ended.value.args == (status,)
    err = capsys.readouterr().err
    assert err.startswith(f"rank 3: {message}")
