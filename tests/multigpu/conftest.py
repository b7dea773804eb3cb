"""The workers of a test: one process per GPU, shared by all tests of one size."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import CAPABILITIES
from tests.multigpu.configs import WORLDS
from tests.multigpu.launcher import Jobs, setup_nccl


def missing(world: int) -> str | None:
    """Why `world` processes cannot run here, or None."""
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if have < world:
        return f"needs {world} GPUs, {have} are visible"
    for device in range(world):
        capability = torch.cuda.get_device_capability(device)
        if capability not in CAPABILITIES:
            return f"needs GPUs of {CAPABILITIES}, GPU {device} has compute capability {capability}"
    return None


@pytest.fixture(scope="session", params=WORLDS)
def jobs(request):
    """Jobs of as many processes: every test that takes them runs with each number."""
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    jobs = Jobs(request.param, setup_nccl)
    yield jobs
    jobs.close()
