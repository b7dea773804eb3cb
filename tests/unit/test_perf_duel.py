"""Contenders in turns: who they are, who goes when, how far apart they are."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
from contextlib import contextmanager
from math import nan
from multiprocessing.connection import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from perf.__main__ import main, options_of
from perf.commands import duel
from perf.recording import environment
from perf.recording.columns import DuelRow
from perf.recording.environment import REPOSITORY, version_of
from perf.recording.files import load
from perf.running import teammate, teams
from perf.running.messages import Batch, Failed, Orders, Ready
from perf.running.nvml import Load
from perf.running.pairing import FASTER, OPEN, SAME, SLOWER, fought, interval, ratio_of, turns
from perf.running.teammate import repetitions
from perf.running.teams import Team, TeamFailed, entry_of, environments, link_packages, teams_of
from perf.workload.cases import MODELS, Case
from tests.unit.perf_helpers import error_line, pretend_gpu

CASE = Case(MODELS["emulated"], num_ranks=2, tokens=4)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Two directories of kernels and another tree."""
    monkeypatch.chdir(tmp_path)
    for name in ("kernels", "more@home", "old/megamoe"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "old" / "megamoe" / "__init__.py").touch()
    return tmp_path


def test_what_a_contender_may_be(place):
    old, kernels = place / "old", place / "kernels"
    for text, *expected in (
        ("kernels", REPOSITORY, kernels, None),
        ("kernels@fp8_block", REPOSITORY, kernels, "fp8_block"),
        ("@fp8_mxfp4", REPOSITORY, None, "fp8_mxfp4"),
        ("old:kernels", old, kernels, None),
        ("old:kernels@bf16", old, kernels, "bf16"),
        ("old:", old, None, None),
        (f"{old}:@bf16", old, None, "bf16"),
        (f"{place}/more@home/", REPOSITORY, place / "more@home", None),
    ):
        entry = entry_of(text)
        assert [entry.tree, entry.kernel_dir, entry.precision] == expected, text
        assert entry.text == text and entry.own == (expected[0] == REPOSITORY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernels@fp8_blok", "'fp8_blok' is no recipe; did you mean fp8_block"),
        ("", "is no [TREE:][KERNEL_DIR][@RECIPE]"),
        (":kernels", "is no [TREE:][KERNEL_DIR][@RECIPE]"),
        ("kernels:", "has no package megamoe"),
        ("old:nothing", "nothing is no directory"),
    ],
)
def test_what_is_no_contender(text, message, place):
    with pytest.raises(ValueError) as error:
        entry_of(text)
    assert message in str(error.value)


def test_contenders_with_the_same_sources_and_kernels_are_a_team(place):
    texts = ["kernels@bf16", "old:kernels", "@bf16", "kernels@fp8_block", "old:kernels@bf16"]
    assert teams_of([entry_of(text) for text in texts]) == [[0, 3], [1, 4], [2]]


def test_turns_go_back_and_forth_through_all_cases():
    assert [turns(3, number) for number in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    log: list[tuple[int, int]] = []

    def batch(case: int, contender: int) -> int:
        log.append((case, contender))
        return len(log)

    found = fought(2, 2, 3, batch)
    there, back = [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 1), (0, 0), (1, 1), (1, 0)]
    assert log == [*there, *back, *there]
    assert found == [[[1, 6, 9], [2, 5, 10]], [[3, 8, 11], [4, 7, 12]]]


@pytest.mark.parametrize(
    ("count", "left_out"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (20, 5)]
)
def test_an_interval_is_that_of_the_sign_test(count, left_out):
    values = [float(value) for value in range(count)][::-1]
    assert interval(values) == (left_out, count - 1 - left_out)


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    """The clock drops from round to round; each pair sees the same clock."""
    first = [100.0, 110.0, 125.0, 150.0, 170.0, 200.0]
    ratio = ratio_of([1.02 * us for us in first], first)
    assert ratio.value == pytest.approx(1.02) and ratio.high - ratio.low < 1e-9
    assert ratio.verdict == SLOWER
    skewed = ratio_of([100.0, 110.0, 5.0], [100.0, 100.0, 10.0])
    assert (skewed.value, skewed.low, skewed.high) == (1.0, 0.5, 1.1)


