"""Launches that cannot finish, or should not have been started, end with an error and leave a
usable module.
"""

from __future__ import annotations

import pytest
import torch

from megamoe import InvalidExpertError, LaunchTimeout
from tests.gpu.harness import assert_at_rest, assert_correct, forward, inputs_of, make_moe

pytestmark = pytest.mark.gpu


def launch_only(moe, ranks, xs, ids, weights):
    """Start the launches of some ranks, as if the others had died."""
    for rank in ranks:
        streams = moe.backend.streams
        stream = torch.cuda.current_stream() if streams is None else streams.streams[rank]
        stream, y = stream.cuda_stream, moe.backend.outputs[rank]
        moe.backend.launch(rank, xs[rank], ids[rank], weights[rank], y, stream)


@pytest.mark.parametrize("missing", [0, 3])
def test_a_missing_rank_times_out_by_name_and_the_next_forward_works(missing):
    moe = make_moe("small4", timeout_s=0.2)
    inputs = inputs_of(moe, "uniform", seed=4)
    torch.cuda.synchronize()
    launch_only(moe, [rank for rank in range(4) if rank != missing], *inputs)
    with pytest.raises(
        LaunchTimeout, match=rf"nvlink_barrier_signal\[{missing}\] to reach 1, saw 0"
    ) as caught:
        moe.synchronize()
    assert "role count" in str(caught.value)
    assert_at_rest(moe)
    assert_correct(moe, forward(moe, *inputs), *inputs)


def test_a_timeout_inside_the_pipeline_names_the_counter():
    moe = make_moe("small1", timeout_s=0.2)
    inputs = inputs_of(moe, "uniform", seed=4)
    views = moe.workspace.regions(0)
    views["l1_arrival_count"].fill_(-(1 << 20))  # rows never seem to arrive
    moe(inputs[0][0], inputs[1][0], inputs[2][0])
    with pytest.raises(
        LaunchTimeout, match=r"rank 0, role load_tokens: waited for l1_arrival_count"
    ):
        moe.synchronize()
    assert_correct(moe, forward(moe, *inputs), *inputs)


@pytest.mark.parametrize("name", ["small1", "small2"])
def test_launches_queued_behind_a_failed_one_do_nothing(name):
    """With counters that the failed launch left, positions would grow beyond the tables."""
    moe = make_moe(name, timeout_s=0.2)
    xs, ids, weights = inputs_of(moe, "uniform", seed=4)
    views = moe.workspace.regions(0)
    if name == "small1":  # fails after the first barrier: rows never seem to arrive
        views["l1_arrival_count"].fill_(-(1 << 20))
    torch.cuda.synchronize()
    launch_only(moe, [0], xs, ids, weights)  # of two ranks: fails in the first barrier
    torch.cuda.synchronize()
    written = ("expert_send_count", "grid_sync_counter", "routed_record", "expert_recv_count")
    before = {key: views[key].clone() for key in written}
    invalid = [torch.full_like(idx, 99) for idx in ids]
    for queued in (ids, ids, invalid):
        launch_only(moe, [0], xs, queued, weights)
    torch.cuda.synchronize()
    assert all(torch.equal(views[key], before[key]) for key in written)
    with pytest.raises(LaunchTimeout, match="launch timed out: rank 0, role"):
        moe.synchronize()
    assert_correct(moe, forward(moe, xs, ids, weights), xs, ids, weights)
    assert_at_rest(moe)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [16, -2, 2**31 - 1])
def test_invalid_expert_ids_are_reported_and_never_written(bad, dtype):
    moe = make_moe("small2")
    xs, ids, weights = inputs_of(moe, "uniform", seed=6, dtype=dtype)
    ids[1][5, 2] = bad
    with pytest.raises(InvalidExpertError, match=rf"topk_idx\[5, 2\] = {bad} on rank 1"):
        forward(moe, xs, ids, weights)
    masked = [idx.clone() for idx in ids]
    masked[1][5, 2] = -1
    assert_correct(moe, moe.backend.outputs, xs, masked, weights)
    assert_at_rest(moe)
    assert_correct(moe, forward(moe, xs, masked, weights), xs, masked, weights)


@pytest.mark.parametrize("bad", [2**32 + 1, -(2**32), 2**62])
def test_ids_beyond_32_bits_are_invalid(bad):
    moe = make_moe("small2")
    xs, ids, weights = inputs_of(moe, "uniform", seed=6)
    ids[0][0, 0] = bad
    with pytest.raises(InvalidExpertError, match=rf"topk_idx\[0, 0\] = {bad} on rank 0"):
        forward(moe, xs, ids, weights)


def test_bad_tensors_raise_before_any_launch():
    moe = make_moe("small2")
    xs, ids, weights = inputs_of(moe, "uniform", seed=6)
    with pytest.raises(ValueError, match=r"x\[1\] is on device cpu"):
        moe([xs[0], xs[1].cpu()], ids, weights)
    with pytest.raises(ValueError, match=r"topk_weights\[0\] has dtype torch.bfloat16"):
        moe(xs, ids, [weights[0].bfloat16(), weights[1]])
    with pytest.raises(ValueError, match="max_tokens_per_rank"):
        moe([xs[0].repeat(2, 1), xs[1]], ids, weights)
    with pytest.raises(ValueError, match="num_sms"):
        make_moe("small2", num_sms=100)
    assert_at_rest(moe)
