"""A rank that is missing, late, wrong or crowded: the others end in time, and the job goes on."""

from __future__ import annotations

import pytest

from tests.multigpu import fault_jobs
from tests.multigpu.layer import FAULT_TIMEOUT_S

pytestmark = pytest.mark.gpu

#: How much longer than the timeout a failed forward may take.
SLACK_S = 2.0
FAILED = ("LaunchTimeout", "PeerFailed")
#: A rank is told within this time, most of which is the hosts' own.
AT_ONCE_S = 0.5


def assert_names(seen: dict, absent: int) -> None:
    """A survivor's error: in time, and the missing rank by name."""
    assert seen["error"] in FAILED, seen
    assert f"nvlink_barrier_signal[{absent}]" in seen["message"]
    assert seen["seconds"] < FAULT_TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("how,absent", [("skips", 0), ("skips", -1), ("late", -1)])
def test_a_rank_that_misses_a_launch(jobs, how, absent):
    absent %= jobs.world
    answers = jobs.run(fault_jobs.absent, name=f"mp{jobs.world}", absent=absent, how=how)
    survivors = [rank for rank in range(jobs.world) if rank != absent]
    for rank in survivors:
        first, retries = answers[rank]
        assert_names(first, absent)
        assert [one["error"] for one in retries] == [None], retries
    assert "LaunchTimeout" in [answers[rank][0]["error"] for rank in survivors]
    first, retries = answers[absent]
    assert first["error"] == {"skips": None, "late": "PeerFailed"}[how]
    # A rank that launched nothing learns of the failure by its next forward.
    expected = [None] if how == "late" else ["PeerFailed", None]
    assert [one["error"] for one in retries] in (expected, [None]), retries


@pytest.mark.parametrize("refuses", [0, 1])
@pytest.mark.parametrize("variant", ["", "_block", "_channel", "_mxfp4"])
def test_a_rank_that_refuses_its_input_tells_the_others(jobs, variant, refuses):
    """At once, with the reason; and the next forward is right on every rank."""
    name = f"mp{jobs.world}{variant}"
    answers = jobs.run(fault_jobs.absent, name=name, absent=refuses, how="raises")
    for rank, (first, retries) in enumerate(answers):
        assert [one["error"] for one in retries] == [None], retries
        if rank == refuses:
            assert first["error"] == "ValueError" and "x has shape" in first["message"]
        else:
            assert first["error"] == "PeerFailed", first
            assert f"rank {refuses} refused its input: x has shape" in first["message"]
            assert first["seconds"] < AT_ONCE_S, first


def test_an_invalid_expert_on_one_rank(jobs):
    answers = jobs.run(fault_jobs.invalid_expert, name=f"mp{jobs.world}", bad_rank=1)
    for rank, seen in enumerate(answers):
        assert seen["error"] == ("InvalidExpertError" if rank == 1 else None), seen
    assert "topk_idx[5, 2] = 16 on rank 1" in answers[1]["message"]


def test_a_replay_after_a_failure_is_an_error_until_recovery(jobs):
    absent = jobs.world - 1
    answers = jobs.run(fault_jobs.unrecovered_replay, name=f"mp{jobs.world}", absent=absent)
    for first, second in answers[:absent]:
        assert_names(first, absent)
        assert second["error"] == "NotRecovered", second
        assert "was not recovered" in second["message"]
    first, second = answers[absent]
    assert first["error"] is None
    assert second["error"] == "PeerFailed", second


def test_a_crowded_gpu_makes_all_ranks_late_and_right(jobs):
    crowded = jobs.world - 1
    answers = jobs.run(fault_jobs.crowded, name=f"mp{jobs.world}", crowded=crowded, size=40960)
    held = answers[crowded]["held_s"]
    print([f"{one['forward_s'] * 1e3:.1f} ms" for one in answers], f"held {held * 1e3:.0f} ms")
    assert 0.05 < held < FAULT_TIMEOUT_S
    assert answers[crowded]["overlapped"]
    assert answers[crowded]["forward_s"] > held / 4
