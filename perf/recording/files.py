"""CSV files of result rows: how one grows row by row, and how it is read.

A file with another header is refused before anything is measured. Neighbour: `columns` says what a
row holds.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from perf.arguments import check_writable
from perf.recording.columns import Row, cell_of, columns_of, fits, value_of


class ResultsFile:
    """A CSV file that rows of one kind, a dataclass, are appended to; ValueError if `path` cannot
    be written or has another header than its fields.
    """

    def __init__(self, path: str | Path, kind: type = Row):
        self.path = Path(path)
        self.columns = columns_of(kind)
        check_writable("the CSV file", self.path, parents=True)
        if self.path.exists() and not _can_seek(self.path):
            raise ValueError(f"{path} is a pipe or a terminal: rows are appended to a file")
        if self.path.exists() and self.path.stat().st_size:
            check_header(self.path, _opened(self.path)[0], kind, today=True)

    def append(self, row: object) -> None:
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
                writer.writerow([cell_of(getattr(row, column)) for column in self.columns])
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


def check_header(path: Path, header: list[str], kind: type, today: bool = False) -> None:
    """ValueError, naming the file, unless it holds such rows; with every column of `today`, if they
    are to be appended.
    """
    columns = list(columns_of(kind))
    if header == columns or (fits(header, kind) and not today):
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


def result_files(paths: Iterable[str | Path], kind: type = Row) -> tuple[list[Path], list[Path]]:
    """(files of such rows, other CSV files) among `paths` and in the directories among them;
    ValueError for a path that does not exist.
    """
    rows: list[Path] = []
    others: list[Path] = []
    for path in _files_of(paths):
        if path.is_fifo():
            raise ValueError(f"{path} is a pipe: it cannot be read twice")
        (rows if fits(_opened(path)[0], kind) else others).append(path)
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

    rows: list[list[object]] = []
    for file in _files_of(paths):
        header, lines = _opened(file)
        check_header(file, header, kind)
        rows += [[*row, file.name] for row in _rows_of(file, header, lines, kind)]
    return pandas.DataFrame(rows, columns=[*columns_of(kind), "file"])


def _rows_of(path: Path, header: list[str], lines, kind: type) -> list[list[object]]:
    """The values of every row; ValueError, naming file and line, for one that is not whole."""
    rows = []
    try:
        for cells in filter(None, lines):
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns, expected {len(header)}")
            held = dict(zip(header, cells, strict=True))
            rows.append([value_of(column, held.get(column.name)) for column in fields(kind)])
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}") from None
    return rows
