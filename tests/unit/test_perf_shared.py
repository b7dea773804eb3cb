"""Shared experts in what is measured: weights, work, rows, and the two layers that engines have."""

from __future__ import annotations

import csv
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import megamoe
from megamoe import compile
from megamoe.config import MoEConfig
from perf.__main__ import main, options_of
from perf.against.roofline import work_of
from perf.commands import publish
from perf.commands.compare import measurements, pairs_of
from perf.drawing.curves import groups_of
from perf.recording.columns import KEY
from perf.recording.files import ResultsFile, load
from perf.running import checks, teammate
from perf.running.jobs import ALONE
from perf.running.messages import Orders
from perf.running.plan import plan_of
from perf.running.two_streams import TwoStreams, plans_for, split_sms
from perf.workload.cases import Case, Model
from perf.workload.stored import chosen_weights, make_layer_weights
from tests.unit.layers import E, H, I, K, T, W
from tests.unit.perf_helpers import error_line, pretend_gpu
from tests.unit.test_perf_results import row_of
from tests.unit.test_shared_experts import S

#: The layer of `test_shared_experts`, whose kernels it shares.
SWEEP = [
    "sweep", "--hidden-size", str(H), "--intermediate-size", str(I), "--num-experts", str(E),
    "--top-k", str(K), "--ranks", str(W), "--max-tokens", str(T), "--shared-experts", str(S),
    "--tokens", "5,12",
]  # fmt: skip
PRO = [
    "--device", "cuda", "--model", "pro", "--num-experts", "192", "--precision", "fp8_block",
    "--shared-experts", "1",
]  # fmt: skip


def case_of(shared: int = S, routed: int = 4, **changes) -> Case:
    model = Model("small", H, I, num_experts=routed, top_k=2, num_shared_experts=shared)
    return dataclasses.replace(Case(model, num_ranks=2, tokens=3), **changes)


def test_a_sweep_with_shared_experts(capsys, tmp_path, monkeypatch, one_thread):
    """Whatever it loads is listed, and its rows are right."""
    argv = [*SWEEP, "--two-streams"]
    assert main([*argv, "--list-configs", str(tmp_path / "configs.json")]) == 0
    listed = json.loads((tmp_path / "configs.json").read_text())
    loaded, load_kernel = [], compile.load

    def noted(config, *arguments, **options):
        loaded.append(dataclasses.asdict(config))
        return load_kernel(config, *arguments, **options)

    monkeypatch.setattr(compile, "load", noted)
    path = tmp_path / "rows.csv"
    argv += ["--routing", "masked", "--baseline", "torch_bf16"]
    assert main([*argv, "--csv", str(path)]) == 0
    assert loaded == listed and len(listed) == 3
    assert [(c["num_experts"], c["num_ranks"], c["num_shared_experts"]) for c in listed] == [
        (E, W, S), (E, W, 0), (S, 1, 0),
    ]  # fmt: skip
    rows = load(path)
    assert rows.impl.tolist() == ["megamoe", "two_streams", "torch_bf16"] * 2
    assert (rows.num_shared_experts == S).all() and (rows.num_experts == E).all()
    assert (rows.error_rel < 8e-3).all()
    assert rows.config[1] == "routed_sms=2 shared_sms=2"
    assert f"K={K} S={S})" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_shared_weights_are_those_of_the_ids_behind_the_routed_ones(precision):
    case = case_of(precision=precision)
    assert case.experts_of([1]) == [2, 3, 4, 5]
    held = case.experts_of(range(2))
    assert held == [0, 1, 4, 5, 2, 3, 4, 5]
    weights = make_layer_weights(case, experts=held)
    plain = make_layer_weights(case_of(0, precision=precision))
    more = make_layer_weights(case_of(0, routed=4 + S, precision=precision))
    for name, mine in zip(weights._fields, weights, strict=True):
        if mine is None:
            continue
        mine = mine.float()
        assert torch.equal(mine[[0, 1, 4, 5]], getattr(plain, name).float())
        assert torch.equal(mine[2:4], mine[6:8]), "equal on every rank"
        assert torch.equal(mine[2:4], getattr(more, name)[4:].float())
        assert not torch.equal(mine[2], mine[3])
    chosen = chosen_weights(weights, held, case.model.experts)
    for mine, whole in zip(chosen.present, make_layer_weights(case).present, strict=True):
        assert torch.equal(mine.float(), whole.float())
    side_by_side = chosen_weights(weights, held, case.model.shared_experts)
    assert side_by_side.w13.data_ptr() == weights.w13[2].data_ptr()


