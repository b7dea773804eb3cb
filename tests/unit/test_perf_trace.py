"""A launch as a timeline: what CTAs recorded, as events that a viewer takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import megamoe
from megamoe import compile, wire
from megamoe.config import select
from megamoe.faults import LaunchTimeout
from megamoe.launch_shape import LaunchShape
from megamoe.regions import TRACE_CTAS, TRACE_MARKS, TRACE_NAMES, layout_of
from megamoe.schedule import PHASE_DONE, PHASE_FC1, PHASE_FC2, advance_walk, start_walk, tile_of
from perf.__main__ import main, options_of
from perf.against.roofline import routed_counts
from perf.commands import trace
from perf.recording.environment import environment
from perf.recording.files import ResultsFile, load
from perf.running.plan import plan_of
from perf.tracing import timeline
from perf.tracing.phases import PhaseRow, phases_of
from perf.tracing.timeline import (
    CtaTrace,
    TileTimes,
    decode,
    events_of,
    shifted,
    shifts_of,
    slices_of,
)
from perf.workload.cases import MODELS, Case, make_inputs
from tests.nights import at_night
from tests.unit.perf_helpers import error_line, pretend_gpu
from workspace import Workspace

RANKS, EXPERTS, CTAS = 2, 8, 2
SMALL = ["trace", "--ranks", str(RANKS), "--num-experts", str(EXPERTS), "--tokens", "3"]
PHASES = ["count", "tiles", "barrier", "combine"]


def case_of(**changes) -> Case:
    model = dataclasses.replace(MODELS["emulated"], num_experts=EXPERTS)
    return Case(model, RANKS, 3, ranks_per_gpu=RANKS, **changes)


def slices(events: list[dict]) -> dict[tuple[int, int], list[dict]]:
    """Slices by (process, thread), as they come."""
    found: dict[tuple[int, int], list[dict]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault((event["pid"], event["tid"]), []).append(event)
    return found


def check_nesting(events: list[dict]) -> None:
    """Slices of a thread begin in order, and each ends inside those that are open."""
    for thread, found in slices(events).items():
        open_until: list[float] = []
        last = 0.0
        for event in found:
            begin, end = event["ts"], event["ts"] + event["dur"]
            assert begin >= last - 1e-6 and event["dur"] >= 0, (thread, event)
            while open_until and open_until[-1] <= begin + 1e-6:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-6, (thread, event)
            open_until.append(end)
            last = begin


def marks_of(start: int, **changes) -> dict[str, int]:
    """Plausible marks of a CTA, in ns."""
    marks = {
        "start": start, "counted": start + 1000, "dispatched": start + 3000,
        "first_tile": start + 3500, "last_pull": start + 6000, "last_tile": start + 20_000,
        "combined": start + 21_000, "end": start + 22_000, "wait_tokens_ns": 700,
        "wait_fc1_out_ns": 300, "start_cycles": 50, "end_cycles": 50 + 22 * 1500,
    }  # fmt: skip
    return {name: value for name, value in (marks | changes).items() if value}


def rows_of(*ctas: dict[str, int]) -> torch.Tensor:
    """Region `trace` with these marks."""
    region = torch.zeros(TRACE_CTAS, TRACE_MARKS, dtype=torch.int64)
    for row, marks in zip(region, ctas, strict=False):
        for name, value in marks.items():
            row[TRACE_NAMES.index(name)] = value
    return region


# On a CPU


def stream_of(shape: LaunchShape, counts_e: list[int], num_ctas: int) -> list[tuple[int, int, int]]:
    """(phase, pool block, column) of every ticket of a rank that received these rows."""
    stream = shape.stream(num_ctas)
    walk = advance_walk(start_walk(counts_e, shape.local_experts), counts_e, *stream)
    tiles = []
    while walk.phase != PHASE_DONE:
        for ticket in range(walk.begin, walk.begin + walk.size):
            tile = tile_of(walk, ticket)
            tiles.append((walk.phase, tile.pool, tile.column))
        walk = advance_walk(walk, counts_e, *stream)
    return tiles


@pytest.mark.parametrize("precision", ["bf16", at_night("fp8_block")])
def test_the_command_on_a_cpu(precision, tmp_path, capsys, one_thread):
    path = tmp_path / "trace.json"
    assert main([*SMALL, "--precision", precision, "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "an order, no time" in out and f"{CTAS} CTAs per rank" in out and "error " in out
    reset_bytes = layout_of(case_of(precision=precision).config(3)).reset_bytes
    assert f"reset of {reset_bytes:,} bytes: row metadata within tiles" in out
    written = json.loads(path.read_text())
    facts, events = written["otherData"], written["traceEvents"]
    assert facts["gpu"] == "cpu emulation" and "an order, no time" in facts["time"]
    assert facts["precision"] == precision and facts["num_ranks"] == RANKS

    check_nesting(events)
    found = slices(events)
    assert set(found) == {(rank, cta) for rank in range(RANKS) for cta in range(CTAS)}
    named = {(e["pid"], e["tid"]): e["args"] for e in events if e["name"] == "thread_name"}
    assert named == {(rank, cta): {"name": f"CTA {cta}"} for rank, cta in found}
    assert {e["pid"] for e in events if e["name"] == "process_name"} == set(range(RANKS))
    for events_of_cta in found.values():
        assert [e["name"] for e in events_of_cta if e["name"] in PHASES] == PHASES
    instants = [(e["pid"], e["tid"]) for e in events if e["name"] == "last pull"]
    assert sorted(instants) == sorted(found)

    # Every tile of the schedule is there once, and FC2 of a block comes after all of its FC1.
    case = case_of(precision=precision)
    received = routed_counts(case, [i.topk_idx for i in make_inputs(case)]).sum(dim=0)
    config = case.config(case.tokens)
    layout = layout_of(config)
    for rank, counts in enumerate(received.view(RANKS, -1).tolist()):
        tiles = [
            (e["name"], e["args"]["pool block"], e["args"]["column"], e["ts"], e["ts"] + e["dur"])
            for (pid, _), of_cta in found.items() if pid == rank
            for e in of_cta if e["name"] in ("FC1", "FC2")
        ]  # fmt: skip
        stream = stream_of(LaunchShape(config, layout.kernel, layout), counts, CTAS)
        expected = [(f"FC{phase}", block, column) for phase, block, column in stream]
        assert sorted(tile[:3] for tile in tiles) == sorted(expected) and expected
        for _, block, _, begin, _ in [tile for tile in tiles if tile[0] == "FC2"]:
            before = [tile[4] for tile in tiles if tile[:2] == ("FC1", block)]
            assert max(before) <= begin


# What a GPU leaves behind


@pytest.mark.parametrize("tile", [(PHASE_FC1, 0, 0), (PHASE_FC2, 2**31, 2**20), (1, 123_456, 55)])
def test_the_code_of_a_tile(tile):
    code = wire.encode_tile(*tile)
    assert timeline.decode_tile([5, 6, 7, code]) == TileTimes(*tile, 5, 6, 7)
    assert 0 < code < 2**63


def test_regions_are_decoded():
    marks = rows_of(marks_of(10_000), marks_of(10_500, first_tile=0))
    tiles = torch.zeros(TRACE_CTAS, 6, 4, dtype=torch.int64)
    tiles[0, 0] = torch.tensor([13_600, 15_000, 15_500, wire.encode_tile(PHASE_FC1, 7, 3)])
    tiles[0, 1] = torch.tensor([15_600, 16_000, 18_500, wire.encode_tile(PHASE_FC2, 7, 4)])
    first, second = decode(3, marks, 2, tiles)
    assert (first.rank, first.cta, second.cta) == (3, 0, 1)
    assert first.marks == marks_of(10_000) and "first_tile" not in second.marks
    assert first.tiles == [
        TileTimes(PHASE_FC1, 7, 3, 13_600, 15_000, 15_500),
        TileTimes(PHASE_FC2, 7, 4, 15_600, 16_000, 18_500),
    ]
    assert second.tiles == []
    assert decode(3, marks, 2)[0].tiles == []
    with pytest.raises(AssertionError, match="rank 3, CTA 2 left no mark"):
        decode(3, marks, 3)


def test_events_of_a_gpu():
    tiles = [TileTimes(PHASE_FC1, 7, 3, 13_600, 15_000, 15_500)]
    traces = [
        CtaTrace(0, 0, marks_of(10_000), tiles),
        CtaTrace(0, 1, marks_of(10_500, first_tile=0)),  # no tile for it
        CtaTrace(1, 0, marks_of(12_000)),
    ]
    events = events_of(traces)
    check_nesting(events)
    found = slices(events)
    assert {e["name"]: (e["ts"], e["dur"]) for e in found[0, 0]} == {
        "count": (0, 3), "tiles": (3.5, 16.5), "FC1": (3.6, 1.9), "epilogue": (5, 0.5),
        "barrier": (20, 1), "combine": (21, 1),
    }  # fmt: skip
    assert found[0, 0][2]["args"] == {"pool block": 7, "column": 3}
    assert found[0, 0][1]["args"] == {
        "waited for l1_arrival_count, us": 0.7, "waited for fc1_done_counter, us": 0.3, "tiles": 1,
    }  # fmt: skip
    assert [e["name"] for e in found[0, 1]] == ["count", "barrier", "combine"]
    assert found[1, 0][0]["ts"] == 2
    counters = [(e["pid"], e["ts"], e["args"]) for e in events if e["ph"] == "C"]
    assert counters == [
        (0, 0, {"for l1_arrival_count": 0, "for fc1_done_counter": 0}),
        (0, 20, {"for l1_arrival_count": 0.7, "for fc1_done_counter": 0.3}),
        (0, 20.5, {"for l1_arrival_count": 1.4, "for fc1_done_counter": 0.6}),
        (1, 2, {"for l1_arrival_count": 0, "for fc1_done_counter": 0}),
        (1, 22, {"for l1_arrival_count": 0.7, "for fc1_done_counter": 0.3}),
    ]
    assert timeline.sm_clock_mhz(traces) == pytest.approx(1500)
    assert timeline.sm_clock_mhz([CtaTrace(0, 0, {"start": 1})]) is None


def test_phases_of_a_launch():
    tiles = [
        TileTimes(PHASE_FC1, 7, 3, 13_600, 15_000, 15_500),
        TileTimes(PHASE_FC2, 7, 4, 16_000, 18_000, 19_000),
    ]
    traces = [CtaTrace(0, 0, marks_of(10_000), tiles), CtaTrace(1, 0, marks_of(12_000))]
    assert phases_of(map(slices_of, traces), 1000) == pytest.approx(
        {"launch_us": 24, "count_us": 3, "fc1_us": 0.7, "fc2_us": 1, "epilogue_us": 0.75,
         "wait_us": 24 - 3 - 2.45 - 2, "barrier_us": 1, "combine_us": 1}
    )  # fmt: skip


def test_a_launch_without_a_wait_has_none():
    """Where the phases fill the launch, their sum may be a rounding error above it."""
    borders = [0, 17932, 19256, 19766]
    names = (timeline.COUNT, timeline.BARRIER, timeline.COMBINE)
    slices = [timeline.Slice(*part) for part in zip(names, borders, borders[1:], strict=False)]
    assert phases_of([slices], 1000)["wait_us"] == 0


def test_slices_nest_whatever_the_clocks_said():
    """Warps mark borders of their own accord: a few ns before or after another warp's."""
    tiles = [
        TileTimes(PHASE_FC1, 0, 0, 12_900, 13_700, 13_600),  # before `dispatched`; ends too early
        TileTimes(PHASE_FC1, 0, 1, 13_500, 15_000, 15_600),  # overlaps the one before
        TileTimes(PHASE_FC2, 0, 0, 15_700, 16_000, 30_100),  # after `last_tile`
    ]
    late = CtaTrace(0, 0, marks_of(10_000, last_tile=30_000), tiles)  # after `combined`
    events = events_of([late])
    check_nesting(events)
    assert [s.name for s in slices_of(late)] == [
        "count", "tiles", "FC1", "epilogue", "FC1", "epilogue", "FC2", "epilogue", "barrier",
        "combine",
    ]  # fmt: skip
    only_fc2 = CtaTrace(0, 0, marks_of(10_000, first_tile=0), tiles[2:])
    assert [s.name for s in slices_of(only_fc2)] == ["count", "tiles", "FC2", "epilogue",
                                                     "barrier", "combine"]  # fmt: skip


