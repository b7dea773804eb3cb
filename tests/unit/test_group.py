"""`Group` with two gloo processes: agreement on facts, bounded meetings, ranks named."""

from __future__ import annotations

import pytest

from megamoe import MegaMoE
from megamoe.group import Group
from tests.multigpu.launcher import Died, Jobs, setup_gloo
from tests.unit import dummy_jobs

pytestmark = pytest.mark.slow

LAYER = dict(num_experts=4, top_k=2, hidden_size=128, intermediate_size=128, max_tokens_per_rank=8)


@pytest.fixture(scope="module")
def jobs():
    jobs = Jobs(2, setup_gloo)
    yield jobs
    jobs.close()


def test_a_group_needs_torch_distributed():
    with pytest.raises(ValueError, match="init_process_group"):
        Group(object())


def test_group_and_world_exclude_each_other():
    with pytest.raises(ValueError, match="world=2 and group exclude each other"):
        MegaMoE(group=object(), world=2, **LAYER)


def test_ranks_that_agree(jobs):
    assert jobs.run(dummy_jobs.agree, odd=0, changes={}) == [None, None]


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("field,ours,theirs", [("hidden_size", 512, 640), ("host", "here", "far")])
def test_ranks_that_disagree_hear_who_and_about_what(jobs, odd, field, ours, theirs):
    values = [ours, ours]
    values[odd] = theirs
    message = (
        f"RanksDisagree: ranks disagree on {field}: rank 0 has {values[0]!r}, "
        f"rank 1 has {values[1]!r}"
    )
    assert jobs.run(dummy_jobs.agree, odd=odd, changes={field: theirs}) == [message] * 2


@pytest.mark.parametrize("odd", [0, 1])
def test_an_error_on_one_rank_is_raised_on_all(jobs, odd):
    seen = jobs.run(dummy_jobs.agree, odd=odd, changes={"error": "top_k=17 is too large"})
    assert seen == [f"RanksDisagree: rank {odd}: top_k=17 is too large"] * 2


def test_a_bad_workspace_on_one_rank_is_an_error_on_all(jobs):
    message = "RanksDisagree: rank 0: workspace must be that of another layer, got int"
    assert jobs.run(dummy_jobs.make_with_a_bad_workspace, **LAYER) == [message] * 2


def test_ranks_on_one_gpu(jobs):
    seen = jobs.run(dummy_jobs.agree, odd=1, changes={"gpu": "gpu0"})
    assert seen == ["RanksDisagree: ranks 0 and 1 share GPU gpu0"] * 2


def test_modules_made_in_another_order(jobs):
    seen = jobs.run(dummy_jobs.agree_out_of_order)
    assert all("ranks disagree on serial" in message for message in seen)
    assert jobs.run(dummy_jobs.agree, odd=0, changes={}) == [None, None]


def test_modules_over_a_subgroup_do_not_count_elsewhere(jobs):
    assert jobs.run(dummy_jobs.agree_after_a_subgroup) == [None, None]


def test_a_rank_outside_the_group_is_refused(jobs):
    message = "group does not hold this process, which is rank 1 of the job"
    assert jobs.run(dummy_jobs.join_a_subgroup) == [None, message]
    assert jobs.run(dummy_jobs.agree, odd=0, changes={}) == [None, None]


def test_meetings(jobs):
    assert jobs.run(dummy_jobs.meet_often, times=20) == [20, 20]


@pytest.mark.parametrize("absent", [0, 1])
def test_a_meeting_names_who_is_missing(jobs, absent):
    seen = jobs.run(dummy_jobs.miss_a_meeting, absent=absent, dies=False)
    error, seconds = seen[1 - absent]
    assert error == f"MissingRank: rank {1 - absent} waited 0.5 s for ranks [{absent}] at noon"
    assert 0.4 < seconds < 3


def test_texts_that_ranks_leave(jobs):
    assert jobs.run(dummy_jobs.leave_texts) == [{1: "x is on device cpu"}] * 2


def test_a_recovery_that_missed_its_second_meeting_goes_on_from_there(jobs):
    """Were it to begin anew, it would take the second meeting of the other rank for its first, and
    zero the signal of a launch that runs already.
    """
    seen, _ = jobs.run(dummy_jobs.stall_between_the_meetings)
    assert seen == [
        "zeroed 0 signals", "missed recovery/0/clean", "holds 1 signals", "failed False"
    ]  # fmt: skip


def test_recoveries_of_which_meetings_are_missed_stay_in_step(jobs):
    """Every rank zeroes its header once a recovery."""
    assert jobs.run(dummy_jobs.recover_often, times=9) == [9, 9]


def test_a_dead_rank_is_missing(jobs):
    seen = jobs.run(dummy_jobs.miss_a_meeting, absent=0, dies=True, may_die=(0,))
    assert seen[0] == Died(7)
    assert seen[1][0].startswith("MissingRank: rank 1 waited 0.5 s for ranks [0]")
