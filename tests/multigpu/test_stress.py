"""Ten thousand launches per job size, and a soak of any length.

MEGAMOE_STRESS_LAUNCHES sets the number of launches, MEGAMOE_SOAK_SECONDS the length of the soak
(off unless set).
"""

from __future__ import annotations

import os

import pytest

from tests.multigpu.stress_job import stress

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LAUNCHES = int(os.environ.get("MEGAMOE_STRESS_LAUNCHES", "10000"))
SOAK_S = float(os.environ.get("MEGAMOE_SOAK_SECONDS", "0"))
START_S = 120.0


def run(
    jobs, launches: int, seconds: float, seed: int, limit_s: float, variant: str = "_stress"
) -> dict:
    answers = jobs.run(
        stress,
        timeout_s=limit_s,
        name=f"mp{jobs.world}{variant}",
        launches=launches,
        seconds=seconds,
        seed=seed,
    )
    print(f"{jobs.world} ranks: {answers[0]}")
    assert len({one["launches"] for one in answers}) == 1
    return answers[0]


@pytest.mark.parametrize("variant", ["_stress", "_block_stress"])
def test_many_launches(jobs, variant):
    assert run(jobs, LAUNCHES, 0.0, 1, START_S, variant)["launches"] >= LAUNCHES


@pytest.mark.skipif(SOAK_S == 0, reason="set MEGAMOE_SOAK_SECONDS to soak")
@pytest.mark.timeout(SOAK_S + 2 * START_S)
@pytest.mark.parametrize("variant", ["_stress", "_block_stress"])
def test_soak(jobs, variant):
    """Half of the time each."""
    seconds = SOAK_S / 2
    assert run(jobs, 0, seconds, 2, seconds + START_S, variant)["seconds"] >= seconds
