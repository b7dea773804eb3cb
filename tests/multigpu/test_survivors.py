"""A process that dies: the others are told which, in time, and live on. Last of all, because it
costs a pool.
"""

from __future__ import annotations

import signal

import pytest

from tests.multigpu import fault_jobs
from tests.multigpu.launcher import Died
from tests.multigpu.layer import FAULT_TIMEOUT_S
from tests.multigpu.test_faults import SLACK_S, assert_names

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


#: (who, how, after how many launches), for every number of ranks.
DEATHS = {2: [(0, "kill", 3)], 4: [(3, "kill", 0), (0, "exit", 5)]}


def test_survivors_of_a_dead_rank(jobs):
    for victim, how, launches in DEATHS[jobs.world]:
        answers = jobs.run(
            fault_jobs.victim,
            may_die=(victim,),
            name=f"mp{jobs.world}",
            victim=victim,
            how=how,
            launches=launches,
        )
        assert answers[victim] == Died(-signal.SIGKILL if how == "kill" else 3)
        survivors = [rank for rank in range(jobs.world) if rank != victim]
        for rank in survivors:
            seen = answers[rank]
            assert_names(seen["first"], victim)
            assert seen["second"]["error"] == "MissingRank", seen
            assert f"ranks [{victim}]" in seen["second"]["message"]
            assert seen["second"]["seconds"] < FAULT_TIMEOUT_S + SLACK_S
            assert seen["alive"]
        assert "LaunchTimeout" in [answers[rank]["first"]["error"] for rank in survivors]
        exits = jobs.close()
        assert [exits[rank] for rank in survivors] == [0] * len(survivors)
