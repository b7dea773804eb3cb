"""Error records: what the host says about a launch that did not finish."""

from __future__ import annotations

import pytest

import megamoe
from megamoe import faults, wire
from megamoe.config import MoEConfig
from megamoe.ordering import COUNTED
from megamoe.regions import layout_of

LAYOUT = layout_of(MoEConfig(32, 4, 256, 256, 64, num_ranks=8))


LIMITS = faults.Limits(timeout_s=30.0, start_timeout_s=300.0)


def error_of(**words):
    return faults.error_of(faults.Record(**words), LAYOUT, LIMITS)


def test_no_error():
    assert error_of() is None
    assert error_of(rank=3, seen=9) is None


#: Who writes what is waited for, and what it must reach.
ORDERS = {
    "nvlink_barrier_signal": "; last CTA of every rank -> every CTA of every rank, "
    "epoch + 1 after count, + 2 before the last of the reduce",
    "l1_arrival_count": "; dispatch -> load_tokens, rows of the block",
    "fc1_done_counter": "; report -> load_tokens, FC1 tiles of the block",
    "fc2_done_counter": "; report -> report, dispatch, "
    "FC2 tiles of the block, 1 more when its ring slot is clean",
    "combine_arrival_count": "; report of every rank -> dispatch, report, math, "
    "0 from minus the live slots of the token",
}
WAITED = dict(rank=5, index=17, expected=128, seen=-3, cta=77)


@pytest.mark.parametrize("region", LAYOUT.regions)
@pytest.mark.parametrize("role", range(1, len(faults.ROLES)))
def test_timeout_names_everything(role, region):
    error = error_of(status=faults.TIMED_OUT, role=role, region=LAYOUT.index(region), **WAITED)
    assert type(error) is faults.LaunchTimeout
    assert str(error) == (
        f"launch timed out: nothing for timeout_s=30: rank 5, role {faults.ROLES[role]}: waited "
        f"for {region}[17] to reach 128, saw -3 (CTA 77{ORDERS.get(region, '')})"
    )


def test_a_rank_that_did_not_begin_is_another_case_than_one_that_stalls():
    region = LAYOUT.index("nvlink_barrier_signal")
    words = dict(status=faults.TIMED_OUT, region=region, rank=0, index=1, expected=7, seen=6, cta=2)
    late = str(error_of(role=faults.ROLE_COUNT, **words))
    assert late.startswith("launch timed out: rank 1 did not begin within start_timeout_s=300: ")
    stalled = str(error_of(role=faults.ROLE_COMBINE, **words))
    assert stalled.startswith("launch timed out: nothing for timeout_s=30: rank 0, role combine")


def test_ctas_that_never_became_resident_name_num_sms():
    region = LAYOUT.index("grid_sync_counter")
    error = error_of(
        status=faults.TIMED_OUT, role=faults.ROLE_COUNT, region=region, index=COUNTED.row,
        rank=2, expected=132, seen=100, cta=5,
    )  # fmt: skip
    assert type(error) is faults.LaunchTimeout
    assert "only 100 of 132 CTAs became resident, another kernel holds SMs" in str(error)
    assert "num_sms=100 or less, within start_timeout_s=300" in str(error)


@pytest.mark.parametrize(
    ("why", "text"),
    [
        (faults.TIMED_OUT, "rank 6 gave up: rank 5, role combine: waited for"),
        (faults.REFUSED, "rank 6 refused its input: x is on device cpu"),
        (faults.WRONG_LAYER, "rank 6 met a launch of another layer"),
    ],
)
def test_a_peer_that_failed_is_named_with_its_cause(why, text):
    words = faults.Record(
        status=faults.PEER_FAILED, role=faults.ROLE_COMBINE, region=0,
        peer=wire.encode_peer(6, why), **WAITED,
    )  # fmt: skip
    error = faults.error_of(words, LAYOUT, LIMITS, {6: "x is on device cpu"})
    assert type(error) is faults.PeerFailed and text in str(error)
    assert wire.decode_peer(wire.encode_peer(71, why)) == (71, why)


def test_a_refusal_without_a_known_reason_still_names_the_rank():
    error = error_of(status=faults.PEER_FAILED, peer=wire.encode_peer(3, faults.REFUSED))
    assert str(error) == "launch ended because rank 3 refused its input: see its error"


def test_a_launch_of_another_layer_names_both():
    error = error_of(status=faults.WRONG_LAYER, rank=0, index=1, expected=4, seen=3)
    assert type(error) is faults.LayerMismatch
    assert str(error).startswith("rank 0 has launched layer 4 and rank 1 layer 3: one of them has")


def test_an_unrecovered_workspace():
    error = error_of(status=faults.NOT_RECOVERED, rank=1)
    assert type(error) is faults.NotRecovered and "was not recovered" in str(error)


@pytest.mark.parametrize("token", [0, 1, 63])
@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("value", [-2, 32, 2**31 - 1, -(2**31), 2**32 + 1, -(2**32) - 1, 2**62])
def test_bad_expert_names_the_entry(token, slot, value):
    low = (value + 2**31) % 2**32 - 2**31  # as the kernel cuts an int64 in two
    words = faults.Record(
        status=faults.BAD_EXPERT,
        rank=2,
        index=token * 4 + slot,
        expected=32,
        seen=low,
        seen_high=value >> 32,
    )
    error = faults.error_of(words, LAYOUT, LIMITS)
    assert type(error) is faults.InvalidExpertError
    assert f"topk_idx[{token}, {slot}] = {value} on rank 2" in str(error)
    assert "-1..31" in str(error) and "num_experts=32" in str(error)


def test_errors_can_be_caught_by_kind():
    assert issubclass(faults.LaunchFailed, faults.MegaMoEError)
    for kind in ("LaunchTimeout", "PeerFailed", "LayerMismatch", "NotRecovered"):
        assert issubclass(getattr(megamoe, kind), megamoe.LaunchFailed)
    assert issubclass(faults.InvalidExpertError, faults.MegaMoEError)
    assert issubclass(faults.InvalidExpertError, ValueError)
    assert issubclass(faults.MegaMoEError, RuntimeError)
    assert not issubclass(faults.LaunchTimeout, ValueError)


def test_roles_are_numbered_by_position():
    for name in faults.ROLES:
        assert faults.ROLES[getattr(faults, f"ROLE_{name.upper()}")] == name


def test_a_record_fits_and_says_nothing_at_first():
    assert len(faults.Record._fields) <= faults.RECORD_WORDS
    assert error_of() is None
    words = [7 * (n + 1) for n in range(faults.RECORD_WORDS)]  # as the host reads it, with the rest
    words[faults.STATUS] = faults.WRONG_LAYER
    assert str(faults.error_of(words, LAYOUT, LIMITS)).startswith("rank 14 has launched layer 42")
    assert faults.OK == 0, "a zeroed record reports no error"
    statuses = "TIMED_OUT", "BAD_EXPERT", "PEER_FAILED", "NOT_RECOVERED", "WRONG_LAYER", "REFUSED"
    assert len({getattr(faults, name) for name in statuses} - {faults.OK}) == len(statuses)
