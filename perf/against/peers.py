"""Measured figures of other implementations (`perf/results/peers.csv`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perf.recording.columns import FILLED, POSITIVE, column
from perf.recording.environment import REPOSITORY
from perf.recording.files import load

#: Measured figures of other implementations: balanced routing, a rank per GPU, slowest rank.
PEERS = REPOSITORY / "perf" / "results" / "peers.csv"


@dataclass(frozen=True, kw_only=True)
class PeerRow:
    """One figure of another implementation."""

    source: str
    gpu: str = column(FILLED)
    num_ranks: int = column(POSITIVE)
    model: str = column(FILLED)
    tokens: int = column(POSITIVE)
    us: float = column(POSITIVE)
    date: str = column(FILLED)
    precision: str = column(FILLED)


def load_peers(path: str | Path):
    """The peers' figures: a pandas DataFrame; ValueError as `files.load`."""
    return load(path, kind=PeerRow)