def test_timers_of_gpus_meet_at_the_barrier():
    traces = [
        CtaTrace(0, 0, marks_of(10_000)), CtaTrace(0, 1, marks_of(9_000)),
        CtaTrace(1, 0, marks_of(7_000_000), [TileTimes(1, 0, 0, 7_004_000, 7_005_000, 7_006_000)]),
    ]  # fmt: skip
    shifts = shifts_of(traces)
    assert shifts == {0: 0, 1: 9_000 - 7_000_000}
    moved = shifted(traces[2], shifts[1])
    assert moved.marks == marks_of(9_000)
    assert moved.tiles == [TileTimes(1, 0, 0, 13_000, 14_000, 15_000)]


class FakeMoE:
    """Leaves marks in a real workspace, later ones in every launch. `clean`: the last launch found
    the region as if nobody had launched before.
    """

    num_sms = 3

    def __init__(self, plan):
        config = plan.case.config(plan.max_tokens)
        self.workspace = Workspace(layout_of(config, select(config, **plan.kernel_options)))
        self.local_ranks, self.launches = list(range(RANKS)), 0

    def __call__(self, x, topk_idx, topk_weights):
        assert all(tensor is not None for tensor in (x, topk_idx, topk_weights))
        self.launches += 1
        regions = [self.workspace.regions(rank)["trace"] for rank in self.local_ranks]
        self.clean = not any(region.any() for region in regions)
        for rank, region in enumerate(regions):
            marks = [marks_of(10_000 * self.launches + rank + cta) for cta in range(self.num_sms)]
            region.copy_(rows_of(*marks))
        return list(x)

    def synchronize(self):
        pass


