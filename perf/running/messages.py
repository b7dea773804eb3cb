"""What a duel and the processes of its teams say to each other. Nothing here imports `megamoe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perf.running.nvml import Load


@dataclass(frozen=True)
class Orders:
    """What a process makes ready: a layer for every case, each with inputs of all token counts.
    The cases differ in their precision. A batch has `reps` repetitions, or more to last for
    `batch_us` (`teammate.repetitions`).
    """

    cases: tuple[Any, ...]  # of `perf.workload.cases.Case`
    tokens: tuple[int, ...]
    max_tokens: int
    device: str
    mode: str
    reps: int
    warmup: int
    batch_us: float
    kernel_dir: str | None = None
    num_sms: int | None = None


@dataclass(frozen=True)
class Ready:
    """outputs: of every case and token count, as float32 arrays, the first rows of this rank."""

    outputs: list[list[Any]]


@dataclass(frozen=True)
class Batch:
    """Of one batch of repetitions: microseconds of the slowest rank, mean load of the GPUs."""

    us_median: float
    load: Load


@dataclass(frozen=True)
class Failed:
    message: str
