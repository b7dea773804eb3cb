"""The launcher of the tests with several processes: what fails is reported, and nothing hangs."""

from __future__ import annotations

import time

import pytest

from tests.multigpu import launcher
from tests.multigpu.launcher import Died, Jobs, Pool, setup_cpu
from tests.unit import dummy_jobs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs():
    jobs = Jobs(2, setup_cpu)
    yield jobs
    jobs.close()


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 3.0)


def test_results_come_back_by_rank_and_workers_leave_in_peace(jobs):
    assert jobs.run(dummy_jobs.where_am_i, factor=10) == [(0, 2), (10, 2)]
    assert jobs.close() == [0, 0]


@pytest.mark.parametrize("odd", [0, 1])
def test_an_exception_has_its_rank_and_traceback(jobs, odd):
    with pytest.raises(launcher.WorkerFailed) as caught:
        jobs.run(dummy_jobs.misbehave, odd=odd, how="raise")
    message = str(caught.value)
    assert message.startswith(f"rank {odd} failed in misbehave:\nTraceback")
    assert "ValueError: this is the cause" in message and "dummy_jobs.py" in message
    # The one that waited was told, and the same workers go on, with nothing kept.
    assert jobs.run(dummy_jobs.where_am_i, factor=1) == [(0, 2), (1, 2)]


def test_the_cache_is_kept_until_a_task_fails(jobs):
    jobs.run(dummy_jobs.remember, value=1)
    assert all(1 in kept for kept in jobs.run(dummy_jobs.remember, value=2))
    with pytest.raises(launcher.WorkerFailed):
        jobs.run(dummy_jobs.misbehave, odd=0, how="raise")
    assert jobs.run(dummy_jobs.remember, value=3) == [[], []]


def test_a_result_that_cannot_travel_is_an_error(jobs):
    with pytest.raises(launcher.WorkerFailed, match="rank 1 failed in misbehave"):
        jobs.run(dummy_jobs.misbehave, odd=1, how="unpicklable")


@pytest.mark.parametrize("how,code", [("kill", -9), ("exit", 7)])
def test_a_dead_worker_is_reported_and_the_pool_rebuilt(jobs, how, code):
    started = time.monotonic()
    with pytest.raises(
        launcher.WorkerDied, match=f"rank 1 died in misbehave with exit code {code}"
    ):
        jobs.run(dummy_jobs.misbehave, odd=1, how=how)
    assert time.monotonic() - started < 45
    assert jobs.run(dummy_jobs.where_am_i, factor=1) == [(0, 2), (1, 2)]


def test_a_worker_that_hangs_is_killed(jobs):
    started = time.monotonic()
    with pytest.raises(launcher.WorkerTimeout, match=r"did not answer misbehave in 1.0 s"):
        jobs.run(dummy_jobs.misbehave, odd=0, how="hang", timeout_s=1.0)
    assert time.monotonic() - started < 45


def test_a_death_that_is_expected_leaves_the_survivors():
    with Pool(2, setup_cpu) as pool:
        assert pool.run(dummy_jobs.dies_alone, odd=0, may_die=(0,)) == [Died(7), "survived"]
        with pytest.raises(launcher.WorkerFailed, match="rank 0 died in dies_alone"):
            pool.run(dummy_jobs.where_am_i, factor=1)
        assert pool.close() == [7, 0]


def test_a_pool_that_cannot_start_is_not_tried_for_ever():
    jobs = Jobs(1, dummy_jobs.fails_to_start)
    for _ in range(2):
        with pytest.raises(launcher.WorkerFailed, match="rank 0 has no legs"):
            jobs.run(dummy_jobs.where_am_i, factor=1)
    started = time.monotonic()
    with pytest.raises(launcher.WorkerFailed, match="2 pools of 1 did not start"):
        jobs.run(dummy_jobs.where_am_i, factor=1)
    assert time.monotonic() - started < 1
