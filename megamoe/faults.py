"""What a launch reports when it cannot finish: the error record, its fields and the Python errors
made from it.

The kernel writes one record of int32 words into host-visible memory, `STATUS` last. Owns the
numbering of roles and of record fields; region numbers are positions in the region table.
"""

from __future__ import annotations

from workspace.layout import Layout

#: Roles of the kernel that wait for other CTAs or ranks, numbered by position.
ROLES = ("count", "dispatch", "load_tokens", "combine")
ROLE_COUNT, ROLE_DISPATCH, ROLE_LOAD_TOKENS, ROLE_COMBINE = range(len(ROLES))

#: Words of a record. SEEN_HIGH: upper half of an expert id of 64 bits.
STATUS, RANK, ROLE, REGION, INDEX, EXPECTED, SEEN, CTA, PEER, SEEN_HIGH = range(10)
RECORD_WORDS = 16

#: Values of STATUS. PEER_FAILED: a wait ended because another rank gave up. NOT_RECOVERED: a launch
#: (a graph replay, say) met the state that a failed launch left behind.
OK, TIMED_OUT, BAD_EXPERT, PEER_FAILED, NOT_RECOVERED = range(5)


class MegaMoEError(RuntimeError):
    """A launch failed after it began."""


class LaunchTimeout(MegaMoEError):
    """A wait inside the kernel was not satisfied in time. The workspace must be recovered before
    the next launch.
    """


class PeerFailed(LaunchTimeout):
    """A launch ended early because another rank's launch had failed."""


class InvalidExpertError(ValueError, MegaMoEError):
    """A launch met an expert id that is neither -1 nor below E; the slot was treated as masked."""


def describe_wait(rank: int, role: str, region: str, index: int, expected: int, seen: int) -> str:
    return f"rank {rank}, role {role}: waited for {region}[{index}] to reach {expected}, saw {seen}"


def describe_invalid_expert(rank: int, token: int, slot: int, value: int, experts: int) -> str:
    return (
        f"topk_idx[{token}, {slot}] = {value} on rank {rank} is not in -1..{experts - 1} "
        f"(num_experts={experts})"
    )


def error_of(record: list[int], layout: Layout) -> MegaMoEError | None:
    """The error that a record describes, or None."""
    if record[STATUS] == OK:
        return None
    if record[STATUS] == BAD_EXPERT:
        token, slot = divmod(record[INDEX], layout.config.top_k)
        value = (record[SEEN_HIGH] << 32) + (record[SEEN] & 0xFFFFFFFF)
        return InvalidExpertError(
            describe_invalid_expert(record[RANK], token, slot, value, record[EXPECTED])
            + "; the slot was treated as masked"
        )
    if record[STATUS] == NOT_RECOVERED:
        return LaunchTimeout(
            f"rank {record[RANK]}: an earlier launch failed and the workspace was not recovered"
        )
    region = list(layout.regions)[record[REGION]]
    wait = describe_wait(
        record[RANK], ROLES[record[ROLE]], region, record[INDEX], record[EXPECTED], record[SEEN]
    )
    if record[STATUS] == PEER_FAILED:
        peer = record[PEER] - 1
        return PeerFailed(f"launch ended because rank {peer} gave up: {wait} (CTA {record[CTA]})")
    return LaunchTimeout(f"launch timed out: {wait} (CTA {record[CTA]})")
