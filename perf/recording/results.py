"""The result row: its columns, how a CSV file of them grows row by row, and how it is read.

The header of a file is fixed for ever by COLUMNS, so that rows of different months can be read
together. A file with another header is refused before anything is measured. Neighbours: `sweep`
makes rows; readers use `load`.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, fields
from datetime import UTC, datetime
from math import inf, nan
from pathlib import Path

import torch

from perf.arguments import check_writable
from perf.workload.routings import ALIASES

REPOSITORY = Path(__file__).resolve().parents[2]
#: What stands in `gpu` where a CPU executed the kernel.
EMULATION = "cpu emulation"


@dataclass(frozen=True)
class Environment:
    """When, from what source and where something was measured, as `environment` fills it in.

    date: UTC. dirty: 1 if tracked files differed from `commit`.
    """

    date: str
    commit: str
    dirty: int | str
    gpu: str
    driver: str
    torch: str
    dsl: str


@dataclass(frozen=True)
class Launched(Environment):
    """What ran, as `Case.columns` fills it in. tokens: per rank."""

    num_ranks: int
    ranks_per_gpu: int
    model: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tokens: int
    precision: str
    routing: str


@dataclass(frozen=True)
class Row(Launched):
    """One measurement. Times are the maximum over ranks; an empty string is a value that was not
    measured.

    mode: eager or graph; with a cold L2 eager-cold or graph-cold (`timing.mode_label`). tflops:
    useful, per GPU. error_rel: relative L2 error against the oracle, largest over ranks.
    *_bytes: of one rank's workspace.
    """

    mode: str
    impl: str
    us_min: float
    us_median: float
    us_p95: float
    tflops: float | str = ""
    roofline_us: float | str = ""
    roofline_bound: str = ""
    roofline_share: float | str = ""
    error_rel: float | str = ""
    reset_bytes: int | str = ""
    workspace_bytes: int | str = ""
    config: str = ""


COLUMNS = tuple(field.name for field in fields(Row))
#: Columns that say what was measured; the others say when, with what source and with what outcome.
KEY = (
    "gpu", "num_ranks", "ranks_per_gpu", "model", "hidden", "intermediate", "num_experts", "top_k",
    "tokens", "precision", "routing", "mode", "impl",
)  # fmt: skip


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class ResultsFile:
    """A CSV file that rows of one kind, a dataclass, are appended to; ValueError if `path` cannot
    be written or has another header than its fields.
    """

    def __init__(self, path: str | Path, kind: type = Row):
        self.path = Path(path)
        self.columns = tuple(field.name for field in fields(kind))
        check_writable("the CSV file", self.path, parents=True)
        if self.path.exists() and not _can_seek(self.path):
            raise ValueError(f"{path} is a pipe or a terminal: rows are appended to a file")
        if self.path.exists() and self.path.stat().st_size:
            check_header(self.path, _opened(self.path)[0], self.columns)

    def append(self, row: Row) -> None:
        """Write one row on a line of its own, with the header first in a new file, and close the
        file. An OSError names it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(self.columns)
                elif not _ends_a_line(self.path):
                    file.write("\n")
                writer.writerow([_cell(getattr(row, column)) for column in self.columns])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def _can_seek(path: Path) -> bool:
    """Whether an existing file has an end, where rows go; a pipe and a terminal have none."""
    if path.is_fifo():  # to open one may wait for a reader
        return False
    with path.open("ab") as file:
        return file.seekable()


