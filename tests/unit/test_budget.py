"""Barriers of a CTA and their arrivals, counted from the tables that open the SM90 kernel."""

from __future__ import annotations

import pytest

from megamoe.budget import NUM_PULL_BUFFERS, QUEUE_SLOTS, Budget, budget_of
from megamoe.config import MoEConfig, select
from megamoe.precision import PRECISIONS

#: Warps of a CTA by role; of math, in each of its warpgroups.
WARPS = {"dispatch": 1, "report": 1, "load_weights": 1, "load_tokens": 1, "math": 4}
#: Roles whose warps each arrive once.
ARRIVE = {
    "full": ["load_tokens", "load_weights"],
    "empty": ["math"],
    "queue_empty": ["load_tokens", "report", "math"],
}

pytestmark = [
    pytest.mark.parametrize("warpgroups", [1, 2]),
    pytest.mark.parametrize("precision", PRECISIONS),
]


def budget(precision: str, warpgroups: int, **overrides) -> Budget:
    config = MoEConfig(8, 2, 256, 256, 16, 2, precision)
    return budget_of(config, select(config, block_m=64 * warpgroups, **overrides))


@pytest.mark.parametrize("pipeline", ARRIVE)
def test_arrivals(precision, warpgroups, pipeline):
    arrivals = 0
    for role in ARRIVE[pipeline]:
        arrivals += WARPS[role] * (warpgroups if role == "math" else 1)
    assert getattr(budget(precision, warpgroups), f"{pipeline}_arrivals") == arrivals


@pytest.mark.parametrize("stages", [2, 4])
def test_barriers(precision, warpgroups, stages):
    barriers = {
        "full": stages,
        "empty": stages,
        "queue_full": QUEUE_SLOTS,
        "queue_empty": QUEUE_SLOTS,
        "metadata_full": QUEUE_SLOTS,
        "stored": QUEUE_SLOTS,
        "multiplied": warpgroups,
        "pull": NUM_PULL_BUFFERS,
    }
    assert budget(precision, warpgroups, num_stages=stages).num_barriers == sum(barriers.values())