def test_a_verdict_needs_an_interval_without_1_and_enough_pairs():
    ones = [1.0] * 6
    assert ratio_of([1.01, 1.02, 1.01, 1.02, 1.01, 1.001], ones).verdict == SLOWER
    assert ratio_of([1.01, 1.02, 1.01, 1.02, 1.01, 0.999], ones).verdict == SAME
    assert ratio_of([0.9] * 6, ones).verdict == FASTER
    assert ratio_of([0.9] * 5 + [1.001], ones).verdict == SAME
    assert ratio_of([0.9] * 5, ones[:5]).verdict == OPEN


@pytest.mark.parametrize(
    ("us", "number"), [(10_000.0, 30), (5000.0, 50), (900.0, 278), (10.0, 300), (9e9, 30)]
)
def test_a_batch_lasts_long_enough_for_a_sensor_within_bounds(us, number):
    assert repetitions(30, us, 250e3) == number
    assert repetitions(1, us, 0) == 1


def test_a_team_has_its_own_sources_and_our_perf(place, monkeypatch):
    (place / "old" / "perf").mkdir()
    (place / "old" / "perf" / "__init__.py").touch()
    (place / "links").mkdir()
    link_packages(place / "old", place / "links")
    found = {path.name: path.resolve() for path in (place / "links").iterdir()}
    assert found == {"megamoe": place / "old" / "megamoe", "perf": REPOSITORY / "perf"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "7")
    [alone] = environments(place, 1)
    assert alone["PYTHONPATH"] == str(place) and "RANK" not in alone
    both = environments(place, 2)
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in both] == [("0", "0"), ("1", "1")]
    assert both[0]["MASTER_PORT"] == both[1]["MASTER_PORT"] and both[0]["WORLD_SIZE"] == "2"


def team_of(*answers) -> Team:
    """A team whose processes are threads: each answers everything with this, or ends."""
    team = object.__new__(Team)
    team.name, team.lines, team.processes = "old:", [], []

    def live(line, answer):
        while line.recv() is not None:
            if answer is None:
                break
            if answer != "silence":
                line.send(answer)
        line.close()

    for answer in answers:
        ours, theirs = Pipe()
        threading.Thread(target=live, args=(theirs, answer), daemon=True).start()
        team.lines.append(ours)
        process = SimpleNamespace(kill=lambda: None, wait=lambda seconds=None: 0)
        team.processes.append(process)
    return team


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, "old:: the process of rank 1 ended"),
        (Failed("KernelNotFound: no.so"), "old:, rank 1: KernelNotFound: no.so"),
        ("silence", "old:: no answer in 0 s"),
    ],
)
@pytest.mark.parametrize("first", [Ready([]), "silence"])
def test_a_rank_that_fails_ends_the_duel_whatever_the_others_do(
    first, second, message, monkeypatch
):
    monkeypatch.setattr(teams, "READY_S", 0.4 if second == "silence" else 60)
    team = team_of(first, second)
    with pytest.raises(TeamFailed) as error:
        team.prepare(ORDERS)
    assert str(error.value) == message
    team.end(kindly=True)


def test_the_first_rank_speaks_for_all():
    first, second = Batch(3.0, Load()), Batch(4.0, Load())
    team = team_of(first, second)
    assert team.batch(0, 0) == first
    team.end(kindly=True)


class FakeMoE:
    """Doubles its tokens."""

    def __init__(self, **arguments):
        assert arguments["world"] == 2 and arguments["max_tokens_per_rank"] == 8
        assert "num_sms" not in arguments and arguments["kernel_dir"] == "kernels"

    def load_weights(self, w13, w2, *scales):
        assert w13.shape[0] == w2.shape[0] == 32 and len(scales) in (0, 2)

    def synchronize(self):
        pass

    def __call__(self, x, topk_idx, topk_weights):
        return [2 * one for one in x]


ORDERS = Orders(
    cases=(CASE, dataclasses.replace(CASE, precision="fp8_block")),
    tokens=(3, 8),
    max_tokens=8,
    device="cpu",
    mode="eager",
    reps=2,
    warmup=0,
    batch_us=0,
    kernel_dir="kernels",
)


