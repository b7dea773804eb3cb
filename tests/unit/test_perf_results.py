"""Result rows, their file and their loader."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from perf.against.ceilings import CeilingRow
from perf.against.peers import PeerRow
from perf.commands.accuracy import AccuracyRow
from perf.commands.engine import EngineRow
from perf.commands.router import RouterRow
from perf.recording import environment as environments
from perf.recording.columns import COLUMNS, IDENTIFIES, POSITIVE, DuelRow, Row, column
from perf.recording.environment import environment, source_version
from perf.recording.files import ResultsFile, load, result_files
from perf.tracing.phases import PhaseRow

DOCUMENTED = (
    "date, commit, dirty, gpu, driver, torch, dsl, num_ranks, ranks_per_gpu, model, hidden, "
    "intermediate, num_experts, top_k, num_shared_experts, tokens, precision, routing, mode, impl, "
    "us_min, us_median, us_p95, tflops, roofline_us, roofline_bound, roofline_share, error_rel, "
    "reset_bytes, workspace_bytes, config, sm_mhz, power_w, energy_mj"
)


def row_of(**changes) -> Row:
    row = Row(
        date="2027-01-01T00:00:00+00:00",
        commit="0123456",
        dirty=0,
        gpu="NVIDIA H200",
        driver="580.10",
        torch="2.11.0",
        dsl="aot",
        num_ranks=1,
        ranks_per_gpu=1,
        model="tiny",
        hidden=1024,
        intermediate=512,
        num_experts=32,
        top_k=4,
        tokens=8,
        precision="bf16",
        routing="balanced",
        mode="graph",
        impl="megamoe",
        us_min=1.25,
        us_median=2.5,
        us_p95=1234567.0,
        config="block_m=128, block_n=256",
    )
    return dataclasses.replace(row, **changes)


def test_columns_are_the_documented_ones():
    assert ", ".join(COLUMNS) == DOCUMENTED


def test_rows_are_appended_one_at_a_time_under_one_header(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    ResultsFile(path).append(row_of(tokens=8))
    assert len(path.read_text().splitlines()) == 2
    ResultsFile(path).append(row_of(tokens=16))  # another process, later
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert lines[0] == ",".join(COLUMNS) and lines.count(lines[0]) == 1


@pytest.mark.parametrize("rows", [0, 1])
def test_a_row_begins_a_line_of_its_own(rows, tmp_path):
    """After a header, or a row, whose line an editor or a shell did not end."""
    path = tmp_path / "rows.csv"
    for tokens in range(1, rows + 2):
        ResultsFile(path).append(row_of(tokens=tokens))
    path.write_text("\n".join(path.read_text().splitlines()[: rows + 1]))
    ResultsFile(path).append(row_of(tokens=64))
    assert load(path).tokens.tolist() == [*range(1, rows + 1), 64]


def test_rows_come_back_as_written(tmp_path):
    path = tmp_path / "rows.csv"
    ResultsFile(path).append(row_of(error_rel=3.25e-3))
    ResultsFile(path).append(row_of(tflops=123.5))
    frame = load(path)
    assert list(frame.columns) == [*COLUMNS, "file"]
    first = frame.iloc[0]
    assert first.commit == "0123456" and first.driver == "580.10"  # text, not numbers
    assert first.config == "block_m=128, block_n=256"
    assert (first.us_median, first.error_rel, first.tokens) == (2.5, 3.25e-3, 8)
    assert first.us_p95 == pytest.approx(1234567, rel=1e-5)
    assert frame.tflops.isna().tolist() == [True, False]
    assert first.file == "rows.csv"


def test_load_reads_directories_and_nothing(tmp_path):
    for name in ("a", "b"):
        ResultsFile(tmp_path / f"{name}.csv").append(row_of(model=name))
    (tmp_path / "notes.txt").write_text("no rows")
    assert load(tmp_path).model.tolist() == ["a", "b"]
    (tmp_path / "empty").mkdir()
    assert list(load(tmp_path / "empty").columns) == [*COLUMNS, "file"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (COLUMNS[1:], r"missing \['date'\]"),
        ((*COLUMNS, "extra"), r"unknown \['extra'\]"),
        (COLUMNS[::-1], "another order"),
        (("",), "missing"),
    ],
)
def test_a_file_with_another_header_is_refused_and_kept(tmp_path, header, message):
    path = tmp_path / "rows.csv"
    content = ",".join(header) + "\n"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        ResultsFile(path)
    assert path.read_text() == content
    if len(header) > 1:
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("top_k", "four", "top_k 'four' is no number"),
        ("top_k", "4.5", "top_k '4.5' is no number"),
        ("top_k", "", "top_k is empty"),
        ("tokens", "0", "tokens 0 is no positive number"),
        ("us_median", "nan", "us_median nan is no positive number"),
        ("us_min", "", "us_min '' is no number"),
        ("us_p95", "inf", "us_p95 inf is no positive number"),
        ("error_rel", "small", "error_rel 'small' is no number"),
        ("reset_bytes", "1 MB", "reset_bytes '1 MB' is no number"),
        ("gpu", "", "gpu is empty"),
        ("routing", "", "routing is empty"),
        ("date", "", "date is empty"),
    ],
)
def test_a_cell_that_is_none_is_named(tmp_path, column, cell, message):
    path = tmp_path / "rows.csv"
    for row in (row_of(), row_of(**{column: cell})):
        ResultsFile(path).append(row)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value) == f"{path}, line 3: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2027-01-01,012", ", line 2: 2 columns, expected 34"),
        ("," * 34, ", line 2: 35 columns, expected 34"),
        ("\xff", " is no CSV file: .* can't decode"),
        ('"' + 200_000 * "x", ", line .: field larger than"),
    ],
)
def test_a_row_that_is_not_whole_is_named(tmp_path, line, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(f"{','.join(COLUMNS)}\n{line}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path}{message}"):
        load(path)


def test_what_was_not_measured_may_be_empty(tmp_path):
    path = tmp_path / "rows.csv"
    ResultsFile(path).append(row_of(driver="", dirty="", torch="2.10", error_rel=float("nan")))
    path.write_text(path.read_text() + "\n")  # a line without cells
    [row] = load(path).itertuples()
    assert row.driver == row.roofline_bound == "" and row.torch == "2.10"
    numbers = load(path)[["dirty", "error_rel", "tflops", "reset_bytes"]]
    assert numbers.isna().all(axis=None) and set(numbers.dtypes.astype(str)) == {"float64"}


def test_routings_have_the_names_of_today(tmp_path):
    for routing in ("skewed", "zipf", "zipf:1.2", "skewed.pt#0123"):
        ResultsFile(tmp_path / "rows.csv").append(row_of(routing=routing))
    assert load(tmp_path).routing.tolist() == ["zipf", "zipf", "zipf:1.2", "skewed.pt#0123"]


def test_a_row_that_cannot_be_written_names_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    file = ResultsFile(path)
    path.mkdir()
    with pytest.raises(OSError, match="rows.csv"):
        file.append(row_of())
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        ResultsFile("/dev/full").append(row_of())


def test_a_file_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ResultsFile("a.csv").append(row_of())
    Path("link").symlink_to("a.csv")
    assert len(load("a.csv", "./a.csv", tmp_path, "link")) == 1
    assert result_files(["a.csv", tmp_path / "a.csv"])[0] == [Path("a.csv")]


@pytest.fixture
def pipe():
    """(a path of the kind that `<(command)` makes, what writes to it)."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as file:
        yield Path(f"/dev/fd/{read}"), file
    os.close(read)


