"""The command `compare`: two result files, measurement by measurement, and what got slower.

Rows of A (before) and B (after) are joined on what identifies a measurement, KEY. Several rows of
one measurement in a file count as one: the median of their medians, the least minimum, the largest
p95.

When is a difference more than noise? A row has no list of repetitions, only their minimum, median
and p95. Of some 30 normal repetitions the minimum lies 2.04 and the p95 1.61 standard deviations
from the mean, so (p95 - min) / SIGMAS is their standard deviation s, whatever shape the upper tail
beyond the p95 has. The medians of two runs may differ by noise = hypot(s_A, s_B), relative to each
row's median. A median of 20 independent repetitions has a standard error of 0.28 s, so one s is
over three of its errors; the rest is room for repetitions that drift together, as clocks do. Two
calm rows have hardly any spread within a run, yet clocks, temperature and memory placement differ
between runs: hence a least noise, FLOOR. Published measurements that were repeated at one commit on
H200 (2026-11) lay within 1.6 %. B is slower where B / A > 1 + noise, faster where A / B > 1 +
noise. Times of a CPU depend on whatever else it does: they are
shown and not judged, unless a threshold is given.

B is wrong, however fast, where its relative error is infinite, as for an output with NaN, or more
than ERROR_FACTOR times the larger of A's and ROUNDING; the larger error of several rows counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf, isinf, isnan, nan
from pathlib import Path
from statistics import median

from perf.arguments import option, path_name, percent
from perf.recording.columns import KEY
from perf.recording.environment import EMULATION
from perf.recording.files import load

SUMMARY = "join two result files and flag what got slower beyond noise, or wrong (exit status 1)"

#: Inputs come from a seed: errors repeat to the last digit, and from 8 tokens on those of all the
#: layers in one precision lie within a factor of 2 (H200, 2026-11).
ERROR_FACTOR = 3
#: About what rounding to BF16 costs. An error may be 0; sums in another order end that.
ROUNDING = 1e-3

EPILOG = (
    "B is slower where its median is more than the noise above A's; noise comes from both rows' "
    "spread, with a floor. B is wrong where its error (error_rel) is not finite or more than "
    f"{ERROR_FACTOR} times the larger of A's and {ROUNDING:g}. Exit status: 0 if "
    "nothing is slower or wrong, 1 if something is, 2 for wrong arguments."
)

SIGMAS = 3.65
FLOOR = 0.03
#: A slowdown of this size should be seen; rows too noisy for it are counted in the summary.
VISIBLE = 0.10

SAME, FASTER, SLOWER, UNJUDGED = "same", "faster", "slower", "not judged"
WRONG = "wrong"
OK, GOT_WORSE = 0, 1


@dataclass(frozen=True)
class Timing:
    """Microseconds of one measurement, and its relative error; NaN if nobody checked."""

    us_min: float
    us_median: float
    us_p95: float
    error_rel: float = nan

    @property
    def sigma(self) -> float:
        """Standard deviation of a repetition as a part of the median."""
        return (self.us_p95 - self.us_min) / SIGMAS / self.us_median


@dataclass(frozen=True)
class Pair:
    """One measurement in both files, and the floor of its noise as a part (0.03 is 3 %); infinite
    where times mean nothing.
    """

    key: tuple
    before: Timing
    after: Timing
    floor: float

    @property
    def ratio(self) -> float:
        """Time after / time before: above 1 is slower."""
        return self.after.us_median / self.before.us_median

    @property
    def noise(self) -> float:
        """Part by which the medians may differ without meaning anything."""
        return max(self.floor, hypot(self.before.sigma, self.after.sigma))

    @property
    def verdict(self) -> str:
        if is_wrong(self.after, self.before):
            return WRONG
        if isinf(self.floor):
            return UNJUDGED
        if self.ratio > 1 + self.noise:
            return SLOWER
        return FASTER if 1 / self.ratio > 1 + self.noise else SAME


def is_wrong(after: Timing, before: Timing | None = None) -> bool:
    """Whether an error is no rounding, or clearly above the one before."""
    limit = ERROR_FACTOR * max(before.error_rel, ROUNDING) if before else nan  # NaN stays NaN
    return isinf(after.error_rel) or after.error_rel > limit


def measurements(path: str | Path) -> tuple[dict[tuple, Timing], list[str]]:
    """(timing of every KEY, commits) of a result file; ValueError if it cannot be read or has no
    rows.
    """
    frame = load(path)
    if frame.empty:
        raise ValueError(f"{path} has no rows")
    times = frame[["us_min", "us_median", "us_p95", "error_rel"]]
    rows: dict[tuple, list[Timing]] = {}
    for key, time in zip(
        frame[list(KEY)].itertuples(index=False, name=None),
        times.itertuples(index=False, name=None),
        strict=True,
    ):
        rows.setdefault(key, []).append(Timing(*map(float, time)))
    pooled = {
        key: Timing(
            min(row.us_min for row in same),
            median(row.us_median for row in same),
            max(row.us_p95 for row in same),
            max((row.error_rel for row in same if not isnan(row.error_rel)), default=nan),
        )
        for key, same in rows.items()
    }
    return pooled, list(dict.fromkeys(frame.commit.astype(str).str.slice(0, 7)))


def pairs_of(
    before: dict[tuple, Timing], after: dict[tuple, Timing], threshold: float | None = None
) -> list[Pair]:
    """The measurements that both sides have, in the order of `before`; `threshold` replaces the
    floors.
    """

    def floor(key: tuple) -> float:
        if threshold is not None:
            return threshold
        return inf if key[KEY.index("gpu")] == EMULATION else FLOOR

    return [Pair(key, before[key], after[key], floor(key)) for key in before if key in after]


def describe(key: tuple) -> str:
    """A measurement in one line."""
    k = dict(zip(KEY, key, strict=True))
    shape = f"{k['model']} {k['hidden']}/{k['intermediate']}/{k['num_experts']}/{k['top_k']}"
    shape += f"+{k['num_shared_experts']}" if k["num_shared_experts"] else ""
    ranks = f"EP{k['num_ranks']}" + (f" on {n} GPU(s)" if (n := _gpus(k)) != k["num_ranks"] else "")
    rest = f"{k['precision']} {k['routing']} {k['mode']} {k['impl']}"
    return f"{k['gpu']} {ranks}  {shape}  {k['tokens']} tokens  {rest}"


def _gpus(k: dict) -> int:
    return k["num_ranks"] // k["ranks_per_gpu"]


def table(pairs: Sequence[Pair]) -> str:
    """Every pair in a line, widths fitted."""
    titles = ("measurement", "A us", "B us", "B / A", "A min..p95", "B min..p95", "noise", "B is")
    lines = [
        (
            describe(pair.key),
            f"{pair.before.us_median:.1f}",
            f"{pair.after.us_median:.1f}",
            f"{pair.ratio:.3f}",
            _range(pair.before),
            _range(pair.after),
            "-" if isinf(pair.noise) else f"{pair.noise:.1%}",
            pair.verdict,
        )
        for pair in pairs
    ]
    widths = [max(len(line[i]) for line in (titles, *lines)) for i in range(len(titles))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in (titles, *lines)
    )


def _range(timing: Timing) -> str:
    low, high = timing.us_min / timing.us_median - 1, timing.us_p95 / timing.us_median - 1
    return f"{low:+.1%}..{high:+.1%}"


@dataclass(frozen=True)
class Options:
    before: str = option("rows to compare with", "before", type=path_name, metavar="A.csv")
    after: str = option("rows to judge", "after", type=path_name, metavar="B.csv")
    threshold: float | None = option(
        f"least difference that counts (default: {100 * FLOOR:g}; a CPU's times are judged only if "
        "this is given); the rows' own spread may ask for more",
        type=percent,
        metavar="PERCENT",
    )


def run(options: Options) -> int:
    """Print the comparison: 0 if nothing got slower beyond noise, or wrong, else 1; ValueError for
    files that cannot be compared.
    """
    (before, commits_a), (after, commits_b) = map(measurements, (options.before, options.after))
    pairs = pairs_of(before, after, options.threshold)
    if not pairs:
        raise ValueError(f"{options.before} and {options.after} have no measurement in common")
    print(f"A: {options.before}, commit {', '.join(commits_a)}")
    print(f"B: {options.after}, commit {', '.join(commits_b)}")
    print(table(pairs))
    for name, own, other in (("A", before, after), ("B", after, before)):
        only = [key for key in own if key not in other]
        if only:
            print(f"only in {name} ({len(only)}):")
            print("\n".join(f"  {describe(key)}" for key in only))
    wrong = {key: mine for key, mine in after.items() if is_wrong(mine, before.get(key))}
    if wrong:
        print(f"wrong in B ({len(wrong)}):")
    for key, mine in wrong.items():
        known = f", {before[key].error_rel:.2e} in A" if key in before else ""
        print(f"  {describe(key)}: error {mine.error_rel:.2e}{known}")
    count = Counter(pair.verdict for pair in pairs)
    count[WRONG] = len(wrong)
    words = (SLOWER, FASTER, SAME, *(word for word in (UNJUDGED, WRONG) if count[word]))
    print(", ".join(f"{count[word]} {word}" for word in words))
    if count[UNJUDGED]:
        print("times of a CPU say nothing of a GPU; --threshold judges them all the same")
    blind = sum(VISIBLE < pair.noise < inf for pair in pairs)
    if blind:
        print(f"{blind} measurement(s) too noisy to show a difference of {VISIBLE:.0%}")
    return GOT_WORSE if count[SLOWER] or count[WRONG] else OK
