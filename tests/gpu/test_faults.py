"""Launches that cannot finish, or should not have been started, end with an error and leave a
usable module.
"""

from __future__ import annotations

import time

import pytest
import torch

from megamoe import (
    InvalidExpertError,
    LaunchTimeout,
    LayerMismatch,
    NotRecovered,
    PeerFailed,
    faults,
)
from megamoe.streams import side_by_side
from tests.gpu.harness import (
    assert_at_rest,
    assert_correct,
    expected_of,
    forward,
    inputs_of,
    make_moe,
)

pytestmark = pytest.mark.gpu


def launch_only(moe, ranks, xs, ids, weights):
    """Start the launches of some ranks, as if the others had died."""
    streams = moe.backend.streams
    with side_by_side():
        for rank in ranks:
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
    with pytest.raises(LaunchTimeout, match="launch timed out: .*rank 0, role"):
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


def test_a_launch_of_another_layer_is_named():
    """Ranks that are out of step by a layer would send tokens through other weights."""
    moe = make_moe("small4")
    inputs = inputs_of(moe, "uniform", seed=4)
    moe.backend.launchers[2].set(layer=7)
    with pytest.raises(LayerMismatch, match=r"rank \d has launched layer \d and rank \d layer \d"):
        forward(moe, *inputs)
    moe.backend.launchers[2].set(layer=0)
    assert_at_rest(moe)
    assert_correct(moe, forward(moe, *inputs), *inputs)


@pytest.mark.parametrize("name", ["small4", "block4"])
@pytest.mark.parametrize("refuses", [0, 3])
def test_a_rank_that_refuses_ends_the_others_at_once(name, refuses):
    moe = make_moe(name, timeout_s=20.0)
    xs, ids, weights = inputs_of(moe, "uniform", seed=4)
    expected = forward(moe, xs, ids, weights)
    torch.cuda.synchronize()
    started = time.monotonic()
    stream = moe.backend.streams.streams[refuses].cuda_stream
    with side_by_side():
        launch_only(moe, [rank for rank in range(4) if rank != refuses], xs, ids, weights)
        moe.backend.launchers[refuses](stream, x=0, num_tokens=faults.NO_INPUT)
    with pytest.raises(PeerFailed, match=f"rank {refuses} refused its input"):
        moe.synchronize()
    assert time.monotonic() - started < 1.0
    assert_at_rest(moe)
    again = forward(moe, xs, ids, weights)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_launches_behind_a_refusal_do_nothing_until_recovery():
    moe = make_moe("small2")
    xs, ids, weights = inputs_of(moe, "uniform", seed=4)
    stream = moe.backend.streams.streams[0].cuda_stream
    moe.backend.launchers[0](stream, x=0, num_tokens=faults.NO_INPUT)
    torch.cuda.synchronize()
    assert not moe.workspace.health.reported  # who refused has an error of its own
    launch_only(moe, [0], xs, ids, weights)
    with pytest.raises(NotRecovered):
        moe.synchronize()
    assert_correct(moe, forward(moe, xs, ids, weights), xs, ids, weights)


def test_ctas_that_never_become_resident_are_told_from_a_rank_that_is_late():
    """Another stream holds some SMs: a launch on 32 of them, whose other rank does not come."""
    total = torch.cuda.get_device_properties(0).multi_processor_count
    holder = make_moe("small2", timeout_s=1.5, num_sms=32)
    moe = make_moe("small1", timeout_s=5.0, start_timeout_s=0.2)
    waited_for = inputs_of(holder, "uniform", seed=4)
    xs, ids, weights = inputs_of(moe, "uniform", seed=4)
    torch.cuda.synchronize()
    launch_only(holder, [0], *waited_for)
    time.sleep(0.05)
    moe(xs[0], ids[0], weights[0])
    expected = rf"only {total - 32} of {total} CTAs became resident.*num_sms={total - 32}"
    with pytest.raises(LaunchTimeout, match=expected):
        moe.synchronize()
    with pytest.raises(LaunchTimeout, match="rank 1 did not begin within start_timeout_s=1.5"):
        holder.synchronize()
    assert_correct(moe, forward(moe, xs, ids, weights), xs, ids, weights)


@pytest.mark.parametrize("name", ["small2", "block4", "channel4", "mxfp44"])
@pytest.mark.parametrize("clamp", [None, 7.0])
def test_nan_stays_nan_behind_a_clamp(name, clamp):
    """min.f32 returns the operand that is no NaN, and would turn it into the limit."""
    moe = make_moe(name, activation_clamp=clamp)
    xs, ids, weights = inputs_of(moe, "uniform", seed=9)
    xs[1][0, 0] = float("nan")
    ys = forward(moe, xs, ids, weights)
    expected = expected_of(moe, xs, ids, weights, rounding=True)
    assert ys[1][0].isnan().all() and expected[1][0].isnan().all()
    assert all(torch.equal(y.isnan(), e.isnan()) for y, e in zip(ys, expected, strict=True))
    assert ys[1][1:].isfinite().all()