def test_a_process_holds_all_its_contenders_ready(monkeypatch):
    monkeypatch.setattr(teammate.megamoe, "MegaMoE", FakeMoE)
    monkeypatch.setattr(
        teammate.megamoe,
        "quantize_weights",
        lambda w13, w2, precision: (w13, w2, w13[:, 0], w2[:, 0]),
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = Pipe()
    for message in (ORDERS, (1, 0), (0, 1), None):
        ours.send(message)
    teammate.serve(theirs)
    ready = ours.recv()
    assert [[rows.shape for rows in of] for of in ready.outputs] == [[(3, 256), (8, 256)]] * 2
    assert ready.outputs[0][0].dtype == numpy.float32
    for _ in range(2):
        assert ours.recv().us_median > 0
    assert not ours.poll()


def test_a_process_says_what_went_wrong(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(teammate, "Held", fail)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    ours, theirs = Pipe()
    ours.send(ORDERS)
    teammate.main([str(os.dup(theirs.fileno()))])
    assert ours.recv() == Failed("RuntimeError: no")


class FakeTeam:
    """At 1400 MHz; members take 100 us and `factor` times as many."""

    factor, rows = 1.1, 1.0

    def __init__(self, name: str):
        self.name = name

    def prepare(self, orders: Orders) -> Ready:
        self.orders = orders
        outputs = [numpy.full((4, 8), 1.0, numpy.float32)]
        outputs += [numpy.full((4, 8), self.rows, numpy.float32) for _ in orders.cases[1:]]
        return Ready([[one] * len(orders.tokens) for one in outputs])

    def batch(self, member: int, tokens: int) -> Batch:
        us = 100.0 * (tokens + 1) * (self.factor if member else 1.0)
        return Batch(us, Load(1400.0, None if member else 600.0, None))


@pytest.fixture
def fake_teams(monkeypatch):
    @contextmanager
    def started(entries, gpus):
        yield [FakeTeam("team") for _ in teams_of(entries)]

    monkeypatch.setattr(duel, "started", started)


DUEL = ["duel", "@fp8_block", "@fp8_mxfp4", "--tokens", "4,8", "--rounds", "6"]


def test_a_duel_is_printed_and_kept(fake_teams, tmp_path, capsys):
    path = tmp_path / "duel.csv"
    assert main([*DUEL, "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[1].startswith("A: @fp8_block, fp8_block, commit ")
    assert "4 B 110.0 1.1000 1.1000..1.1000 slower 1400 - - 0.0e+00" in lines
    assert "8 A 200.0 1.0000 1.0000..1.0000 same 1400 600 - 0.0e+00" in lines
    frame = load(path, kind=DuelRow)
    assert frame.contender.tolist() == ["@fp8_block", "@fp8_mxfp4"] * 2
    assert frame.tokens.tolist() == [4, 4, 8, 8] and set(frame.against) == {"@fp8_block"}
    assert frame.precision.tolist() == ["fp8_block", "fp8_mxfp4"] * 2
    assert frame.ratio_high[1] == pytest.approx(1.1) and frame.power_w[0] == 600


@pytest.mark.parametrize(
    ("recipe", "rows", "status"),
    [("fp8_block", 1.2, 1), ("fp8_mxfp4", 1.2, 0), ("fp8_mxfp4", nan, 1), ("fp8_block", 1.01, 0)],
)
def test_an_output_that_differs_is_wrong_where_the_recipe_is_the_same(
    recipe, rows, status, fake_teams, monkeypatch, capsys
):
    monkeypatch.setattr(FakeTeam, "rows", rows)
    assert main(["duel", "@fp8_block", f"@{recipe}", "--tokens", "4", "--rounds", "1"]) == status
    assert ("is wrong at 4 tokens" in capsys.readouterr().err) == bool(status)


def test_a_contender_that_fails_ends_in_a_line(fake_teams, monkeypatch, capsys):
    def fail(self, member, tokens):
        raise TeamFailed("team: no answer in 120 s")

    monkeypatch.setattr(FakeTeam, "batch", fail)
    assert main(DUEL) == 1
    assert "team: no answer in 120 s\n" in capsys.readouterr().err


def test_orders_follow_the_teams(place):
    texts = ["kernels@bf16", "old:@bf16", "kernels", "@bf16"]
    options = options_of(["duel", *texts, "--kernel-dir", "more@home", "--tokens", "2,6"])
    options = duel.with_kernels(options)
    cases, tokens, max_tokens = duel.cases_of(options)
    orders = duel.orders_of(options, cases, tokens, max_tokens)
    found = [(tuple(c.precision for c in one.cases), one.kernel_dir) for one in orders]
    assert found == [
        (("bf16", "fp8_block"), str(place / "kernels")),
        (("bf16",), None),
        (("bf16",), str(place / "more@home")),
    ]
    assert {(one.tokens, one.max_tokens) for one in orders} == {((2, 6), 6)}


def test_kernels_of_a_duel_are_listed_once_per_recipe(place):
    path = place / "configs.json"
    argv = ["duel", "@fp8_block", *DUEL[1:], "--gpus", "2", "--list-configs", str(path)]
    assert main(argv) == 0
    found = json.loads(path.read_text())
    assert [one["precision"] for one in found] == ["fp8_block", "fp8_mxfp4"]
    assert all(one["num_ranks"] == 2 and one["max_tokens_per_rank"] == 8 for one in found)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["@bf16"], "a duel needs two contenders"),
        (["@bf16", "@bf16", "--gpus", "2"], "--gpus needs --device cuda"),
        (["@bf16", "@bf16", "--precision", "bf16,fp8_block"], "--precision: name one"),
        (["@bf16", "@fp8"], "'fp8' is no recipe"),
    ],
)
def test_what_cannot_be_a_duel(argv, message, capsys):
    assert message in error_line(["duel", *argv], capsys)


def test_a_duel_starts_its_processes_itself(monkeypatch, capsys):
    pretend_gpu(monkeypatch, count=2)
    argv = ["duel", "@bf16", "@bf16", "--device", "cuda", "--gpus", "4"]
    assert "--gpus 4: torch sees 2 CUDA device(s)" in error_line(argv, capsys)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "not torchrun" in error_line(argv, capsys)


def test_the_mean_of_loads_leaves_out_what_is_not_known():
    loads = [Load(1400.0, None, None), Load(1200.0, 600.0, None)]
    assert duel.mean_of(loads) == Load(1300.0, 600.0, None)


def test_another_tree_has_its_own_commit(place, monkeypatch):
    """A folder within a checkout is none."""
    monkeypatch.setenv("MEGAMOE_COMMIT", "abc-dirty")
    assert version_of(REPOSITORY) == ("abc", 1)
    assert version_of(place / "old") == ("unknown", None)

    def git(*words, where=place):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *who, *words], cwd=where, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert version_of(place / "old") == ("unknown", None)
    assert version_of(place) == (git("rev-parse", "HEAD"), 0)
    assert environment.source_version() == ("abc", 1)


FAKE_TREE = {
    "perf/__init__.py": "raise RuntimeError('the perf of another tree')",
    "megamoe/config.py": "class MoEConfig: pass",
    "megamoe/precision.py": "FP8_BLOCK = 128\nclass Precision: pass\ndef precision_of(name): pass",
    "megamoe/__init__.py": """
import time
class MegaMoE:
    def __init__(self, **arguments): pass
    def load_weights(self, *weights): pass
    def synchronize(self): pass
    def __call__(self, x, topk_idx, topk_weights):
        time.sleep(0.002)
        return x
""",
}


def test_another_tree_in_a_process_of_its_own(tmp_path, capsys):
    """The whole way, with a layer that only waits."""
    for path, text in FAKE_TREE.items():
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    argv = [f"{tmp_path}:@bf16"] * 2
    assert main(["duel", *argv, "--tokens", "2", "--rounds", "6", "--ranks", "1"]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert [first[1], second[1], first[-1], second[-1]] == ["A", "B", "0.0e+00", "0.0e+00"]
    for line in (first, second):
        assert float(line[2].replace(",", "")) > 2000
