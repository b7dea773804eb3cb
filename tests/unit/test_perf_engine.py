"""`python -m perf engine`: what it lists, refuses, times and keeps."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from perf.__main__ import main
from perf.commands import engine
from perf.commands.engine import EngineRow
from perf.recording.files import load


def error_line(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_kernels_that_it_needs(tmp_path):
    path = tmp_path / "configs.json"
    given = ["--device", "cuda", "--precision", "bf16,fp8_mxfp4", "--list-configs", str(path)]
    assert main(["engine", *given]) == 0
    entries = json.loads(path.read_text())
    assert [entry.pop("precision") for entry in entries] == ["bf16", "fp8_mxfp4"]
    sizes = dict(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
    sizes |= dict(max_tokens_per_rank=4096, num_ranks=1, num_shared_experts=0)
    assert entries == [sizes] * 2
    given = ["--device", "cuda", "--max-tokens", "64", "--list-configs", str(path)]
    assert main(["engine", *given]) == 0
    assert json.loads(path.read_text())[0]["max_tokens_per_rank"] == 64


def test_without_transformers_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    monkeypatch.delitem(sys.modules, "megamoe.integrations.transformers", raising=False)
    monkeypatch.delattr("megamoe.integrations.transformers", raising=False)
    assert "pip install 'megamoe[transformers]'" in error_line(["engine"], capsys)


def test_the_distance_of_logits():
    own = torch.ones(2, 2, 8)
    rows = own.clone()
    rows[0, 0] = -3.0  # one token of four went elsewhere
    assert engine.difference(rows, own) == 0
    assert engine.difference(own * 1.5, own) == 0.5
    assert engine.difference(own * torch.nan, own) == float("inf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert "no CUDA device is available" in error_line(["engine", "--device", "cuda"], capsys)


@pytest.mark.parametrize("most,status", [(engine.MAX_DIFFERENCE, 0), (1e-6, 1)])
def test_rows_of_a_small_model(most, status, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[test]'")
    monkeypatch.setattr(engine, "MAX_DIFFERENCE", most)
    path = tmp_path / "rows.csv"
    assert main(["engine", "--csv", str(path)]) == status
    assert "not GPU figures" in capsys.readouterr().out
    rows = load(path, kind=EngineRow)
    assert list(rows.impl) == ["eager"] * 2 + ["grouped_mm"] * 2 + ["megamoe"] * 2
    assert list(rows.length) == [6, 1] * 3 and set(rows["mode"]) == {"eager"}
    assert rows.differs[:2].isna().all() and rows.differs[4:].between(1e-4, 0.2).all()
    assert rows.engine[0].startswith("transformers ") and set(rows.config[4:]) == {"max_tokens=12"}