def plan_on_gpu(monkeypatch, *options: str):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    options = options_of([*SMALL, "--model", "emulated", "--device", "cuda", *options])
    return plan_of(options, kernel_options=trace.TRACED)


def test_the_launch_after_the_warm_up_is_recorded(monkeypatch):
    plan = plan_on_gpu(monkeypatch)
    assert plan.warmup == 3 and plan.kernel_options == {"trace": True}
    moe = FakeMoE(plan)
    traces, outputs = trace.launch(moe, plan, make_inputs(plan.case))
    assert moe.launches == 4 and moe.clean and len(outputs) == RANKS
    assert [(t.rank, t.cta) for t in traces] == [(r, c) for r in range(RANKS) for c in range(3)]
    assert traces[4].marks == marks_of(40_000 + 1 + 1)


def test_rank_0_gets_the_records_of_all(monkeypatch):
    plan = plan_on_gpu(monkeypatch)
    plan = dataclasses.replace(plan, case=dataclasses.replace(plan.case, ranks_per_gpu=1))
    moe, log = FakeMoE(plan), []
    moe.local_ranks = [0]

    def gather(region: torch.Tensor) -> torch.Tensor:
        other = region + 5_000_000 * (region > 1000)  # another GPU, another timer
        return torch.cat([region, other])

    job = SimpleNamespace(gather=gather, align=lambda: log.append(moe.launches), rank=0)
    monkeypatch.setattr(trace, "outputs_of", lambda moe, inputs: moe(*[[0]] * 3))
    traces, _ = trace.launch(moe, plan, make_inputs(plan.case)[:1], job)
    assert log == [3]  # ranks begin the recorded launch together
    assert [(t.rank, t.cta) for t in traces] == [(r, c) for r in range(RANKS) for c in range(3)]
    assert traces[3].marks["dispatched"] == traces[0].marks["dispatched"]
    check_nesting(events_of(traces))


