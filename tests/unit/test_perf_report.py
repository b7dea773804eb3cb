"""Result rows as curves, pictures and a page."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest

from perf.__main__ import main
from perf.against.peers import PEERS, PeerRow, load_peers
from perf.commands import report
from perf.drawing import page
from perf.drawing.curves import groups_of, memory_of
from perf.drawing.page import environment_rows, group_rows, memory_sections
from perf.drawing.plots import _styled
from perf.recording.columns import Row, columns_of
from perf.recording.environment import EMULATION, REPOSITORY
from perf.recording.files import ResultsFile, load
from perf.tracing.phases import PHASES, PhaseRow, sections_of
from perf.workload.cases import MODELS, Case
from tests.unit.perf_helpers import error_line
from tests.unit.test_perf_results import row_of

PRO = dict(model="pro", hidden=7168, intermediate=3072, num_experts=384, top_k=6, num_ranks=4)
#: Elements without an end tag in HTML.
VOID = {"meta", "br", "link", "img"}


def pro(tokens: int, us: float, **changes):
    """A row of Pro at EP4 whose tokens take 1000 TFLOP each and 6.25 us at the roofline."""
    roofline = dict(roofline_us=6.25 * tokens, roofline_bound="hbm", roofline_share=0.5)
    times = dict(us_min=us, us_median=us, us_p95=us, tflops=tokens * 1000 / us)
    return row_of(**{**PRO, **roofline, **times, "tokens": tokens, **changes})


ROWS = [
    pro(8, 999.0, date="2026-01-01T00:00:00+00:00"),  # measured again later
    pro(8, 100.0),
    pro(64, 400.0),
    pro(8, 300.0, impl="torch_bf16", mode="eager"),
    pro(64, 600.0, impl="torch_bf16", mode="eager"),
    pro(8, 900.0, routing="skewed", commit="fedcba9876"),
    row_of(gpu=EMULATION, tokens=4, us_min=1e6, us_median=1e6, us_p95=1e6),
]


def write(path, rows=ROWS, kind=Row) -> str:
    file = ResultsFile(path, kind)
    for row in rows:
        file.append(row)
    return str(path)


@pytest.fixture
def frame(tmp_path):
    return load(write(tmp_path / "rows.csv"))


@pytest.fixture
def peers():
    row = ("other", "NVIDIA H200", 4, "pro", 8, 50.0, "2026-01-01", "bf16")
    return pandas.DataFrame([row], columns=columns_of(PeerRow))


def test_groups_and_their_curves(frame, peers):
    balanced, skewed, emulated = groups_of(frame, peers)
    assert (balanced.routing, skewed.routing, emulated.gpu) == ("balanced", "zipf", EMULATION)
    assert balanced.title == "pro 7168/3072/384/6, EP4 on 4 x NVIDIA H200, balanced routing"
    assert balanced.slug == "nvidia-h200-pro-e384-ep4-4gpu-balanced"
    ours, torch, other = balanced.curves
    assert ours.ours and ours.us == {8: 100, 64: 400}  # the later of two rows
    assert torch.name == "torch_bf16 (eager)" and torch.us == {8: 300, 64: 600}
    assert other.peer and other.us == {8: 50}
    assert other.tflops[8] == pytest.approx(6 * 8 * 6 * 7168 * 3072 / 50e6)
    (bound,) = balanced.bounds
    assert bound.us[8] == 50 and bound.tflops[8] == pytest.approx(160, rel=1e-4)
    assert [curve.peer for curve in skewed.curves] == [False]  # peers ran balanced routing
    assert emulated.bounds == () and emulated.curves[0].tflops == {}
    assert emulated.tokens == [4]


def test_peers_of_another_shape_or_gpu_do_not_join(tmp_path, peers):
    half = [pro(8, 100.0, num_experts=192), pro(8, 100.0, gpu="H100"), pro(8, 100.0, num_ranks=8)]
    for group in groups_of(load(write(tmp_path / "half.csv", half)), peers):
        assert not any(curve.peer for curve in group.curves)


def test_speedups_are_within_a_precision(tmp_path, peers):
    rows = [*ROWS[1:5], pro(8, 60.0, precision="other"), pro(8, 90.0, mode="eager")]
    (group,) = groups_of(load(write(tmp_path / "two.csv", rows)), peers)
    found = {curve.label: ratios for curve, ratios in group.speedups()}
    assert found == {"torch_bf16 (eager), bf16": {8: 3.0, 64: 1.5}, "other, bf16": {8: 0.5}}
    assert [c.label for c in group.curves if not c.drawn] == ["megamoe (eager), bf16"]


def test_a_cold_l2_is_a_curve_of_its_own(tmp_path):
    rows = [
        pro(8, 100.0), pro(8, 300.0, impl="torch"),
        *(pro(tokens, 120.0, mode="graph-cold") for tokens in (8, 64)),
        pro(8, 420.0, mode="graph-cold", impl="torch"),
        pro(8, 500.0, mode="graph-cold", impl="own"),
    ]  # fmt: skip
    (group,) = groups_of(load(write(tmp_path / "cold.csv", rows)))
    drawn = {curve.name: curve.drawn for curve in group.curves}
    assert drawn == {
        "megamoe": True, "megamoe (graph-cold)": False, "torch": True,
        "torch (graph-cold)": False, "own (graph-cold)": True,
    }  # fmt: skip
    assert [(other.name, ratios) for other, ratios in group.speedups()] == [("torch", {8: 3.0})]
    speedups = {label: lines[0][-1] for label, lines in group_rows(group).items()}
    assert speedups == {
        "megamoe, bf16": "", "megamoe (graph-cold), bf16": "", "torch, bf16": "3.00",
        "torch (graph-cold), bf16": "3.50", "own (graph-cold), bf16": "4.17",
    }  # fmt: skip


def test_staging_is_no_contender(tmp_path):
    part = dict(impl="megamoe_staging", tflops="", roofline_us="", roofline_share="")
    rows = [pro(8, 100.0), pro(8, 5.0, **part), pro(8, 300.0, impl="torch")]
    (group,) = groups_of(load(write(tmp_path / "rows.csv", rows)))
    assert [curve.name for curve in group.drawn] == ["megamoe", "torch"]
    assert [other.name for other, _ in group.speedups()] == ["torch"]
    assert group_rows(group)["megamoe_staging, bf16"] == [("8", "5.0", "", "", "")]


def test_a_series_keeps_its_colour(tmp_path, monkeypatch):
    """Whatever stands beside it in a group, and in whichever mode it ran."""
    rows = [
        pro(8, 100.0, precision="fp8_block"), pro(8, 300.0, impl="second"),
        pro(8, 100.0, num_experts=96), pro(8, 90.0, num_experts=96, precision="fp8_block"),
        pro(8, 300.0, num_experts=96, impl="first"), pro(8, 300.0, num_experts=96, impl="second"),
        pro(8, 100.0, num_experts=192, mode="eager"),
    ]  # fmt: skip
    drawn_groups: list[tuple] = []
    monkeypatch.setattr(page, "draw_panels", lambda *drawn: drawn_groups.append(drawn) or [])
    source = write(tmp_path / "rows.csv", rows)
    assert main(["report", source, "-o", str(tmp_path / "page.html")]) == 0
    seen: dict[tuple, set] = {}
    for drawn in map(_styled, *zip(*drawn_groups, strict=True)):
        assert len({style["label"] for _, style in drawn}) == len(drawn)
        for curve, style in drawn:
            look = style["color"], style.get("marker"), style.get("linestyle")
            seen.setdefault(curve.series, set()).add(look)
    assert all(len(looks) == 1 for looks in seen.values())
    assert len(set.union(*seen.values())) == len(seen)  # and each has its own


def test_memory_is_the_region_table():
    regions = memory_of(MODELS["pro"], 4, "bf16", 8192)
    assert regions["combine_output"] == 8192 * 6 * 7168 * 2
    assert list(regions.values()) == sorted(regions.values(), reverse=True)
    with pytest.raises(ValueError):
        memory_of(MODELS["pro"], 4, "nothing", 8192)


def test_memory_is_shown_once_per_layer_at_its_largest_capacity(frame):
    sections = memory_sections(groups_of(frame))
    titles = [title for title, _ in sections.values()]
    assert titles == ["pro, EP4, bf16, room for 64 tokens", "tiny, EP1, bf16, room for 4 tokens"]


def test_layers_of_one_name_keep_apart(tmp_path):
    """Explicit sizes: every layer has its section, its pictures and its memory."""
    sizes = [dict(hidden=512), dict(hidden=1024), dict(intermediate=1024), dict(top_k=2)]
    rows = [row_of(model="custom", **changes) for changes in sizes]
    groups = groups_of(load(write(tmp_path / "rows.csv", rows)))
    slugs = [group.slug for group in groups]
    assert slugs[0] == "nvidia-h200-custom-e32-h512-i512-k4-ep1-1gpu-balanced"
    assert len(set(slugs)) == 4
    titles = [title for title, _ in memory_sections(groups).values()]
    assert titles[0] == "custom 512/512/32/4, EP1, bf16, room for 8 tokens"
    assert len(set(titles)) == 4


def test_environments_are_counted(frame):
    lines = environment_rows(frame)
    assert [(line[1], line[2]) for line in lines] == [("0123456", 5), ("fedcba9", 1),
                                                      ("0123456", 1)]  # fmt: skip
    assert [line[3] for line in lines[:2]] == ["2026-01-01 to 2027-01-01", "2027-01-01"]
    assert lines[0][0].startswith("NVIDIA H200, driver ")


def launch(tokens: int, us: float, **changes) -> PhaseRow:
    """A recorded launch whose phases but one take 1 us."""
    row = {field.name: "" for field in fields(PhaseRow)} | Case(MODELS["pro"], 4, tokens).columns
    row |= dict.fromkeys(PHASES, 1.0) | {"fc1_us": us - len(PHASES) + 1}
    return PhaseRow(**row | {"launch_us": us, "gpu": "H200", "date": "2027"} | changes)


def test_phases_are_those_of_the_latest_launch(tmp_path):
    rows = [
        launch(64, 90.0), launch(8, 50.0), launch(8, 70.0, date="2026"),
        launch(8, 30.0, precision="fp8_block"),
    ]  # fmt: skip
    path = write(tmp_path / "phases.csv", rows, PhaseRow)
    first, second = sections_of(load(path, kind=PhaseRow)).values()
    assert first[0] == "pro, EP4, bf16, balanced routing"
    assert second[0] == "pro, EP4, fp8_block, balanced routing"
    assert {tokens: sum(times.values()) for tokens, times in first[1].items()} == {8: 50, 64: 90}
    assert list(first[1]) == [8, 64] and first[1][8]["FC1 products"] == 44
    with pytest.raises(ValueError, match="another header"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc1_us": "nan"}, "fc1_us nan is no time"),
        ({"wait_us": -3.0}, "wait_us -3 is no time"),
        ({"launch_us": "inf"}, "launch_us inf is no time"),
        ({"count_us": ""}, "count_us '' is no number"),
    ],
)
def test_a_phase_that_is_none_is_named(changes, message, tmp_path):
    path = write(tmp_path / "phases.csv", [launch(8, 50.0), launch(8, 50.0, **changes)], PhaseRow)
    with pytest.raises(ValueError, match=f"{path}, line 3: {message}"):
        load(path, kind=PhaseRow)


def test_phases_join_the_page(tmp_path):
    write(tmp_path / "phases.csv", [launch(8, 1234.0)], PhaseRow)
    write(tmp_path / "rows.csv")
    out = tmp_path / "page.html"
    pictures = tmp_path / "pictures"
    assert main(["report", str(tmp_path), "-o", str(out), "--pictures", str(pictures)]) == 0
    page = Page(out.read_text())
    for expected in ("wait for slowest rank", "1,228.0", "1,234.0"):
        assert expected in page.text
    assert (pictures / "phases-0.png").is_file()


class Page(HTMLParser):
    """Checks that elements nest, and keeps what a test asks for."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            self.ids += [value] if name == "id" else []
            self.links += [value] if name in ("href", "src", "xlink:href") else []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(tmp_path, capsys):
    rows = [*ROWS, pro(16, 100.0, impl="<script>alert(1)</script>", routing="$x$")]
    write(tmp_path / "rows.csv", rows)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    out = tmp_path / "new" / "page.html"
    pictures = tmp_path / "pictures"
    assert main(["report", str(tmp_path), "-o", str(out), "--pictures", str(pictures)]) == 0
    assert "notes.csv" in capsys.readouterr().err
    text = out.read_text()
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    # Panels and legends: 3 + 3 where peers are, 2 + 1, 2 + 2, 1 + 1; then the memory of two.
    assert page.count["svg"] == 6 + 3 + 4 + 2 + 2 and page.count["figure"] == 2
    assert "script" not in page.count and "link" not in page.count and "img" not in page.count
    assert page.links and all(link.startswith("#") for link in page.links)
    assert "http" not in text and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    shown = ["roofline, bf16", "torch_bf16 (eager), bf16", "DeepGEMM #383, fp8_block"]
    shown += ["combine_output", "fedcba9", "Times of a CPU", "Speed-up of megamoe"]
    for expected in shown:
        assert expected in page.text, expected
    assert "No launch was recorded" in page.text
    assert len(list(pictures.glob("*.png"))) == len(list(pictures.glob("*.svg"))) == 6
    for path in pictures.glob("*.svg"):
        assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for path in pictures.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_same_rows_give_the_same_page(tmp_path):
    source = write(tmp_path / "rows.csv", ROWS[1:3])
    texts = []
    for name in "ab":
        assert main(["report", source, "-o", str(tmp_path / name)]) == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: CSV"),
        (["{nowhere}"], "does not exist"),
        (["{notes}"], "no result rows"),
        (["{cut}"], "cut.csv, line 3: 12 columns, expected 34"),
        (["{text}"], "text.csv, line 2: top_k 'four' is no number"),
        (["{rows}", "--peers", "{notes}"], "notes.csv has another header: missing ['source'"),
        (["{rows}", "--peers", "{none}"], "none.csv has another header: missing ['source'"),
        (["{rows}", "--peers", "{binary}"], "binary.csv is no CSV file"),
        (["{rows}", "--peers", "{peers}"], "peers.csv, line 2: tokens 'abc' is no number"),
        (["{rows}", "--peers", "{nowhere}"], "does not exist"),
        (["{rows}", "--picture", "x"], "did you mean --pictures"),
    ],
)
def test_wrong_arguments_are_one_line(argv, message, tmp_path, capsys):
    words = "rows notes nowhere cut text none binary peers"
    names = {name: str(tmp_path / f"{name}.csv") for name in words.split()}
    write(names["rows"])
    write(names["text"], [pro(8, 1.0, top_k="four")])
    lines = Path(write(names["cut"], ROWS[:2])).read_text().splitlines()
    Path(names["cut"]).write_text("\n".join([*lines[:2], ",".join(lines[2].split(",")[:12])]))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "none.csv").touch()
    (tmp_path / "binary.csv").write_bytes(b"\x89PNG\xff")
    peer = "other,NVIDIA H200,4,pro,abc,50,2026-01-01,bf16"
    (tmp_path / "peers.csv").write_text(f"{','.join(columns_of(PeerRow))}\n{peer}\n")
    out = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        main(["report", *(word.format(**names) for word in argv), "-o", str(out)])
    assert stop.value.code == 2 and not out.exists()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("output", ["b.csv", "new.CSV", "notes", "./link"])
