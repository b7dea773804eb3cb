"""Timing by all processes of a job together: the slowest rank counts."""

from __future__ import annotations

import dataclasses
from math import isnan, nan
from typing import Any

import torch

from perf.running.jobs import Job
from perf.running.nvml import Load
from perf.running.timing import Prepared, Times, measure, time_batch


def mean_load(job: Job, load: Load) -> Load:
    """The mean over ranks; what a rank did not measure is None. Collective."""
    if job.alone:
        return load
    values = [nan if value is None else value for value in dataclasses.astuple(load)]
    total = job.sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=job.device))
    means = (total / job.size).tolist()
    return Load(*(None if isnan(mean) else mean for mean in means))


def _together(job: Job, times: Times) -> Times:
    return Times(tuple(job.max_over_ranks(times.us)), mean_load(job, times.load))


def measure_together(job: Job, *arguments, **options) -> tuple[Times, Any]:
    """`timing.measure` with the largest time of the ranks, and their mean load; collective."""
    options["align"] = None if job.alone else job.align
    times, output = measure(*arguments, **options)
    return _together(job, times), output


def time_batch_together(job: Job, prepared: Prepared, **options) -> tuple[Times, Any]:
    """`timing.time_batch` likewise; collective."""
    times, output = time_batch(prepared, align=None if job.alone else job.align, **options)
    return _together(job, times), output
