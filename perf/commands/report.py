"""The command `report`: result files as one HTML page that needs nothing but itself.

For every layer on every set of GPUs: time, TFLOP/s and speed-up over tokens, beside the roofline
and beside peers; the rows behind them; where the time of recorded launches goes; the workspace by
region; where and from what source the rows were measured. Pictures are SVG inside the page, each no
wider than a phone; `--pictures` writes them as files too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.against.peers import PEERS, load_peers
from perf.arguments import check_no_results, check_writable, option, path_name
from perf.drawing.curves import groups_of
from perf.drawing.page import memory_sections, page_of
from perf.drawing.plots import draw_group, draw_memory, draw_phases, styles_of
from perf.recording.files import load, result_files
from perf.tracing.phases import PhaseRow, sections_of

SUMMARY = "draw result files as one self-contained HTML page"


@dataclass(frozen=True)
class Options:
    files: Sequence[str] = option(
        "result files, or directories", "files", nargs="+", type=path_name, metavar="CSV"
    )
    output: str = option(
        "the page", "-o", "--output", default="report.html", type=path_name, metavar="FILE"
    )
    pictures: str | None = option(
        "write every picture as PNG and SVG too", type=path_name, metavar="DIR"
    )
    peers: str = option(
        "figures of other implementations (default: perf/results/peers.csv)",
        default=str(PEERS),
        type=path_name,
        metavar="CSV",
    )


def run(options: Options) -> int:
    """Write the page and the pictures; 0. ValueError for files that cannot be drawn or written."""
    check_no_results("--output", options.output, read=[*options.files, options.peers])
    check_writable("--output", options.output, parents=True)
    if options.pictures:
        check_writable("--pictures", options.pictures, parents=True, directory=True)
    rows, others = result_files(options.files)
    recorded, others = result_files(others, PhaseRow)
    if others:
        names = ", ".join(path.name for path in others)
        print(f"left out, no result rows: {names}", file=sys.stderr)
    frame = load(*rows) if rows else ()
    if not len(frame):
        raise ValueError(f"no result rows in {' '.join(options.files)}")
    groups = groups_of(frame, load_peers(options.peers))
    launches = load(*recorded, kind=PhaseRow)
    memory = memory_sections(groups)
    pictures = {
        slug: draw_phases(title, slug, parts)
        for slug, (title, parts) in sections_of(launches).items()
    }
    pictures |= {slug: draw_memory(title, slug, parts) for slug, (title, parts) in memory.items()}
    page = page_of(frame, launches, groups, memory, pictures)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    if options.pictures:
        directory = Path(options.pictures)
        directory.mkdir(parents=True, exist_ok=True)
        pictures |= {group.slug: draw_group(group, styles_of(groups)) for group in groups}
        for slug, formats in pictures.items():
            for suffix, data in formats.items():
                (directory / f"{slug}.{suffix}").write_bytes(data)
    print(f"{output}: {len(frame)} rows, {len(groups)} layers")
    return 0
