"""Ranks that construct their modules differently: the same error on every rank, and no hang."""

from __future__ import annotations

import re

import pytest

from megamoe.dsl import HAVE_DSL
from tests.multigpu import jobs as work

pytestmark = pytest.mark.gpu


def seen_by_all(jobs, odd_rank, variant="", **changes) -> str:
    """The one message that every rank raised."""
    name = f"mp{jobs.world}"
    seen = jobs.run(
        work.disagree, name=name, odd_rank=odd_rank, other=name + variant, changes=changes
    )
    assert [one["error"] for one in seen] == ["RanksDisagree"] * jobs.world, seen
    messages = {one["message"] for one in seen}
    assert len(messages) == 1, messages
    return messages.pop()


@pytest.mark.parametrize(
    "variant,field,theirs,ours",
    [("_ring", "max_tokens_per_rank", 384, 256), ("_stress", "hidden_size", 256, 512)],
)
def test_another_value_on_one_rank(jobs, variant, field, theirs, ours):
    odd = jobs.world - 1
    message = seen_by_all(jobs, odd, variant)
    assert message == (f"ranks disagree on {field}: rank 0 has {ours}, rank {odd} has {theirs}")


def test_another_value_on_rank_0(jobs):
    message = seen_by_all(jobs, 0, "_stress")
    assert message == "ranks disagree on hidden_size: rank 0 has 256, rank 1 has 512"


@pytest.mark.parametrize(
    "changes,text",
    [
        ({"hidden_size": 500}, "hidden_size=500 is not a multiple of 128"),
        ({"top_k": 17}, "top_k=17 must be in 1..16"),
        ({"timeout_s": 0.0}, "timeout_s=0.0 must be > 0"),
        ({"device": "cpu"}, "group needs one GPU per process"),
        pytest.param(
            {"hidden_size": 640},
            "holds no megamoe-",
            marks=pytest.mark.skipif(HAVE_DSL, reason="the DSL would build the kernel"),
        ),
    ],
)
def test_a_value_that_one_rank_cannot_run(jobs, changes, text):
    odd = jobs.world - 1
    message = seen_by_all(jobs, odd, **changes)
    assert re.match(rf"rank {odd}: ", message) and text in message


def test_two_ranks_on_one_gpu(jobs):
    message = seen_by_all(jobs, 1, device="cuda:0")
    assert re.match("ranks 0 and 1 share GPU ", message)