def test_results_are_not_overwritten(output, tmp_path, capsys, monkeypatch):
    """Neither by a page, `-o *.csv` in a shell, nor where a link leads to them."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv", "notes"):
        write(tmp_path / name)
    (tmp_path / "link").symlink_to("notes")
    assert "would overwrite results" in error_line(
        ["report", "a.csv", "notes", "-o", output], capsys
    )
    assert len(load("a.csv", "b.csv", "notes")) == 3 * len(ROWS)
    assert not (tmp_path / "new.CSV").exists()


@pytest.mark.parametrize("option", ["--output", "--pictures"])
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    option, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "result_files", None)
    place = write(tmp_path / "rows.csv") + "/a.html"
    assert f"{option} {place} cannot be written: " in error_line(
        ["report", str(tmp_path), "-o", str(tmp_path / "page.html"), option, place], capsys
    )
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_can_no_longer_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.html"
    monkeypatch.setattr(report, "page_of", lambda *arguments: page.mkdir() or "text")
    assert str(page) in error_line(
        ["report", write(tmp_path / "rows.csv"), "-o", str(page)], capsys
    )


def test_without_matplotlib_the_error_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install -e '.[report]'" in error_line(
        ["report", write(tmp_path / "rows.csv"), "-o", str(tmp_path / "page.html")], capsys
    )


def test_the_published_files_can_be_drawn():
    """Every file of result rows joins into groups; peers stand beside all three layers at EP4."""
    peers = load_peers(PEERS)
    assert set(peers.model) == {"pro", "flash", "v3"} and set(peers.precision) <= {
        "bf16", "fp8_block"}  # fmt: skip
    assert not peers.duplicated(["source", "gpu", "num_ranks", "model", "tokens"]).any()
    places = ("perf/results", "tests/data")
    files = sorted(file for place in places for file in (REPOSITORY / place).glob("h200*.csv"))
    groups = groups_of(load(*files), peers)
    beside = {g.model.name for g in groups if any(curve.peer for curve in g.curves)}
    assert beside == {"pro", "flash", "v3"}


def test_the_published_phases_are_whole():
    """Phases follow each other: none is negative, and together they are the launch."""
    frame = load(REPOSITORY / "perf" / "results" / "phases.csv", kind=PhaseRow)
    assert len(frame) and (frame[list(PHASES)] >= 0).all(axis=None)
    assert frame[list(PHASES)].sum(axis=1).tolist() == pytest.approx(frame.launch_us, rel=1e-4)