def test_rows_of_a_pipe_are_read(pipe, tmp_path):
    path, file = pipe
    ResultsFile(tmp_path / "rows.csv").append(row_of())
    file.write((tmp_path / "rows.csv").read_text())
    file.close()
    assert load(path).tokens.tolist() == [8]


def test_a_pipe_is_refused_where_one_will_not_do(pipe):
    with pytest.raises(ValueError, match=f"^{pipe[0]} is a pipe or a terminal: rows are appended"):
        ResultsFile(pipe[0])
    with pytest.raises(ValueError, match="is a pipe: it cannot be read twice"):
        result_files([pipe[0]])
    leader, follower = os.openpty()
    with pytest.raises(ValueError, match="is a pipe or a terminal"):
        ResultsFile(os.ttyname(follower))
    for terminal in (leader, follower):
        os.close(terminal)


def test_an_empty_file_gets_a_header_and_a_directory_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.touch()
    ResultsFile(path).append(row_of())
    assert len(load(path)) == 1
    with pytest.raises(ValueError, match="is a directory"):
        ResultsFile(tmp_path)


def git(directory, *arguments) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_version_from_git(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "REPOSITORY", tmp_path)
    monkeypatch.delenv("MEGAMOE_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "new_result.csv").touch()  # untracked: rows must not make the source dirty
    assert source_version() == (commit, 0)
    (tmp_path / "file").write_text("2")
    assert source_version() == (commit, 1)
    monkeypatch.setenv("MEGAMOE_COMMIT", "stated")  # the copy may have a git of its own
    assert source_version() == ("stated", 0)


@pytest.mark.parametrize(
    ("stated", "version"),
    [("abc1", ("abc1", 0)), ("abc1-dirty", ("abc1", 1)), ("", ("unknown", None))],
)
def test_version_without_git(tmp_path, monkeypatch, stated, version):
    monkeypatch.setattr(environments, "REPOSITORY", tmp_path)
    monkeypatch.setenv("MEGAMOE_COMMIT", stated)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert source_version() == version


def test_environment_fills_its_columns():
    where = environment("cpu")
    assert list(where) == list(COLUMNS[:7])
    assert where["gpu"] == "cpu emulation" and where["driver"] == ""
    assert where["dsl"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Later(Row):
    """Rows of a day when more is measured."""

    activation: str = column(IDENTIFIES, default="swiglu", added=True)
    sm_clock_mhz: float | None = column(POSITIVE, default=None, added=True)


def test_files_from_before_a_column_was_added_load_as_they_are(tmp_path):
    path = tmp_path / "rows.csv"
    ResultsFile(path).append(row_of())
    before = path.read_text()
    with pytest.raises(ValueError, match=r"missing \['activation', 'sm_clock_mhz'\]"):
        ResultsFile(path, Later)  # its rows would lose what they hold
    new = tmp_path / "new.csv"
    later = Later(**dataclasses.asdict(row_of()), activation="gelu", sm_clock_mhz=1300.0)
    ResultsFile(new, Later).append(later)
    assert result_files([path, new], Later) == ([path, new], [])
    rows = load(path, new, kind=Later)
    assert rows.activation.tolist() == ["swiglu", "gelu"] and rows.sm_clock_mhz[1] == 1300
    assert rows.sm_clock_mhz.isna().tolist() == [True, False] and path.read_text() == before
    with pytest.raises(ValueError, match=r"unknown \['activation', 'sm_clock_mhz'\]"):
        load(new)


def test_every_published_file_is_of_some_kind():
    kinds = {
        "ceilings": CeilingRow, "peers": PeerRow, "phases": PhaseRow, "accuracy": AccuracyRow,
        "duel": DuelRow, "engine": EngineRow, "router": RouterRow,
    }  # fmt: skip
    files = sorted((environments.REPOSITORY / "perf" / "results").glob("*.csv"))
    assert len(files) > 10
    for path in files:
        if path.stem != "experiments":
            assert len(load(path, kind=kinds.get(path.stem, Row))), path
