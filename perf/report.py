"""The command `report`: result files as one HTML page that needs nothing but itself.

For every layer on every set of GPUs: time, TFLOP/s and speed-up over tokens, beside the roofline
and beside peers; the rows behind them; the workspace by region; where and from what source the rows
were measured. Pictures are SVG inside the page; `--pictures` writes them as files too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from perf.curves import PEERS, Curve, Group, groups_of, load_peers, memory_of
from perf.plots import draw_group, draw_memory
from perf.results import load, result_files

SUMMARY = "draw result files as one self-contained HTML page"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: .85rem; display: block;
        overflow-x: auto }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ccc; text-align: right;
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
figcaption { font-size: .85rem; color: #444 }
"""


def html_table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; every cell is escaped, "" stands for what was not measured."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    )


def html_figure(pictures: dict[str, bytes], caption: str) -> str:
    """The picture inside the page, where an <svg> needs no namespaces."""
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", pictures["svg"].decode())
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def group_rows(group: Group) -> list[tuple[str, ...]]:
    """Lines of the table of a group: implementation, tokens, time, TFLOP/s, share of the roofline,
    speed-up of ours in the same precision over this one.
    """

    def speedup(curve: Curve, tokens: int) -> float | None:
        ours = [c.us[tokens] for c in group.curves if c.ours and c.precision == curve.precision
                and tokens in c.us]  # fmt: skip
        return None if curve.ours or not ours else curve.us[tokens] / min(ours)

    bounds = {bound.precision: bound.us for bound in group.bounds}
    lines = []
    for curve in group.curves:
        for tokens, us in curve.us.items():
            bound = bounds.get(curve.precision, {}).get(tokens)
            share = None if bound is None else bound / us
            lines.append(
                (
                    curve.label,
                    f"{tokens:,}",
                    _number(us),
                    _number(curve.tflops.get(tokens)),
                    _number(share, 2),
                    _number(speedup(curve, tokens), 2),
                )
            )
    return lines


ROW_TITLES = ("implementation", "tokens per rank", "us", "TFLOP/s per GPU", "share of the roofline",
              "our speed-up over it")  # fmt: skip


def environment_rows(frame) -> list[tuple[object, ...]]:
    """Lines of the table of environments: where and from what source rows were measured."""
    columns = ["gpu", "driver", "torch", "dsl", "commit", "dirty"]
    text = frame.fillna({"dirty": -1, "driver": "", "dsl": ""})
    return [
        (
            *key[:4],
            str(key[4])[:10],
            {0: "no", 1: "yes"}.get(key[5], ""),
            len(rows),
            str(rows.date.min())[:10],
            str(rows.date.max())[:10],
        )
        for key, rows in text.groupby(columns, sort=False)
    ]


ENVIRONMENT_TITLES = (
    "GPU", "driver", "torch", "DSL", "commit", "changed files", "rows", "first", "last",
)  # fmt: skip


def memory_sections(groups: Sequence[Group]) -> dict[str, tuple[str, dict[str, int]]]:
    """{slug: (title, {region: bytes})}, one per layer, number of ranks and precision."""
    sections = {}
    for group in groups:
        for precision in dict.fromkeys(curve.precision for curve in group.curves if curve.ours):
            m, tokens = group.model, max(group.tokens)
            name = f"memory-{m.name}-e{m.num_experts}-ep{group.num_ranks}-{precision}"
            if name in sections and sections[name][2] >= tokens:
                continue
            try:
                regions = memory_of(m, group.num_ranks, precision, tokens)
            except ValueError:  # rows of a precision or shape that this source does not have
                continue
            title = f"{m.name}, EP{group.num_ranks}, {precision}, room for {tokens:,} tokens"
            sections[name] = (title, regions, tokens)
    return {slug: (title, regions) for slug, (title, regions, _) in sections.items()}


def page_of(frame, groups: Sequence[Group], pictures: dict[str, dict[str, bytes]]) -> str:
    """The whole page; `pictures` by slug."""
    parts = ["<h1>MegaMoE measurements</h1>"]
    parts.append(
        f"<p>{len(frame)} rows. Times are medians of the slowest rank; TFLOP/s count useful work. "
        "Of a point measured several times the latest counts. Peers (dotted) are other "
        "implementations' published or re-measured figures.</p>"
    )
    links = "".join(f'<li><a href="#{g.slug}">{escape(g.title)}</a></li>' for g in groups)
    parts.append(
        f'<nav><ul>{links}<li><a href="#memory">Memory</a></li>'
        '<li><a href="#environment">Environment</a></li></ul></nav>'
    )
    for group in groups:
        parts.append(f'<section id="{group.slug}"><h2>{escape(group.title)}</h2>')
        if not any(curve.tflops for curve in group.curves):
            parts.append("<p>Times of a CPU that emulates the protocol: no GPU figures.</p>")
        parts.append(html_figure(pictures[group.slug], f"{group.title}: time, work, speed-up"))
        parts.append(html_table("The points", ROW_TITLES, group_rows(group)))
        parts.append("</section>")
    parts.append('<section id="memory"><h2>Memory by region</h2>')
    for slug, (title, regions) in memory_sections(groups).items():
        total = sum(regions.values())
        parts.append(html_figure(pictures[slug], f"{title}: {total / 2**20:,.1f} MiB per rank"))
        lines = [(name, f"{size:,}", f"{size / total:.1%}") for name, size in regions.items()]
        parts.append(html_table(title, ("region", "bytes", "share"), lines))
    parts.append('</section><section id="environment"><h2>Environment</h2>')
    parts.append(
        html_table("Where rows were measured", ENVIRONMENT_TITLES, environment_rows(frame))
    )
    parts.append("</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MegaMoE measurements</title><style>{STYLE}</style></head>\n"
        "<body>" + "\n".join(parts) + "</body></html>\n"
    )


def draw_all(groups: Sequence[Group]) -> dict[str, dict[str, bytes]]:
    """{slug: picture} of every group and every memory section."""
    drawn = {group.slug: draw_group(group) for group in groups}
    for slug, (title, regions) in memory_sections(groups).items():
        drawn[slug] = draw_memory(title, slug, regions)
    return drawn


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="CSV", help="result files, or directories")
    parser.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="default: report.html"
    )
    parser.add_argument("--pictures", metavar="DIR", help="write every picture as PNG and SVG too")
    parser.add_argument(
        "--peers", metavar="CSV", default=str(PEERS),
        help="figures of other implementations (default: perf/results/peers.csv)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the page and the pictures; 0. ValueError for files that cannot be drawn."""
    rows, others = result_files(args.files)
    if others:
        names = ", ".join(path.name for path in others)
        print(f"left out, no result rows: {names}", file=sys.stderr)
    frame = load(*rows) if rows else ()
    if not len(frame):
        raise ValueError(f"no result rows in {' '.join(args.files)}")
    groups = groups_of(frame, load_peers(args.peers))
    pictures = draw_all(groups)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page_of(frame, groups, pictures), encoding="utf-8")
    if args.pictures:
        directory = Path(args.pictures)
        directory.mkdir(parents=True, exist_ok=True)
        for slug, formats in pictures.items():
            for suffix, data in formats.items():
                (directory / f"{slug}.{suffix}").write_bytes(data)
    print(f"{output}: {len(frame)} rows, {len(groups)} layers, {len(pictures)} pictures")
    return 0
