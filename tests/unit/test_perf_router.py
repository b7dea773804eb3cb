"""The command `router`: the operations that it compares with, what it calls wrong, its options."""

from __future__ import annotations

import json

import pytest
import torch

from megamoe import router_reference
from megamoe.router_config import RouterConfig
from perf.__main__ import main
from perf.against.routers import torch_route
from perf.commands import router
from perf.commands.router import MAX_ERROR, check, decided, is_wrong
from perf.recording.files import ResultsFile, load
from perf.workload.parts import MEGAMOE
from perf.workload.routers import ROUTERS, inputs_of
from tests.unit.perf_helpers import error_line

CPU = torch.device("cpu")


def routed(case, inputs):
    return router_reference.route(
        case.config, inputs.logits, correction_bias=inputs.correction_bias,
        routed_scaling_factor=case.factor,
    )  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_the_operations_are_the_definition(name):
    case = ROUTERS[name]
    inputs = inputs_of(case, 300, CPU)
    got = torch_route(case.config, inputs.logits, inputs.correction_bias, case.factor)
    assert decided(case, inputs).float().mean() > 0.99
    for one in (got, routed(case, inputs)):
        wrong, error = check(case, inputs, one)
        assert wrong == 0 and error < MAX_ERROR


@pytest.mark.parametrize("name", ROUTERS)
def test_what_is_wrong(name):
    case = ROUTERS[name]
    inputs = inputs_of(case, 50, CPU)
    idx, weights = routed(case, inputs)
    other = idx.clone()
    other[3, 0] = next(e for e in range(case.config.num_experts) if e not in idx[3])
    assert check(case, inputs, (other, weights))[0] == 1
    assert check(case, inputs, (idx.flip(1), weights.flip(1))) == check(
        case, inputs, (idx, weights)
    )
    weights[5, 1] *= 1.01
    assert check(case, inputs, (idx, weights))[1] == pytest.approx(0.01, rel=1e-3)


def row(**changes) -> router.RouterRow:
    fields = dict(
        date="2027-01-01T00:00:00+00:00", commit="0123456", dirty=0, gpu="NVIDIA H200",
        driver="580.10", torch="2.11.0", dsl="aot", model="v3", num_experts=256, top_k=8,
        score="sigmoid", num_groups=8, topk_groups=4, logits="float32", tokens=8, mode="graph",
        impl=MEGAMOE, us_min=1.0, us_median=2.0, us_p95=3.0, wrong=0, error_rel=1e-7,
    )  # fmt: skip
    return router.RouterRow(**{**fields, **changes})


def test_only_the_kernel_is_judged():
    assert not is_wrong(row())
    assert is_wrong(row(wrong=1)) and is_wrong(row(error_rel=1e-3))
    assert is_wrong(row(error_rel=float("nan")))
    assert not is_wrong(row(impl=router.TORCH, wrong=1))


def test_rows_are_kept_and_printed(monkeypatch, tmp_path, capsys):
    rows = [row(), row(impl=router.TORCH, us_median=60.0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(router, "measured", lambda options, device: iter(rows))
    path = tmp_path / "rows.csv"
    assert main(["router", "--csv", str(path), "--tokens", "8"]) == 0
    assert load(path, kind=router.RouterRow).us_median.tolist() == [2.0, 60.0]
    assert "60.00" in capsys.readouterr().out
    rows[0] = row(wrong=2)
    assert main(["router"]) == 1
    ResultsFile(path, router.RouterRow)


def test_kernels_to_build(tmp_path):
    path = tmp_path / "configs.json"
    assert main(["router", "--list-configs", str(path)]) == 0
    entries = json.loads(path.read_text())
    assert [RouterConfig(**entry["router"]) for entry in entries] == [
        case.config for case in ROUTERS.values()
    ]


def test_what_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "on a GPU" in error_line(["router"], capsys)
    assert "did you mean v3?" in error_line(["router", "--model", "v33"], capsys)
