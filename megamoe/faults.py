"""What a launch reports when it cannot finish: the error record, its words and the Python errors
made from it.

The kernel writes one record of int32 words into host-visible memory, the status last. Owns the
numbering of roles, of statuses and of record words. `ERRORS.md` beside this file says what a user
can do about each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megamoe import wire
from megamoe.ordering import COUNTED, RANKS_MET, flag_of
from megamoe.regions import LayerLayout

#: Roles of the kernel that wait for other CTAs or ranks, numbered by position.
ROLES = ("count", "dispatch", "load_tokens", "combine")
ROLE_COUNT, ROLE_DISPATCH, ROLE_LOAD_TOKENS, ROLE_COMBINE = range(len(ROLES))
#: The role whose waits are for CTAs and ranks to begin the launch; all others are for what has.
STARTING = ROLE_COUNT


class Record(NamedTuple):
    """The words of a record, in order."""

    status: int = 0
    rank: int = 0
    role: int = 0  # its number in ROLES
    region: int = 0  # its number in the region table
    index: int = 0  # type: ignore[assignment]  # hides tuple.index
    expected: int = 0
    seen: int = 0
    cta: int = 0
    peer: int = 0  # as `wire.encode_peer`
    seen_high: int = 0  # upper half of an expert id of 64 bits


STATUS = Record._fields.index("status")
RECORD_WORDS = 16

#: Values of `Record.status`. PEER_FAILED: a wait ended because another rank gave up, `peer` says
#: which and why. NOT_RECOVERED: a launch (a graph replay, say) met the state that a
#: failed launch left behind. WRONG_LAYER: another rank has launched another layer. REFUSED: a rank
#: has refused its input; only its peers report it.
OK, TIMED_OUT, BAD_EXPERT, PEER_FAILED, NOT_RECOVERED, WRONG_LAYER, REFUSED = range(7)
#: `num_tokens` of the launch of a rank that has refused its input: it only tells its peers.
NO_INPUT = -1


class MegaMoEError(RuntimeError):
    """A launch failed after it began."""


class LaunchFailed(MegaMoEError):
    """A launch ended before its work was done. Outputs mean nothing; the next forward returns the
    workspace to its first state, together with every rank.
    """


class LaunchTimeout(LaunchFailed):
    """A wait inside the kernel was not satisfied in time."""


class PeerFailed(LaunchFailed):
    """A launch ended early because another rank's launch had failed, or had refused its input."""


class LayerMismatch(LaunchFailed):
    """Ranks have launched different layers: one has left out a forward."""


class NotRecovered(LaunchFailed):
    """A launch met the state that a failed launch had left, and did nothing."""


class InvalidExpertError(ValueError, MegaMoEError):
    """A launch met an expert id that is neither -1 nor below E; the slot was treated as masked."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a launch may wait: for CTAs and ranks to begin, and for those that have."""

    timeout_s: float
    start_timeout_s: float


def describe_wait(rank: int, role: str, region: str, index: int, expected: int, seen: int) -> str:
    return f"rank {rank}, role {role}: waited for {region}[{index}] to reach {expected}, saw {seen}"


def describe_invalid_expert(rank: int, token: int, slot: int, value: int, experts: int) -> str:
    return (
        f"topk_idx[{token}, {slot}] = {value} on rank {rank} is not in -1..{experts - 1} "
        f"(num_experts={experts})"
    )


def error_of(
    words: Sequence[int], layout: LayerLayout, limits: Limits, reasons: dict[int, str] | None = None
) -> MegaMoEError | None:
    """The error that the words of a record describe, or None. `reasons`: why a rank has refused its
    input, as far as it is known.
    """
    record = Record(*words[: len(Record._fields)])
    status, rank, index = record.status, record.rank, record.index
    if status == OK:
        return None
    if status == BAD_EXPERT:
        token, slot = divmod(index, layout.config.top_k)
        value = (record.seen_high << 32) + (record.seen & 0xFFFFFFFF)
        return InvalidExpertError(
            describe_invalid_expert(rank, token, slot, value, record.expected)
            + "; the slot was treated as masked"
        )
    if status == NOT_RECOVERED:
        return NotRecovered(
            f"rank {rank}: an earlier launch failed and the workspace was not recovered"
        )
    if status == WRONG_LAYER:
        return LayerMismatch(
            f"rank {rank} has launched layer {record.expected} and rank {index} layer "
            f"{record.seen}: one of them has left out a forward (layers are numbered in the order "
            "in which they were made)"
        )
    region = list(layout.regions)[record.region]
    wait = describe_wait(rank, ROLES[record.role], region, index, record.expected, record.seen)
    flag = flag_of(region, index)
    wait = f"{wait} (CTA {record.cta}{f'; {flag}' if flag else ''})"
    if status == PEER_FAILED:
        peer, why = wire.decode_peer(record.peer)
        if why == REFUSED:
            reason = (reasons or {}).get(peer, "see its error")
            return PeerFailed(f"launch ended because rank {peer} refused its input: {reason}")
        if why == WRONG_LAYER:
            return PeerFailed(f"launch ended because rank {peer} met a launch of another layer")
        return PeerFailed(f"launch ended because rank {peer} gave up: {wait}")
    return LaunchTimeout(f"launch timed out: {_cause(record, region, limits)}{wait}")


def _cause(record: Record, region: str, limits: Limits) -> str:
    """What a wait that timed out says about the machine."""
    if record.role != STARTING:
        return f"nothing for timeout_s={limits.timeout_s:g}: "
    limit = f"within start_timeout_s={limits.start_timeout_s:g}: "
    flag = flag_of(region, record.index)
    if flag == RANKS_MET:
        return f"rank {record.index} did not begin {limit}"
    if flag == COUNTED:
        return (
            f"only {record.seen} of {record.expected} CTAs became resident, another kernel holds "
            f"SMs of this GPU; leave it some with num_sms={record.seen} or less, {limit}"
        )
    return limit
