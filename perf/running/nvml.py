"""Clock, power and energy of a GPU while it is timed, read through NVML (libnvidia-ml, ctypes).

A `Meter` takes samples while the host waits for the GPU. A clock is known at once. Power comes from
a sensor that is read some ten times a second, and energy from a counter that grows in such steps:
power is left out of shorter batches, and energy is what the counter grew by between its first and
its last step, over the time between these two. Where there is no NVML nothing is measured.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

#: Of nvml.h: the SM clock, and a field that is the power now (`nvmlDeviceGetPowerUsage` is the mean
#: of a second, longer than most batches and their rests).
CLOCK_SM, POWER_INSTANT = 1, 186
#: Seconds of samples that power, and energy, need.
POWER_S, ENERGY_S = 0.1, 0.2


@dataclass(frozen=True)
class Load:
    """Mean SM clock and power, and energy of a launch, of one GPU; None: not measured."""

    sm_mhz: float | None = None
    power_w: float | None = None
    energy_mj: float | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of a row."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


class FieldValue(ctypes.Structure):
    """nvmlFieldValue_t, whose value is read as an unsigned integer."""

    _fields_ = [
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency", ctypes.c_longlong),
        ("kind", ctypes.c_int),
        ("status", ctypes.c_int),
        ("value", ctypes.c_uint64),
    ]


@cache
def library() -> Any | None:
    """NVML, ready; None where there is none."""
    try:
        found = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return found if found.nvmlInit_v2() == 0 else None


class Sensors:
    """Of the GPU with this UUID; OSError if NVML does not know it. A reading is None where the GPU
    has none.
    """

    def __init__(self, nvml: Any, uuid: str):
        self._nvml, self._gpu = nvml, ctypes.c_void_p()
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        status = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(self._gpu))
        if status:
            raise OSError(f"NVML knows no {name}: status {status}")

    def sm_mhz(self) -> float | None:
        mhz = ctypes.c_uint()
        status = self._nvml.nvmlDeviceGetClockInfo(self._gpu, CLOCK_SM, ctypes.byref(mhz))
        return None if status else float(mhz.value)

    def power_w(self) -> float | None:
        """Now."""
        field = FieldValue(field=POWER_INSTANT)
        status = self._nvml.nvmlDeviceGetFieldValues(self._gpu, 1, ctypes.byref(field))
        return None if status or field.status else (field.value & 0xFFFFFFFF) / 1e3

    def energy_mj(self) -> float | None:
        """Since the driver was loaded."""
        total = ctypes.c_ulonglong()
        status = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu, ctypes.byref(total))
        return None if status else float(total.value)


def sensors_of(device: torch.device | str) -> Sensors | None:
    """Of a GPU of this process; None where there is no NVML, or where it does not know the GPU."""
    nvml = library()
    if nvml is None or torch.device(device).type != "cuda":
        return None
    try:
        return Sensors(nvml, str(torch.cuda.get_device_properties(device).uuid))
    except (OSError, AttributeError):
        return None


@dataclass(frozen=True)
class Sample:
    at_s: float
    sm_mhz: float | None
    power_w: float | None
    energy_mj: float | None


class Meter:
    """Samples of one batch."""

    def __init__(self, sensors: Sensors, clock: Callable[[], float] = time.perf_counter):
        self.sensors, self.clock = sensors, clock
        self.samples: list[Sample] = []

    def sample(self) -> None:
        read = self.sensors
        energy, power, mhz = read.energy_mj(), read.power_w(), read.sm_mhz()
        self.samples.append(Sample(self.clock(), mhz, power, energy))

    def load(self, launch_s: float) -> Load:
        """Of launches one of which began every `launch_s` seconds."""
        if not self.samples:
            return Load()
        span_s = self.samples[-1].at_s - self.samples[0].at_s
        clocks = [one.sm_mhz for one in self.samples if one.sm_mhz is not None]
        powers = [one.power_w for one in self.samples if one.power_w is not None]
        watts = self._watts() if span_s >= ENERGY_S else None
        return Load(
            sm_mhz=fmean(clocks) if clocks else None,
            power_w=fmean(powers) if powers and span_s >= POWER_S else None,
            energy_mj=None if watts is None else watts * launch_s * 1e3,
        )

    def _watts(self) -> float | None:
        """By the energy counter, between its first and its last step."""
        steps = [b for a, b in pairwise(self.samples) if a.energy_mj != b.energy_mj]
        if len(steps) < 2:
            return None
        first, last = steps[0], steps[-1]
        if first.energy_mj is None or last.energy_mj is None:
            return None
        return (last.energy_mj - first.energy_mj) / (last.at_s - first.at_s) / 1e3
