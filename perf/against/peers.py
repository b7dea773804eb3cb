"""Measured figures of other implementations (`perf/results/peers.csv`)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from perf.recording.results import REPOSITORY, load

#: Measured figures of other implementations: balanced routing, a rank per GPU, slowest rank.
PEERS = REPOSITORY / "perf" / "results" / "peers.csv"


@dataclass(frozen=True)
class PeerRow:
    """One figure of another implementation."""

    source: str
    gpu: str
    num_ranks: int
    model: str
    tokens: int
    us: float
    date: str
    precision: str


PEER_COLUMNS = tuple(field.name for field in fields(PeerRow))


def load_peers(path: str | Path):
    """The peers' figures: a pandas DataFrame; ValueError as `results.load`."""
    return load(path, kind=PeerRow)
