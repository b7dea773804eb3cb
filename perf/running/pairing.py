"""The statistics of a duel: who goes when, and how far apart they are.

In a round every contender has one batch per case, in turns; every second round goes backwards, so
that a drift (heat, clocks) falls on all alike. A contender's time in a round is compared with that
of the first in the same round. The ratio is the median of these pairs, and its interval runs from
one pair to another such that it holds the true median with 95 %, whatever the distribution: from
the least to the largest pair of up to 8, from the second to the last but one of 9 to 11, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import TypeVar

Batch = TypeVar("Batch")

COVERAGE = 0.95
#: So many pairs are needed for that.
LEAST = 6
SAME, FASTER, SLOWER, OPEN = "same", "faster", "slower", "open"


def turns(contenders: int, number: int) -> list[int]:
    """The order in round `number`: A B, B A, A B, ..."""
    order = list(range(contenders))
    return order[::-1] if number % 2 else order


def fought(
    cases: int, contenders: int, rounds: int, batch: Callable[[int, int], Batch]
) -> list[list[list[Batch]]]:
    """What `batch(case, contender)` returns, by case, contender and round."""
    found: list[list[list[Batch]]] = [[[] for _ in range(contenders)] for _ in range(cases)]
    for number in range(rounds):
        for case in range(cases):
            for contender in turns(contenders, number):
                found[case][contender].append(batch(case, contender))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of their median; of fewer than LEAST the least and the largest, which hold it with less."""
    ordered, count = sorted(values), len(values)
    left_out, below = 0, 1  # of the 2^count ways to lie about the median those that miss on a side
    while 2 * (below + comb(count, left_out + 1)) <= (1 - COVERAGE) * 2**count:
        left_out += 1
        below += comb(count, left_out)
    return ordered[left_out], ordered[count - 1 - left_out]


@dataclass(frozen=True)
class Ratio:
    """Time / time of the first, with its interval."""

    value: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """Whether the interval leaves out 1."""
        if self.pairs < LEAST:
            return OPEN
        if self.low > 1:
            return SLOWER
        return FASTER if self.high < 1 else SAME


def ratio_of(us: Sequence[float], first: Sequence[float]) -> Ratio:
    """Of a contender's time in every round to the first's."""
    pairs = [mine / other for mine, other in zip(us, first, strict=True)]
    return Ratio(median(pairs), *interval(pairs), len(pairs))
