"""Ceilings: what a probe counts, what is stored, and the roofline that is drawn from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from perf.__main__ import main, options_of
from perf.against.ceilings import CeilingRow, ceilings_of, load
from perf.against.roofline import H200, Ceilings, Work, roofline_of
from perf.commands.ceilings import keep, measured
from perf.recording.files import ResultsFile
from perf.running import probes, together
from perf.running.listing import heading
from perf.running.plan import plan_of
from perf.running.probes import GBPS, GEMM, TFLOPS, US, Probe
from perf.running.timing import EAGER, GRAPH, Times
from tests.unit.perf_helpers import error_line, pretend_gpu

GPU = "NVIDIA H200"
STORED = {
    ("gemm", "bfloat16"): 700.0,
    ("gemm", "float8_e4m3fn"): 1400.0,
    ("hbm_copy", ""): 4200.0,
    ("hbm_read", ""): 4300.0,
    ("nvlink_pull", ""): 300.0,
}


def row(ceiling: str = "hbm_copy", dtype: str = "", value: float = 4200.0, **changes) -> CeilingRow:
    fields = dict(
        date="2027-01-01T00:00:00+00:00", commit="0123456", dirty=0, gpu=GPU, driver="580.10",
        torch="2.11.0", dsl="aot", num_ranks=4, ceiling=ceiling, dtype=dtype, value=value,
        unit="GB/s", us_min=1.0, us_median=2.0, us_p95=3.0,
    )  # fmt: skip
    return CeilingRow(**{**fields, **changes})


def write(path, *rows: CeilingRow) -> str:
    file = ResultsFile(path, CeilingRow)
    for each in rows:
        file.append(each)
    return str(path)


def stored(path, **changes) -> str:
    return write(path, *(row(*key, value, **changes) for key, value in STORED.items()))


@pytest.mark.parametrize(
    ("unit", "amount", "us", "value"),
    [(TFLOPS, 2 * 10**12, 1000, 2000), (GBPS, 10**9, 1000, 1000), (US, 50, 1000, 20)],
)
def test_units(unit, amount, us, value):
    assert Probe("name", unit, amount, lambda: None).value(us) == pytest.approx(value)


@pytest.mark.parametrize(
    ("make", "size", "amount"),
    [
        (probes.gemm_bf16, 32, 2 * 32**3),
        (probes.hbm_copy, 4096, 2 * 4096),
        (probes.hbm_read, 4096, 4096),
    ],
)
def test_a_probe_counts_what_it_does_and_runs(make, size, amount):
    probe = make(torch.device("cpu"), size)
    assert probe.amount == amount and probe.mode == EAGER
    assert isinstance(probe.call(), torch.Tensor)


def test_the_fp8_product_is_a_product(monkeypatch):
    """Rows times columns, in the memory order that the tensor cores take."""
    seen = {}

    def product(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        seen.update(a=a, b=b, out_dtype=out_dtype)
        return a.float() @ b.float()

    monkeypatch.setattr(torch, "_scaled_mm", product)
    probe = probes.gemm_fp8(torch.device("cpu"), 16)
    assert probe.call().shape == (16, 16) and probe.dtype == "float8_e4m3fn"
    assert seen["a"].is_contiguous() and seen["b"].t().is_contiguous()
    assert seen["a"].dtype == torch.float8_e4m3fn and seen["out_dtype"] == torch.bfloat16


def test_a_launch_is_timed_in_a_graph(monkeypatch):
    kernels = []
    monkeypatch.setattr(torch.cuda, "_sleep", kernels.append)
    probe = probes.launch(torch.device("cpu"), 7)
    probe.call()
    assert kernels == [0] * 7 and probe.mode == GRAPH and probe.amount == 7


class FakeRank:
    """Symmetric memory of several ranks that live in one process."""

    def __init__(self, size: int, part: int):
        self.memory = [torch.arange(part * (size - 1), dtype=torch.int32) + 1000 * rank + 1
                       for rank in range(size)]  # fmt: skip

    def get_buffer(self, rank, shape, dtype):
        return self.memory[rank].view(shape)


@pytest.mark.parametrize("size", [2, 4])
def test_pull_and_push_touch_every_peer_once(size, monkeypatch):
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    part, all_ranks = 8, FakeRank(size, 8)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=None))
    monkeypatch.setattr(symmetric_memory, "rendezvous", lambda shared, group: all_ranks)
    monkeypatch.setattr(
        symmetric_memory, "empty", lambda n, dtype, device: torch.empty(n, dtype=dtype)
    )
    num_bytes = 4 * part * (size - 1)
    made = [
        list(probes.nvlink(SimpleNamespace(rank=r, size=size, device="cpu"), num_bytes))
        for r in range(size)
    ]
    for memory in all_ranks.memory:
        memory.fill_(7)
    for pull, push, barrier in made:
        assert pull.amount == push.amount == num_bytes and barrier.unit == US
        pull.call()  # the local copy now holds -7
    for memory in all_ranks.memory:
        memory.fill_(9)
    written = []
    for _, push, _ in made:
        before = [memory.clone() for memory in all_ranks.memory]
        push.call()
        pairs = zip(before, all_ranks.memory, strict=True)
        written.append([int(((a == 9) & (b == 7)).sum()) for a, b in pairs])
    assert all((memory == 7).all() for memory in all_ranks.memory)  # by one rank each
    for rank, counts in enumerate(written):
        assert counts == [0 if peer == rank else part for peer in range(size)]


def test_rows_are_stored_and_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "new" / "ceilings.csv"
    assert main(["ceilings", "--device", "cuda", "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    assert "torch sees no GPU" in out and "nothing is stored" in out and not path.exists()
    stored(path)
    assert load(path).ceiling.tolist() == [ceiling for ceiling, _ in STORED]
    assert main(["ceilings", "--device", "cpu", "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    assert "nothing is measured on a CPU" in out and "5 stored ceilings" in out
    assert "hbm_read" in out and "4,300.00 GB/s" in out and "4 x NVIDIA H200, 2027-01-01" in out


def test_what_is_measured_becomes_rows(tmp_path, monkeypatch, capsys):
    def make(device):
        return Probe(GEMM, TFLOPS, 10**12, lambda: None, dtype="bfloat16")

    def absent(device):
        raise AttributeError("torch has no such thing\nmore")

    monkeypatch.setattr(probes, "ONE_GPU", (make, absent))
    monkeypatch.setattr(together, "measure", lambda *a, **k: (Times((1000.0, 2000.0)), None))
    path = tmp_path / "ceilings.csv"
    assert keep(ResultsFile(path, CeilingRow), measured(torch.device("cpu"), 3)) == 0
    frame = load(path)
    assert (frame.ceiling[0], frame.dtype[0], frame.value[0]) == (GEMM, "bfloat16", 666.667)
    assert len(frame) == 1 and frame.num_ranks[0] == 1 and frame.us_min[0] == 1000
    assert capsys.readouterr().err == "absent is left out: torch has no such thing\n"


def test_an_interrupt_keeps_rows(tmp_path, capsys):
    def rows():
        yield row()
        raise KeyboardInterrupt

    path = tmp_path / "ceilings.csv"
    assert keep(ResultsFile(path, CeilingRow), rows()) == 130
    assert len(load(path)) == 1 and "1 finished row(s) kept" in capsys.readouterr().err


def test_a_row_that_nobody_reads_is_kept(tmp_path, monkeypatch):
    def gone(*lines, **options):
        raise BrokenPipeError

    path = tmp_path / "ceilings.csv"
    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        keep(ResultsFile(path, CeilingRow), iter([row()]))
    assert len(load(path)) == 1


def test_the_latest_rows_of_this_gpu_count(tmp_path):
    path = tmp_path / "c.csv"
    stored(path)
    old, other = "2026-01-01T00:00:00+00:00", "NVIDIA H100"
    write(path, row(value=1.0, date=old), row(value=9999.0, gpu=other))
    found = ceilings_of(path, GPU, 4)
    assert found == Ceilings({"bfloat16": 700.0, "float8_e4m3fn": 1400.0}, 4.3, 300.0)
    write(path, row("gemm", "bfloat16", 650.0))
    assert ceilings_of(path, GPU, 4).gemm("bfloat16") == 650


def test_memory_of_another_number_of_gpus_will_do_but_not_nvlink(tmp_path):
    path = stored(tmp_path / "c.csv")
    alone = ceilings_of(path, GPU, 1)
    assert alone.hbm_tbps == 4.3 and alone.nvlink_gbps == H200.nvlink_gbps
    write(path, row("hbm_copy", "", 4500.0, num_ranks=1))
    assert ceilings_of(path, GPU, 1).hbm_tbps == 4.5 and ceilings_of(path, GPU, 4).hbm_tbps == 4.3
    with pytest.raises(ValueError, match="has no nvlink_pull of 2 x NVIDIA H200"):
        ceilings_of(path, GPU, 2)
    with pytest.raises(ValueError, match="has no gemm, hbm, nvlink_pull of 4 x NVIDIA B200"):
        ceilings_of(path, "NVIDIA B200", 4)


@pytest.mark.parametrize("value", ["nan", "-5", "inf", "0", "abc", ""])
def test_a_ceiling_that_is_none_is_named(value, tmp_path, capsys):
    path = write(tmp_path / "c.csv", row("gemm", "bfloat16", value))
    with pytest.raises(ValueError, match=f"{path}, line 2: value '?{value}'? is no "):
        ceilings_of(path, GPU, 4)
    argv = ["ceilings", "--device", "cpu", "--csv", path]
    assert f"{path}, line 2: value " in error_line(argv, capsys, silent=False)


def test_a_cut_row_of_ceilings_is_named(tmp_path):
    path = tmp_path / "c.csv"
    write(path, row())
    path.write_text(path.read_text().rsplit(",", 4)[0])
    with pytest.raises(ValueError, match="c.csv, line 2: 14 columns, expected 18"):
        load(path)


def test_the_roofline_follows_dtype_and_ceilings():
    work = Work((10**12,), (0,), (0,))
    assert roofline_of(work, H200).us == pytest.approx(1e6 / 780)
    assert roofline_of(work, H200, "float8_e4m3fn").us == pytest.approx(1e6 / 1490)
    own = Ceilings({"bfloat16": 500.0}, 1.0, 100.0)
    assert roofline_of(work, own).us == pytest.approx(2000)
    assert roofline_of(Work((0,), (10**9,), (0,)), own).us == pytest.approx(1000)
    with pytest.raises(ValueError, match="no GEMM ceiling for float8_e4m3fn, only for bfloat16"):
        roofline_of(work, own, "float8_e4m3fn")


def test_a_sweep_takes_ceilings_from_a_file(tmp_path, monkeypatch):
    pretend_gpu(monkeypatch)
    path = stored(tmp_path / "c.csv", num_ranks=1)
    sweep = ["sweep", "--device", "cuda"]
    plan = plan_of(options_of([*sweep, "--ceilings", path]))
    work = Work((7 * 10**11,), (0,), (0,))
    assert plan.roofline_of(work).us == pytest.approx(1000)
    plan = plan_of(options_of(sweep))
    assert plan.roofline_of(work).us == pytest.approx(7e5 / 780)
    read = Work((0,), (3 * 10**9,), (0,))
    assert plan.roofline_of(read).us == pytest.approx(3000 / 4.3)
    pretend_gpu(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert plan_of(options_of(sweep)).roofline_of(read).us == pytest.approx(1000)
    pretend_gpu(monkeypatch, "NVIDIA H20")
    plan = plan_of(options_of(sweep))
    assert plan.roofline_of(read) is None
    assert "ceilings of NVIDIA H20 are not known" in heading(plan, "NVIDIA H20", ())
    assert plan_of(options_of(["sweep"])).roofline_of(work) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ceilings", "--device", "gpu"], "--device: 'gpu' is not valid"),
        (["ceilings", "--device", "cpu", "--csv", "{rows}"], "another header"),
        (["sweep", "--ceilings", "{rows}"], "--ceilings needs --device cuda"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("a,b\n")
    argv = [word.format(rows=tmp_path / "rows.csv") for word in argv]
    assert message in error_line(argv, capsys, silent=False)
