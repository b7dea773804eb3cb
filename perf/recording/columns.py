"""The columns of result files: a kind of row is a dataclass, and its fields are its columns.

From this one declaration rows are made, written, read and checked. A field's type says what a cell
holds (None, an empty cell: not measured); `column` says what else must be true. A column
that a kind gets later is `added=True` and has a default, which stands for it in files from before.
Neighbour: `files` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from math import inf, nan
from typing import Any

from perf.workload.routings import ALIASES

#: Rules: it identifies a measurement, and is no empty text and no number but a positive one, or a
#: count; it is no empty text; a positive number; a time, which may be 0; a count, which may too.
IDENTIFIES, FILLED, POSITIVE, TIME = "identifies", "filled", "positive", "time"
COUNT = "count"


def column(
    *rules: str, default: object = MISSING, added: bool = False, read: Callable[[str], str] = str
) -> Any:
    """A column that obeys these rules. read: what a text in a file means today."""
    assert not added or default is not MISSING, "files from before need a default"
    return field(default=default, metadata={"rules": rules, "added": added, "read": read})


def columns_of(kind: type) -> tuple[str, ...]:
    """The header of a file of these rows."""
    return tuple(column.name for column in fields(kind))


def fits(header: list[str], kind: type) -> bool:
    """Whether a file with this header holds such rows, be it from before a column was added."""
    absent = [c for c in fields(kind) if c.name not in header]
    present = [c.name for c in fields(kind) if c.name in header]
    return header == present and all(c.metadata.get("added") for c in absent)


def cell_of(value: object) -> str:
    """What is written of a value."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def value_of(column: Field, cell: str | None) -> object:
    """What a cell holds; a number that was not measured is NaN, and without a cell it is the
    default. ValueError where that cannot be.
    """
    kind, *optional = column.type.split(" | ")
    if cell is None:
        return nan if column.default is None else column.default
    rules = column.metadata.get("rules", ())
    if not cell and (IDENTIFIES in rules or FILLED in rules):
        raise ValueError(f"{column.name} is empty")
    if kind == "str":
        return column.metadata["read"](cell) if column.metadata else cell
    if not cell and optional:
        return nan
    try:
        value = {"int": int, "float": float}[kind](cell)
    except ValueError:
        raise ValueError(f"{column.name} {cell!r} is no number") from None
    if COUNT in rules:
        if not 0 <= value < inf:
            raise ValueError(f"{column.name} {cell} is no count")
    elif (IDENTIFIES in rules or POSITIVE in rules) and not 0 < value < inf:
        raise ValueError(f"{column.name} {cell} is no positive number")
    if TIME in rules and not 0 <= value < inf:
        raise ValueError(f"{column.name} {cell} is no time")
    return value


@dataclass(frozen=True, kw_only=True)
class Environment:
    """When, from what source and where something was measured, as `environment` fills it in.

    date: UTC. dirty: 1 if tracked files differed from `commit`.
    """

    date: str = column(FILLED)
    commit: str
    dirty: int | None
    gpu: str = column(IDENTIFIES)
    driver: str
    torch: str
    dsl: str


@dataclass(frozen=True, kw_only=True)
class Launched(Environment):
    """What ran, as `Case.columns` fills it in. tokens: per rank."""

    num_ranks: int = column(IDENTIFIES)
    ranks_per_gpu: int = column(IDENTIFIES)
    model: str = column(IDENTIFIES)
    hidden: int = column(IDENTIFIES)
    intermediate: int = column(IDENTIFIES)
    num_experts: int = column(IDENTIFIES)
    top_k: int = column(IDENTIFIES)
    num_shared_experts: int = column(IDENTIFIES, COUNT, default=0, added=True)
    tokens: int = column(IDENTIFIES)
    precision: str = column(IDENTIFIES)
    routing: str = column(IDENTIFIES, read=lambda name: ALIASES.get(name, name))


@dataclass(frozen=True, kw_only=True)
class Row(Launched):
    """One measurement. Times are the maximum over ranks.

    mode: eager or graph; with a cold L2 eager-cold or graph-cold (`timing.mode_label`). tflops:
    useful, per GPU. error_rel: relative L2 error against the oracle, largest over ranks.
    *_bytes: of one rank's workspace. The last three: means of one GPU over the timed calls, the
    energy that of a launch (`nvml.Load`).
    """

    mode: str = column(IDENTIFIES)
    impl: str = column(IDENTIFIES)
    us_min: float = column(POSITIVE)
    us_median: float = column(POSITIVE)
    us_p95: float = column(POSITIVE)
    tflops: float | None = None
    roofline_us: float | None = column(TIME, default=None)
    roofline_bound: str = ""
    roofline_share: float | None = None
    error_rel: float | None = None
    reset_bytes: int | None = None
    workspace_bytes: int | None = None
    config: str = ""
    sm_mhz: float | None = column(default=None, added=True)
    power_w: float | None = column(default=None, added=True)
    energy_mj: float | None = column(default=None, added=True)


@dataclass(frozen=True, kw_only=True)
class DuelRow(Launched):
    """One contender of a duel at one token count, beside the first, which is `against`.

    contender, against: as on the command line. us_median: the median over rounds of the medians of
    batches. ratio: to the first, with its interval (`pairing`). differs: relative L2 distance of
    some output rows from the first's. The others: as in `Row`, means over rounds.
    """

    mode: str = column(IDENTIFIES)
    contender: str = column(IDENTIFIES)
    against: str = column(IDENTIFIES)
    rounds: int = column(POSITIVE)
    us_median: float = column(POSITIVE)
    ratio: float = column(POSITIVE)
    ratio_low: float = column(POSITIVE)
    ratio_high: float = column(POSITIVE)
    differs: float | None = None
    sm_mhz: float | None = None
    power_w: float | None = None
    energy_mj: float | None = None


COLUMNS = columns_of(Row)
#: Columns that say what was measured; the others say when, with what source and with what outcome.
KEY = tuple(c.name for c in fields(Row) if IDENTIFIES in c.metadata.get("rules", ()))