def _ends_a_line(path: Path) -> bool:
    """Whether the last line of a file that is not empty is complete."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def check_header(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    """ValueError, naming the file, unless its header has exactly these columns."""
    if header == list(columns):
        return
    missing = [column for column in columns if column not in header]
    unknown = [column for column in header if column not in columns]
    detail = (
        f"missing {missing}, unknown {unknown}"
        if missing or unknown
        else "the columns are in another order"
    )
    raise ValueError(f"{path} has another header: {detail}")


def _files_of(paths: Iterable[str | Path]) -> Iterator[Path]:
    """These paths, a directory as its CSV files; each file once."""
    seen = set()
    for path in map(Path, paths):
        for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def result_files(
    paths: Iterable[str | Path], columns: Sequence[str] = COLUMNS
) -> tuple[list[Path], list[Path]]:
    """(files of rows with these columns, other CSV files) among `paths` and in the directories
    among them; ValueError for a path that does not exist.
    """
    rows, others = [], []
    for path in _files_of(paths):
        if path.is_fifo():
            raise ValueError(f"{path} is a pipe: it cannot be read twice")
        (rows if tuple(_opened(path)[0]) == tuple(columns) else others).append(path)
    return rows, others


def _opened(path: Path) -> tuple[list[str], Iterator[list[str]]]:
    """(header, csv.reader of the other lines) of a file, read once, as it may be a pipe."""
    try:
        with path.open(newline="") as file:
            lines = csv.reader(io.StringIO(file.read(), newline=""))
        return next(lines, []), lines
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None


def load(*paths: str | Path, kind: type = Row):
    """Rows of CSV files, or of all those in a directory: a pandas DataFrame, `file` added.
    A number that was not measured is NaN; routings have the names of today. ValueError for a file
    that does not exist or has other columns than `kind`, and for a row that is not whole.
    """
    import pandas

    columns = [field.name for field in fields(kind)]
    rows: list[list[object]] = []
    for file in _files_of(paths):
        header, lines = _opened(file)
        check_header(file, header, columns)
        rows += [[*row, file.name] for row in _rows_of(file, lines, kind)]
    return pandas.DataFrame(rows, columns=[*columns, "file"])


def _rows_of(path: Path, lines, kind: type) -> list[list[object]]:
    """The values of every row; ValueError, naming file and line, for one that is not whole."""
    columns, rows = fields(kind), []
    try:
        for cells in filter(None, lines):
            if len(cells) != len(columns):
                raise ValueError(f"{len(cells)} columns, expected {len(columns)}")
            rows.append([_value(*pair) for pair in zip(columns, cells, strict=True)])
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}") from None
    return rows


def _value(column: Field, cell: str) -> object:
    """What a cell holds, by the annotation of its column; ValueError where that cannot be. Numbers
    of KEY, times of calls and the value of a ceiling are positive; phases may take no time.
    """
    name, (kind, *optional) = column.name, column.type.split(" | ")
    if not cell and name in (*KEY, "date"):
        raise ValueError(f"{name} is empty")
    if kind == "str":
        return ALIASES.get(cell, cell) if name == "routing" else cell
    if not cell and optional:
        return nan
    try:
        value = {"int": int, "float": float}[kind](cell)
    except ValueError:
        raise ValueError(f"{name} {cell!r} is no number") from None
    positive = name in (*KEY, "us", "value") or name.startswith("us_")
    if positive and not 0 < value < inf:
        raise ValueError(f"{name} {cell} is no positive number")
    if name.endswith("_us") and not 0 <= value < inf:
        raise ValueError(f"{name} {cell} is no time")
    return value


def _output_of(*command: str) -> str | None:
    """First line that a command prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


def source_version() -> tuple[str, int | str]:
    """(commit, dirty) from MEGAMOE_COMMIT=<commit>[-dirty], which a copy of a checkout on another
    machine needs, else from git, else unknown.
    """
    stated = os.environ.get("MEGAMOE_COMMIT", "")
    if stated:
        return stated.removesuffix("-dirty"), int(stated.endswith("-dirty"))
    commit = _output_of("git", "rev-parse", "HEAD")
    if not commit:
        return "unknown", ""
    changes = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return commit, "" if changes is None else int(bool(changes))


def _dsl_version() -> str:
    try:
        return importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return "aot"  # kernels were compiled ahead of time


def _driver_version() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return _output_of(*query) or "unknown"


def environment(device: torch.device | str) -> dict[str, object]:
    """The columns of a row that say when, from what source and where it was measured."""
    commit, dirty = source_version()
    on_gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else EMULATION,
        "driver": _driver_version() if on_gpu else "",
        "torch": torch.__version__,
        "dsl": _dsl_version(),
    }