@pytest.mark.parametrize("ranks_per_gpu", [1, 2])
def test_work_of_shared_experts(ranks_per_gpu):
    """Three tokens on rank 0, none on rank 1: six more rows, and two experts on rank 0."""
    plain = case_of(0, ranks_per_gpu=ranks_per_gpu)
    ids = [torch.tensor([[0, 2], [1, -1], [-1, -1]]), torch.zeros(0, 2, dtype=torch.int64)]
    work, without = (work_of(case, ids) for case in (case_of(ranks_per_gpu=ranks_per_gpu), plain))
    assert work.nvlink_bytes == without.nvlink_bytes
    more = [a - b for a, b in zip(work.flops, without.flops, strict=True)]
    assert more == [3 * S * 6 * H * I, 0][: 2 // ranks_per_gpu]
    more = [a - b for a, b in zip(work.hbm_bytes, without.hbm_bytes, strict=True)]
    assert more == [S * 3 * H * I * 2, 0][: 2 // ranks_per_gpu]
    both = [ids[0], torch.tensor([[3, 3]])]
    work, without = (work_of(case, both) for case in (case_of(ranks_per_gpu=ranks_per_gpu), plain))
    assert sum(work.flops) - sum(without.flops) == 4 * S * 6 * H * I
    assert sum(work.hbm_bytes) - sum(without.hbm_bytes) == 2 * S * 3 * H * I * 2, "of every rank"


def test_rows_from_before_have_no_shared_experts(tmp_path):
    """They are compared with rows of today without any, and drawn apart from others."""
    new, old = tmp_path / "new.csv", tmp_path / "old.csv"
    for shared in (0, 1):
        ResultsFile(new).append(row_of(num_shared_experts=shared, us_min=2.0 + shared))
    with new.open() as file:
        header, first, _ = csv.reader(file)
    place = header.index("num_shared_experts")
    lines = [cells[:place] + cells[place + 1 :] for cells in (header, first)]
    old.write_text("".join(",".join(f'"{cell}"' for cell in cells) + "\n" for cells in lines))
    assert load(old).num_shared_experts.tolist() == [0]
    before, after = (measurements(path)[0] for path in (old, new))
    assert len(after) == 2
    [pair] = pairs_of(before, after)
    assert pair.key[KEY.index("num_shared_experts")] == 0 and pair.after.us_min == 2.0
    groups = groups_of(load(old, new))
    assert [group.model.num_shared_experts for group in groups] == [0, 1]
    assert groups[1].title.startswith("tiny 1024/512/32/4+1,")
    assert len({group.slug for group in groups}) == 2
    bad = new.read_text().replace("32,4,1,8", "32,4,-1,8")
    new.write_text(bad)
    with pytest.raises(ValueError, match="num_shared_experts -1 is no count"):
        load(new)


def test_sms_are_split_by_work():
    assert split_sms(132, 1, top_k=6, shared=1) == (113, 19)
    assert split_sms(132, 1, top_k=8, shared=1, asked=4) == (128, 4)
    assert split_sms(20, 1, top_k=8, shared=1) == (12, 8), "at least 8"
    assert split_sms(132, 4, top_k=6, shared=1) == (28, 19), "no more than there are"
    with pytest.raises(ValueError, match=r"131 SMs .* leave none of 132 for each of 2 rank"):
        split_sms(132, 2, top_k=6, shared=1, asked=131)


def test_both_layers_fit_a_gpu(monkeypatch):
    pretend_gpu(monkeypatch)
    gpu = SimpleNamespace(multi_processor_count=132, total_memory=2**50, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: gpu)
    for extra, expected in {
        "": (113, 19), "--num-sms 100": (86, 14), "--shared-sms 32": (100, 32),
        "--ranks 2": (56, 19),
    }.items():  # fmt: skip
        plan = plan_of(options_of(["sweep", *PRO, "--two-streams", *extra.split()]))
        routed, shared = plans_for(plan)
        assert (routed.num_sms, shared.num_sms) == expected
        assert shared.case.num_ranks == 1 and routed.case.num_ranks == plan.case.num_ranks
    argv = ["sweep", *PRO, "--two-streams", "--shared-sms", "132"]
    with pytest.raises(ValueError, match="--shared-sms"):
        checks.check_here([plan_of(options_of(argv))])


def test_the_layers_run_side_by_side_and_are_added_behind_both():
    log: list[str] = []

    class FakeStreams:
        def fork(self, current):
            log.append(f"fork {current}")
            for number in range(2):
                log.append(f"stream {number}")
                yield number, None

        def join(self, current):
            log.append(f"join {current}")

    def call(name):
        return lambda: log.append(name) or name

    layers = SimpleNamespace(streams=FakeStreams(), routed=SimpleNamespace(device="cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: "current")
        found = TwoStreams.side_by_side(layers, call("routed"), call("shared"))
    assert found == ["routed", "shared"]
    ran = ["fork current", "stream 0", "routed", "stream 1", "shared", "join current"]
    assert log == ran


def test_kernels_of_the_published_step():
    [whole, routed, shared] = publish.configs_of([publish.STEP_OF["pro_shared_ep2_fp8"]])
    sizes = {"hidden_size": 7168, "intermediate_size": 3072, "max_tokens_per_rank": 8192}
    common = sizes | {"precision": "fp8_block"}
    assert whole == common | dict(num_experts=192, top_k=6, num_ranks=2, num_shared_experts=1)
    assert routed == whole | dict(num_shared_experts=0)
    assert shared == common | dict(num_experts=1, top_k=1, num_ranks=1, num_shared_experts=0)
    for fields in (whole, routed, shared):
        MoEConfig(**fields)


def test_every_command_that_launches_passes_them_on():
    for command in ("sweep", "trace", "ablation", "zeroing"):
        case = plan_of(options_of([command, *SWEEP[1:]])).case
        assert case.model.num_shared_experts == case.config(T).num_shared_experts == S
        assert case.columns["num_shared_experts"] == S
    known = plan_of(options_of(["sweep", "--shared-experts", "1"])).case.model
    assert known.name == "emulated"


def test_a_contender_of_a_duel_has_them(monkeypatch):
    made = []

    class FakeMoE:
        def __init__(self, **arguments):
            self.arguments = arguments
            made.append(self)

        def load_weights(self, *weights):
            self.weights = weights

        def __call__(self, xs, ids, factors):
            return xs

        def synchronize(self):
            pass

    monkeypatch.setattr(megamoe, "MegaMoE", FakeMoE)
    orders = Orders((), (3,), 3, "cpu", "eager", reps=1, warmup=0, batch_us=0)
    for shared in (0, S):
        teammate.Held(orders, case_of(shared), ALONE, "cpu")
    plain, layer = made
    assert "num_shared_experts" not in plain.arguments, "older sources have no such argument"
    assert layer.arguments["num_shared_experts"] == S
    expected = make_layer_weights(case_of(), experts=case_of().experts_of(range(2)))
    assert torch.equal(layer.weights[0], expected.w13)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep", "--two-streams"], "--two-streams needs --shared-experts 1 or more"),
        (
            ["sweep", "--shared-experts", "1", "--shared-sms", "9"],
            "--shared-sms 9 needs",
        ),
        (["sweep", "--shared-experts", "17"], "--shared-experts: 17 must be in 0..16"),
        (["sweep", "--shared-experts", "1", "--baseline", "deepep_deepgemm"], "--shared-experts 1"),
        (["accuracy", "--shared-experts", "1"], "unknown argument --shared-experts"),
        (["trace", "--two-streams"], "unknown argument --two-streams"),
    ],
)
def test_what_is_refused(argv, message, capsys):
    assert message in error_line(argv, capsys)
