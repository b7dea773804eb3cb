"""CUDA graphs over several processes."""

from __future__ import annotations

import pytest

from tests.multigpu import jobs as work
from tests.routing import ROUTINGS

pytestmark = pytest.mark.gpu

#: A graph has the token counts it was captured with.
FULL = [routing for routing in ROUTINGS if routing != "ragged"]


@pytest.mark.parametrize("variant", ["", "_ring", "_block", "_channel", "_mxfp4", "_shared"])
def test_replay_equals_eager_with_other_contents(jobs, variant):
    jobs.run(work.graph, name=f"mp{jobs.world}{variant}", routings=FULL, tokens=100)


def test_a_launch_may_be_the_first_inside_a_capture(jobs):
    jobs.run(work.first_launch_in_a_capture, name=f"mp{jobs.world}")
