"""Layers that are out of step, late or closed: errors by name, and nothing hangs."""

from __future__ import annotations

import pytest

from tests.multigpu import life_jobs
from tests.multigpu.launcher import Died
from tests.multigpu.layer import FAULT_TIMEOUT_S
from tests.multigpu.test_faults import SLACK_S

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("variant", ["", "_block"])
def test_a_rank_that_leaves_out_a_layer(jobs, odd, variant):
    """Without numbers the launches of different layers would meet, and nobody would know."""
    answers = jobs.run(life_jobs.out_of_step, name=f"mp{jobs.world}{variant}", odd=odd)
    seen = [answer[0] for answer in answers]
    assert {one["error"] for one in seen} <= {"LayerMismatch", "PeerFailed"}, seen
    mismatch = [one["message"] for one in seen if one["error"] == "LayerMismatch"]
    assert mismatch and f"rank {odd}" in " ".join(mismatch), seen
    assert all(one["seconds"] < 2.0 for one in seen), seen
    assert all(retries[-1] is None for _, retries in answers), answers


@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_expert_shifts_no_layer(jobs, bad):
    answers = jobs.run(life_jobs.bad_expert_in_a_step, name=f"mp{jobs.world}", bad=bad)
    for rank, raised in enumerate(answers):
        assert len(raised) == (rank == bad), raised
    assert answers[bad][0].startswith("True: topk_idx[5, 2] = 16 on rank")


def test_a_workspace_is_recovered_through_any_layer(jobs):
    absent = jobs.world - 1
    answers = jobs.run(
        life_jobs.recover_through_different_layers, name=f"mp{jobs.world}", absent=absent
    )
    for rank, seen in enumerate(answers):
        errors = [one["error"] for one in seen]
        if rank != absent:
            assert errors[0] in ("LaunchTimeout", "PeerFailed") and errors[1:] == [None, None]
        else:
            assert errors == [None] * 3


def test_a_late_rank_is_waited_for_longer_than_one_that_stalls(jobs):
    job = {"name": f"mp{jobs.world}", "late": 1, "by_s": 2.0}
    patient = {"timeout_s": 0.5, "start_timeout_s": 20.0}
    answers = jobs.run(life_jobs.late_start, limits=patient, **job)
    assert [one["error"] for one in answers] == [None] * jobs.world, answers
    hasty = {"timeout_s": 20.0, "start_timeout_s": 0.5}
    answers = jobs.run(life_jobs.late_start, limits=hasty, **job)
    assert answers[0]["error"] in ("LaunchTimeout", "PeerFailed"), answers
    messages = " ".join(one["message"] for one in answers)
    assert "rank 1 did not begin within start_timeout_s=0.5" in messages


def test_a_meeting_before_the_first_launch(jobs):
    late = jobs.world - 1
    answers = jobs.run(life_jobs.meet_first, name=f"mp{jobs.world}", late=late)
    for rank, (first, seconds, missed) in enumerate(answers):
        assert first["error"] is None
        if rank != late:
            assert 0.9 < seconds < 5.0
            assert missed["error"] == "MissingRank" and f"ranks [{late}]" in missed["message"]


@pytest.mark.parametrize("group_first", [False, True])
def test_memory_comes_back_whenever_the_group_goes(jobs, group_first):
    answers = jobs.run(life_jobs.memory_comes_back, name=f"mp{jobs.world}", group_first=group_first)
    for used in answers:
        assert used[3] <= used[1] + 8 * 2**20, used  # what is made once is there by then


@pytest.mark.slow
def test_a_rank_that_exits_early(jobs):
    """Last of the file, because it costs a pool."""
    leaves = jobs.world - 1
    answers = jobs.run(
        life_jobs.early_exit, may_die=(leaves,), name=f"mp{jobs.world}", leaves=leaves
    )
    assert answers[leaves] == Died(0)
    for answer in answers[:leaves]:
        assert answer["seen"]["error"] in ("LaunchTimeout", "PeerFailed"), answer
        assert answer["seen"]["seconds"] < FAULT_TIMEOUT_S + SLACK_S
        assert answer["closed"]["error"] is None and answer["alive"]
    exits = jobs.close()
    assert exits[:leaves] == [0] * leaves
