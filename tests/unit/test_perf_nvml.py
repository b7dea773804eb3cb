"""Clock, power and energy of timed calls, from an NVML that is only pretended."""

from __future__ import annotations

import ctypes
import dataclasses
import time
from math import nan
from types import SimpleNamespace

import pytest
import torch

from perf.recording.columns import Row
from perf.recording.files import ResultsFile, load
from perf.running import nvml, timing
from perf.running.nvml import FieldValue, Load, Meter, Sensors, sensors_of
from perf.running.timing import Times, measure
from perf.running.together import mean_load
from tests.unit.test_perf_results import row_of

UUID = "0a1b"


class FakeNvml:
    """One GPU at 1500 MHz and 650 W, whose counter takes a step of 65 J every 0.1 s of `now`."""

    def __init__(self, broken: bool = False):
        self.now, self.status = 0.0, 3 if broken else 0

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        handle._obj.value = 7
        return 0 if name == b"GPU-0a1b" else 6

    def nvmlDeviceGetClockInfo(self, handle, kind, out):
        assert handle.value == 7 and kind == 1
        out._obj.value = 1500
        return self.status

    def nvmlDeviceGetFieldValues(self, handle, count, out):
        assert handle.value == 7 and count == 1 and out._obj.field == 186
        out._obj.value, out._obj.status = 650_000 + (1 << 32), self.status  # four bytes count
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, out):
        assert handle.value == 7
        out._obj.value = 10**12 + 65_000 * int(self.now / 0.1 + 1e-6)
        return self.status


def meter_after(seconds: float, every: float = 0.01, broken: bool = False) -> Meter:
    library = FakeNvml(broken)
    meter = Meter(Sensors(library, UUID), lambda: library.now)
    for step in range(round(seconds / every) + 1):
        library.now = 0.034 + step * every
        meter.sample()
    return meter


def test_a_field_is_as_long_as_that_of_the_library():
    assert ctypes.sizeof(FieldValue) == 40 and FieldValue.value.offset == 32


def test_a_long_batch_has_clock_power_and_energy():
    load = meter_after(0.55).load(2e-3)
    assert load.sm_mhz == 1500 and load.power_w == 650
    assert load.energy_mj == pytest.approx(650 * 2e-3 * 1e3)  # whole steps, whatever the phase


@pytest.mark.parametrize(
    ("seconds", "known"),
    [(0.0, ["sm_mhz"]), (0.15, ["sm_mhz", "power_w"]), (0.19, ["sm_mhz", "power_w"])],
)
def test_a_short_batch_leaves_power_and_energy_out(seconds, known):
    columns = meter_after(seconds).load(1e-3).columns
    assert [name for name, value in columns.items() if value is not None] == known


def test_a_gpu_without_sensors_has_empty_columns():
    assert meter_after(0.5, broken=True).load(1e-3) == Load()
    with pytest.raises(OSError, match="GPU-ffff"):
        Sensors(FakeNvml(), "ffff")


@pytest.mark.parametrize("known", [True, False])
def test_a_gpu_is_found_by_its_uuid(known, monkeypatch):
    gpu = SimpleNamespace(uuid=UUID if known else "ffff")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(nvml, "library", FakeNvml)
    found = sensors_of("cuda:1")
    assert (found.sm_mhz() == 1500) if known else (found is None)
    assert sensors_of("cpu") is None
    monkeypatch.setattr(nvml, "library", lambda: None)
    assert sensors_of("cuda") is None


def test_samples_are_taken_from_the_first_event_to_the_last(monkeypatch):
    """The GPU takes 0.4 s, and begins after 0.05 s; no sample comes before that."""
    library = FakeNvml()
    monkeypatch.setattr(timing, "sensors_of", lambda device: Sensors(library, UUID))
    monkeypatch.setattr(timing, "capture", lambda call: (SimpleNamespace(replay=call), None))
    monkeypatch.setattr(time, "perf_counter", lambda: library.now)

    def sleep(seconds: float) -> None:
        library.now += seconds

    class Event:
        made = 0

        def __init__(self, enable_timing):
            self.at = [10.25, 10.45, 10.45, 10.65][Event.made]  # begins, then ends
            Event.made += 1

        def record(self):
            pass

        def query(self):
            return library.now >= self.at

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    taken = []
    sample = Meter.sample
    monkeypatch.setattr(Meter, "sample", lambda self: (taken.append(library.now), sample(self)))
    monkeypatch.setattr(Meter.__init__, "__defaults__", (lambda: library.now,))
    library.now = 10.0
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    times, _ = measure(lambda: None, "cuda", "graph", repetitions=2)
    assert 10.25 <= taken[0] < 10.252 and 10.65 <= taken[-1] < 10.654
    assert times.us == pytest.approx((200e3, 200e3))
    assert times.load.sm_mhz == 1500 and times.load.energy_mj == pytest.approx(130e3, rel=0.03)


def test_ranks_share_the_mean_and_a_rank_without_nvml_empties_it():
    job = SimpleNamespace(alone=False, size=2, device="cpu")
    other = torch.tensor([1300.0, nan, 500.0], dtype=torch.float64)
    job.sum_over_ranks = lambda values: values + other
    assert mean_load(job, Load(1500.0, 600.0, 700.0)) == Load(1400.0, None, 600.0)


def test_rows_keep_the_load_and_files_from_before_are_read(tmp_path):
    row = dataclasses.replace(row_of(), **Times((1.0,), Load(1410.0, 652.5, None)).load.columns)
    path = tmp_path / "rows.csv"
    ResultsFile(path, Row).append(row)
    [read] = load(path).itertuples()
    assert (read.sm_mhz, read.power_w) == (1410, 652.5) and read.energy_mj != read.energy_mj
    assert path.read_text().splitlines()[1].endswith(",1410,652.5,")
    lines = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join(cells[:-3]) for cells in lines) + "\n")
    [read] = load(path).itertuples()
    assert read.sm_mhz != read.sm_mhz and read.us_min == row.us_min


def test_times_name_every_column_of_a_row():
    assert set(Times((1.0,)).columns) <= {f.name for f in dataclasses.fields(Row)}
    assert {"sm_mhz", "power_w", "energy_mj"} <= set(Times((1.0,)).columns)
