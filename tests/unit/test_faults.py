"""Error records: what the host says about a launch that did not finish."""

from __future__ import annotations

import pytest

from megamoe import faults
from megamoe.config import MoEConfig
from workspace.layout import layout_of

LAYOUT = layout_of(MoEConfig(32, 4, 256, 256, 64, num_ranks=8))


def record(**words):
    out = [0] * faults.RECORD_WORDS
    for name, value in words.items():
        out[getattr(faults, name.upper())] = value
    return out


def test_no_error():
    assert faults.error_of(record(), LAYOUT) is None
    assert faults.error_of(record(rank=3, seen=9), LAYOUT) is None


@pytest.mark.parametrize("region", LAYOUT.regions)
@pytest.mark.parametrize("role", range(len(faults.ROLES)))
def test_timeout_names_everything(role, region):
    words = record(
        status=faults.TIMED_OUT,
        rank=5,
        role=role,
        region=LAYOUT.index(region),
        index=17,
        expected=128,
        seen=-3,
        cta=77,
    )
    error = faults.error_of(words, LAYOUT)
    assert type(error) is faults.LaunchTimeout
    assert str(error) == (
        f"launch timed out: rank 5, role {faults.ROLES[role]}: waited for {region}[17] "
        "to reach 128, saw -3 (CTA 77)"
    )


@pytest.mark.parametrize("token", [0, 1, 63])
@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("value", [-2, 32, 2**31 - 1, -(2**31), 2**32 + 1, -(2**32) - 1, 2**62])
def test_bad_expert_names_the_entry(token, slot, value):
    low = (value + 2**31) % 2**32 - 2**31  # as the kernel cuts an int64 in two
    words = record(
        status=faults.BAD_EXPERT,
        rank=2,
        index=token * 4 + slot,
        expected=32,
        seen=low,
        seen_high=value >> 32,
    )
    error = faults.error_of(words, LAYOUT)
    assert type(error) is faults.InvalidExpertError
    assert f"topk_idx[{token}, {slot}] = {value} on rank 2" in str(error)
    assert "-1..31" in str(error) and "num_experts=32" in str(error)


def test_errors_can_be_caught_by_kind():
    assert issubclass(faults.LaunchTimeout, faults.MegaMoEError)
    assert issubclass(faults.InvalidExpertError, faults.MegaMoEError)
    assert issubclass(faults.InvalidExpertError, ValueError)
    assert issubclass(faults.MegaMoEError, RuntimeError)
    assert not issubclass(faults.LaunchTimeout, ValueError)


def test_roles_are_numbered_by_position():
    for name in faults.ROLES:
        assert faults.ROLES[getattr(faults, f"ROLE_{name.upper()}")] == name


def test_words_of_a_record_are_distinct():
    fields = [
        "STATUS",
        "RANK",
        "ROLE",
        "REGION",
        "INDEX",
        "EXPECTED",
        "SEEN",
        "CTA",
        "PEER",
        "SEEN_HIGH",
    ]
    words = [getattr(faults, name) for name in fields]
    assert len(set(words)) == len(words) and max(words) < faults.RECORD_WORDS
    assert faults.OK == 0, "a zeroed record reports no error"
    assert len({faults.OK, faults.TIMED_OUT, faults.BAD_EXPERT}) == 3