def test_a_traced_launch_has_room_for_marks(monkeypatch):
    plan = plan_on_gpu(monkeypatch)
    bare = dataclasses.asdict(plan.case.config(plan.max_tokens))
    world = bare.pop("num_ranks")
    assert plan.workspace_bytes > megamoe.MegaMoE.workspace_bytes(world=world, **bare)["total"]


# The command line


def test_a_wrong_output_is_told_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trace, "error_of", lambda *arguments: float("inf"))
    path = tmp_path / "trace.json"
    assert main([*SMALL, "--out", str(path)]) == 1
    assert "the output is wrong" in capsys.readouterr().out
    assert json.loads(path.read_text())["otherData"]["error_rel"] == "inf"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LaunchTimeout("rank 1"), "launch failed: rank 1"),
        (RuntimeError("DefaultCPUAllocator: no\nframe"), "out of memory: DefaultCPUAllocator: no"),
    ],
)
def test_a_launch_that_fails_is_one_line(error, message, tmp_path, monkeypatch, capsys):
    def fail(plan, job):
        raise error

    monkeypatch.setattr(trace, "Runner", fail)
    assert main([*SMALL, "--out", str(tmp_path / "trace.json")]) == 1
    assert capsys.readouterr().err == f"{message}\n"


def test_a_row_of_phases_is_appended(tmp_path, monkeypatch):
    plan = plan_on_gpu(monkeypatch)
    monkeypatch.setattr(trace, "environment", lambda device: environment("cpu"))
    traces, _ = trace.launch(FakeMoE(plan), plan, make_inputs(plan.case))
    file = ResultsFile(tmp_path / "phases.csv", PhaseRow)
    for _ in range(2):
        trace.write(plan, traces, None, tmp_path / "trace.json", file)
    frame = load(file.path, kind=PhaseRow)
    assert frame.tokens.tolist() == [3, 3] and frame.num_ranks.tolist() == [RANKS] * 2
    assert frame.count_us.tolist() == [3, 3]
    facts = json.loads((tmp_path / "trace.json").read_text())["otherData"]
    assert facts["hidden"] == frame.hidden[0] and facts["routing"] == "balanced"


