"""What `perf.running.timing` reports is how long the kernel ran, by the clock of the profiler."""

from __future__ import annotations

from functools import partial
from statistics import median

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from perf.running.timing import MODES, measure
from tests.gpu.harness import inputs_of, shared_moe

pytestmark = pytest.mark.gpu

REPETITIONS = 30
#: The difference is what lies between two events besides the kernel, about 2 us, and what two runs
#: of the same launches differ by.
TOLERANCE = 0.03
#: Below this many microseconds the events alone would be a large part of the tolerance.
LONG_ENOUGH = 250


def launches_of(profiler: profile) -> dict[str, list[float]]:
    """{kernel: microseconds of each of its launches, in order}."""
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    launches: dict[str, list[float]] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        launches.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return launches


@pytest.mark.parametrize("mode", MODES)
def test_times_are_those_of_the_profiler(mode):
    moe = shared_moe("timed1")
    x, ids, weights = (ranks[0] for ranks in inputs_of(moe, "uniform", seed=6))
    call = partial(moe, x, ids, weights)
    run = partial(measure, call, "cuda", mode, REPETITIONS, check=moe.synchronize)
    times, _ = run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    launches = launches_of(profiler)
    if not launches:
        pytest.skip(f"the profiler of torch {torch.__version__} recorded no kernel")
    layer = max(launches.values(), key=sum)  # the others are the pause and copies
    assert len(layer) > REPETITIONS, {name: len(us) for name, us in launches.items()}
    kernel_us = median(layer[-REPETITIONS:])
    seen = f"{mode}: {times.us_median:.1f} us reported, {kernel_us:.1f} us by the profiler"
    assert kernel_us > LONG_ENOUGH, seen
    assert abs(times.us_median - kernel_us) <= TOLERANCE * kernel_us, seen
