"""How a call is timed: CUDA events around each repetition, eager or a replayed graph; or a clock.

A repetition is timed on the GPU, between two events of the current stream. A pause is queued first,
so that the host is ahead of the GPU and a graph replay's time holds no host latency; an eager call
that needs more host time than GPU time shows that, as it does in use. All ranks of the process run
in one call, so a time is the maximum over them; with a process per rank, `align` lets the ranks
begin a repetition together, before its first event, and the caller takes the maximum. The output
that is returned is the one of the last timed repetition: what was timed is what gets verified.

Before its warm-up a call on a GPU waits until the GPU has been idle for a while: right after a long
computation, such as that of the expected output, power limits still hold the clocks down, and a
short launch would take longer the more had been computed before it (H200, FP8 Pro with one token:
144 µs instead of 135).

The L2 is warm, as the repetition before left it, or cold: then each repetition comes after a
`flush`, which overwrites a buffer several times as large. The last lines of that buffer, at most
the size of the L2, are written back to memory during the repetition.

While the host waits for the repetitions it samples the GPU's clock, power and energy (`nvml`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from perf.running.nvml import Load, Meter, Sensors, sensors_of

EAGER, GRAPH = "eager", "graph"
MODES = (EAGER, GRAPH)
WARM, COLD = "warm", "cold"
L2_STATES = (WARM, COLD)

#: Seconds without work before a call is warmed up and timed on a GPU.
SETTLE_S = 0.2
#: GPU clock cycles of the pause, about 2 ms: longer than the host takes to queue the repetitions
#: that follow.
HEAD_START_CYCLES = 4_000_000
#: Of every repetition that also queues an `align`, about 0.1 ms.
ALIGN_CYCLES = 200_000
#: Seconds between two looks at a GPU that has not begun, and between two samples of one that has.
LOOK_S, SAMPLE_S = 1e-4, 2e-3
#: A flush overwrites so many times the L2, or so many bytes where torch does not know its size.
FLUSH_FACTOR = 3
FLUSH_BYTES = 256 << 20


def mode_label(mode: str, l2: str) -> str:
    """What stands in a row's `mode`."""
    return mode if l2 == WARM else f"{mode}-{l2}"


def is_cold(label: str) -> bool:
    """Whether a row with this `mode` was measured with a cold L2."""
    return label.endswith(f"-{COLD}")


def flush_of(l2: str, device: torch.device) -> Callable[[], object] | None:
    """What makes the L2 of a GPU cold, without waiting for it; None if it is to stay warm."""
    if l2 == WARM:
        return None
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    num_bytes = FLUSH_FACTOR * size or FLUSH_BYTES
    return torch.zeros(num_bytes // 4, dtype=torch.int32, device=device).zero_


@dataclass(frozen=True)
class Times:
    """Microseconds of every repetition, and what the GPU did meanwhile."""

    us: tuple[float, ...]
    load: Load = Load()

    @property
    def us_min(self) -> float:
        return min(self.us)

    @property
    def us_median(self) -> float:
        return median(self.us)

    @property
    def us_p95(self) -> float:
        """The smallest repetition that at least 95 % of the repetitions do not exceed."""
        return sorted(self.us)[-(-95 * len(self.us) // 100) - 1]

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of a row."""
        times = {name: getattr(self, name) for name in ("us_min", "us_median", "us_p95")}
        return times | self.load.columns


def _time_cpu(
    call: Callable[[], object], repetitions: int, align: Callable[[], object] | None
) -> tuple[Times, object]:
    us, output = [], None
    for _ in range(repetitions):
        if align:
            align()
        begin = time.perf_counter()
        output = call()
        us.append((time.perf_counter() - begin) * 1e6)
    return Times(tuple(us)), output


def _time_cuda(
    call: Callable[[], object],
    repetitions: int,
    align: Callable[[], object] | None,
    flush: Callable[[], object] | None,
    sensors: Sensors | None,
) -> tuple[Times, object]:
    begins = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions)]
    output = None
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES + (ALIGN_CYCLES * repetitions if align else 0))
    for begin, end in zip(begins, ends, strict=True):
        if flush:
            flush()
        if align:
            align()
        begin.record()
        output = call()
        end.record()
    meter = _watch(begins[0], ends[-1], sensors) if sensors else None
    torch.cuda.synchronize()
    us = tuple(b.elapsed_time(e) * 1e3 for b, e in zip(begins, ends, strict=True))
    load = Load()
    if meter:
        load = meter.load(begins[0].elapsed_time(ends[-1]) / 1e3 / repetitions)
    return Times(us, load), output


def _watch(begin: torch.cuda.Event, end: torch.cuda.Event, sensors: Sensors) -> Meter:
    """Samples from one event to the other, at least one."""
    meter = Meter(sensors)
    while not begin.query():
        time.sleep(LOOK_S)
    meter.sample()
    while not end.query():
        time.sleep(SAMPLE_S)
        meter.sample()
    return meter


def capture(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """`call`, which has run before, as a CUDA graph, and the output that a replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls count: a process group's watchdog may query its events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()
    return graph, output


@dataclass(frozen=True)
class Prepared:
    """A call that ran once, as a graph where that was asked for."""

    call: Callable[[], object]
    device: torch.device
    check: Callable[[], object]


def prepare(
    call: Callable[[], object],
    device: torch.device | str,
    mode: str = EAGER,
    check: Callable[[], object] = lambda: None,
) -> Prepared:
    """What `time_batch` takes. On a GPU `check` runs after the first call: it should wait for the
    device and raise what a launch reported, so that a failing call is not repeated.
    """
    assert mode in MODES, mode
    device = torch.device(device)
    if device.type == "cpu":
        assert mode == EAGER, "a CUDA graph needs a GPU"
        return Prepared(call, device, check)
    call()
    check()
    if mode == EAGER:
        return Prepared(call, device, check)
    graph, captured = capture(call)

    def replay() -> object:
        graph.replay()
        return captured

    return Prepared(replay, device, check)


def time_batch(
    prepared: Prepared,
    repetitions: int,
    warmup: int,
    align: Callable[[], object] | None = None,
    flush: Callable[[], object] | None = None,
) -> tuple[Times, object]:
    """Times of a rested GPU's calls and the output of the last; `flush` (`flush_of`), then `align`
    run before every timed repetition and are not timed. `check` runs at the end.
    """
    call, emulated = prepared.call, prepared.device.type == "cpu"
    assert repetitions >= 1 and not (emulated and flush), "a cold L2 needs a GPU"
    if not emulated:
        torch.cuda.synchronize()
        time.sleep(SETTLE_S)
    for _ in range(warmup):
        call()
    if emulated:
        times, output = _time_cpu(call, repetitions, align)
    else:
        sensors = sensors_of(prepared.device)
        times, output = _time_cuda(call, repetitions, align, flush, sensors)
    prepared.check()
    return times, output


def measure(
    call: Callable[[], object],
    device: torch.device | str,
    mode: str = EAGER,
    repetitions: int = 20,
    warmup: int = 3,
    check: Callable[[], object] = lambda: None,
    align: Callable[[], object] | None = None,
    flush: Callable[[], object] | None = None,
) -> tuple[Times, object]:
    """`prepare`, then one `time_batch`."""
    return time_batch(prepare(call, device, mode, check), repetitions, warmup, align, flush)