def test_what_to_build_is_listed_without_a_gpu(tmp_path):
    path = tmp_path / "configs.json"
    options = ["--device", "cuda", "--model", "pro", "--ranks", "4", "--tokens", "8192"]
    assert main(["trace", *options, "--list-configs", str(path)]) == 0
    ((config, kernel),) = compile._configs_of(argparse.Namespace(list=path))
    assert config == Case(MODELS["pro"], 4, 8192).config(8192)
    assert kernel.trace


def test_a_kernel_that_cannot_be_built_is_not_listed(capsys, tmp_path):
    path = tmp_path / "configs.json"
    assert "num_experts=2048 is too large" in error_line(
        ["trace", "--num-experts", "2048", "--ranks", "1", "--list-configs", str(path)], capsys
    )
    assert not path.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "1,2"], "--tokens 1,2: one launch has one of them"),
        (["--precision", "bf16,fp8_block"], "--precision bf16,fp8_block: one launch"),
        (["--out", "/"], "--out / cannot be written"),
        (["--out", "rows.csv"], "--out rows.csv would overwrite results"),
        (["--list-configs", "rows.csv"], "--list-configs rows.csv would overwrite results"),
        (["--out", "/nowhere/trace.json"], "cannot be written"),
        (["--list-configs", "/nowhere/a.json"], "--list-configs /nowhere/a.json cannot be"),
        (["--device", "cuda", "--phases", "/dev/null/a.csv"], "/dev/null/a.csv cannot be written"),
        (["--phases", "a.csv"], "--phases a.csv: a CPU has an order of steps, no times"),
        (["--baseline", "torch_bf16"], "unknown argument --baseline"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_line(["trace", *argv], capsys)
