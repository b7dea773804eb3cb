"""One process per GPU against the oracle, and bit for bit against virtual ranks on one GPU."""

from __future__ import annotations

import numpy
import pytest

from tests.multigpu import jobs as work
from tests.routing import ROUTINGS, seed_of

pytestmark = pytest.mark.gpu

VARIANTS = (
    "", "_ring", "_odd", "_stress", "_block", "_channel", "_mxfp4", "_mxfp4_token", "_int4",
    "_shared",
)  # fmt: skip
LARGE_ROUTINGS = ("uniform", "skewed", "all_to_one_rank", "ragged")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_matches_the_oracle(jobs, variant, routing):
    name = f"mp{jobs.world}{variant}"
    jobs.run(work.oracle, name=name, routing=routing, seed=seed_of(name, routing))


@pytest.mark.parametrize("routing", LARGE_ROUTINGS)
def test_a_large_forward_matches_the_oracle(jobs, routing):
    jobs.run(work.oracle, name=f"mp{jobs.world}_large", routing=routing, seed=1)


def test_token_counts(jobs):
    jobs.run(work.token_counts, name=f"mp{jobs.world}", counts=[0, 1, 2, 7, 127, 128, 129, 255])


@pytest.mark.parametrize("variant", [*VARIANTS, "_large"])
def test_bits_are_those_of_virtual_ranks_on_one_gpu(jobs, variant):
    name = f"mp{jobs.world}{variant}"
    cases = [("uniform", 11), ("skewed", 12), ("ragged", 13), ("masked", 14)]
    real = jobs.run(work.outputs, name=name, cases=cases)
    virtual = jobs.run(work.virtual_outputs, name=name, cases=cases)[0]
    for number, case in enumerate(cases):
        for rank in range(jobs.world):
            one, other = real[rank][number], virtual[number][rank]
            assert one.shape == other.shape
            assert numpy.array_equal(one, other), f"rank {rank}, {case}: {(one != other).sum()}"


@pytest.mark.parametrize("variant", ["", "_block", "_channel", "_mxfp4"])
def test_staged_input_narrow_indices_and_out(jobs, variant):
    jobs.run(work.input_buffer, name=f"mp{jobs.world}{variant}")


@pytest.mark.parametrize("variant", ["", "_block", "_shared"])
def test_received_rows_are_counted(jobs, variant):
    jobs.run(work.counted_rows, name=f"mp{jobs.world}{variant}")


@pytest.mark.parametrize("variant", ["", "_block"])
def test_two_layers_share_a_workspace(jobs, variant):
    jobs.run(work.share_a_workspace, name=f"mp{jobs.world}{variant}", rounds=50)


@pytest.mark.parametrize("free", [False, True])
def test_experts_of_a_model_are_split(jobs, free):
    routings = ["uniform", "ragged", "masked"]
    jobs.run(work.experts_of_a_model, name=f"mp{jobs.world}", routings=routings, free=free)
